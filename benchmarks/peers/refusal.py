"""How a peer or a contender ends that cannot run here: one line on stderr and a status of its own."""

from __future__ import annotations

import sys
from typing import NoReturn

CANNOT_RUN = 3
"""Exit status if a package is missing or cannot open the checkpoint; the last line on stderr says which."""


def exit_without(package: str) -> NoReturn:
    """Name the missing package on stderr and exit."""
    refuse(f"{package} is not installed; `pip install {package}` in an environment of its own")


def refuse(sentence: str) -> NoReturn:
    """Print why it cannot run and exit."""
    print(sentence, file=sys.stderr)
    sys.exit(CANNOT_RUN)
