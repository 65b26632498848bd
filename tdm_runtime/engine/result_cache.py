"""Cache of finished pictures, for requests that repeat exactly."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from tdm_runtime.engine.sample import Picture, Timings
from tdm_runtime.params import SamplingParams


class ResultCache:
    """The most recently used pictures, up to a number of bytes. Not thread-safe; the owner holds the lock."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._pictures: OrderedDict[tuple[str, SamplingParams], Picture] = OrderedDict()
        self.hits = 0
        """Number of pictures that were found."""

    def get(self, digest: str, params: SamplingParams, strict: bool) -> Picture | None:
        """Return the picture of a model and parameters, or None. With `strict`, only a strict picture."""
        picture = self._pictures.get((digest, params))
        if picture is None or (strict and not picture.is_strict):
            return None
        self._pictures.move_to_end((digest, params))
        self.hits += 1
        return replace(picture, timings=Timings(), predicted_ms=0.0, is_cached=True)

    def put(self, digest: str, picture: Picture) -> None:
        """Keep a picture. A strict picture is never replaced by one that is not strict."""
        key = (digest, picture.params)
        known = self._pictures.get(key)
        if picture.pixels.nbytes > self._max_bytes or (known is not None and known.is_strict):
            return
        self._num_bytes += picture.pixels.nbytes - (0 if known is None else known.pixels.nbytes)
        self._pictures[key] = picture
        while self._num_bytes > self._max_bytes:
            _, oldest = self._pictures.popitem(last=False)
            self._num_bytes -= oldest.pixels.nbytes
