"""What `tdm-export` raises on purpose."""

from __future__ import annotations

from tdm_runtime.errors import TDMError


class ExportError(TDMError):
    """A component that cannot be exported, built or verified; names the component and what stands in the way."""
