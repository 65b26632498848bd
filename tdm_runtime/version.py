"""The version of this package."""

import importlib.metadata
from functools import cache


@cache
def package_version() -> str:
    """Return the version of this package; "unknown" if it is not installed."""
    try:
        return importlib.metadata.version("tdm-serve")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
