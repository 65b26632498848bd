"""Errors of `tdm-export`."""

from __future__ import annotations

from tdm_runtime.errors import TDMError


class ExportError(TDMError):
    """Error: a component cannot be exported, built or verified. The message names the component and the reason."""
