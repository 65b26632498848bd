"""API keys and their quotas.

Keys are random, so the file keeps their SHA-256; a slower hash is not needed. If a server has a key file, it refuses
requests without a key of that file. Without a key file, every caller is `ANYBODY`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pydantic

from serving.errors import APIError

KEY_PREFIX = "tdm-"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
PERIOD_S = 60.0
"""Period of a quota, in seconds. A quota that was not used in one period is not added to the next."""
LOOK_AGAIN_S = 1.0
"""Longest time until a changed key file is read, in seconds."""


@dataclass(frozen=True)
class APIKey:
    """One line of the key file."""

    name: str
    sha256: str
    """SHA-256 of the whole key, in hex."""
    requests_per_minute: float | None = None
    cost_per_minute: float | None = None
    """Quota in megapixel-steps: pictures x width x height x frames x steps / 10^6."""

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ValueError(f"name is {self.name[:80]!r}; use up to 64 letters, digits, dots, dashes and underscores")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 of {self.name} is {self.sha256[:12]!r}...; make a key with `tdm-keys add`")
        for field in ("requests_per_minute", "cost_per_minute"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} of {self.name} is {value}; give a positive number, or leave it out")


_KEYS = pydantic.TypeAdapter(list[APIKey])


def load_keys(file: Path) -> list[APIKey]:
    """Read a key file.

    Raises:
        ValueError: the file cannot be used; the message has the reason and the remedy.
    """
    try:
        keys = _KEYS.validate_json(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); `tdm-keys add {file} NAME` makes it") from None
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))} {first['msg']}; see docs/security.md") from None
    names = [key.name for key in keys]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file} has {', '.join(doubled)} more than once; remove all but one")
    return keys


def save_keys(file: Path, keys: list[APIKey]) -> None:
    """Write a key file that only its owner can read. It replaces the old one as a whole."""
    rows = [{name: value for name, value in asdict(key).items() if value is not None} for key in keys]
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
        stream.write(json.dumps(rows, indent=1) + "\n")
    draft.replace(file)


def draw_key() -> str:
    """Return a new key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key in hex, as the key file has it."""
    return hashlib.sha256(key.encode()).hexdigest()


class Bucket:
    """Quota per minute: full at the start, refilled evenly. It is not thread-safe; its owner locks."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self._level = capacity
        self._filled_s = time.monotonic()

    def wait_s(self, amount: float) -> float:
        """Return the seconds until this amount is available: 0 if it is now, infinity if it never will be."""
        now_s = time.monotonic()
        self._level = min(self.capacity, self._level + (now_s - self._filled_s) * self.capacity / PERIOD_S)
        self._filled_s = now_s
        if amount > self.capacity:
            return math.inf
        return max(0.0, (amount - self._level) * PERIOD_S / self.capacity)

    def take(self, amount: float) -> None:
        self._level -= amount


class Caller:
    """Owner of a key, or any client of a server without keys."""

    def __init__(self, key: APIKey | None) -> None:
        self.name = "anybody" if key is None else key.name
        self._lock = threading.Lock()
        self._requests = None if key is None or key.requests_per_minute is None else Bucket(key.requests_per_minute)
        self._cost = None if key is None or key.cost_per_minute is None else Bucket(key.cost_per_minute)

    def spend(self, cost: float) -> None:
        """Take one request and its cost from the quotas: both or neither.

        Args:
            cost: cost of the request in megapixel-steps.

        Raises:
            APIError: 429, with the quota and the time to wait.
        """
        amounts = [
            (bucket, amount, unit)
            for bucket, amount, unit in ((self._requests, 1.0, "requests"), (self._cost, cost, "megapixel-steps"))
            if bucket is not None
        ]
        with self._lock:
            for bucket, amount, unit in amounts:
                if wait_s := bucket.wait_s(amount):
                    raise _over_quota(self.name, bucket.capacity, amount, unit, wait_s)
            for bucket, amount, _ in amounts:
                bucket.take(amount)


def _over_quota(name: str, capacity: float, amount: float, unit: str, wait_s: float) -> APIError:
    quota = f"the key {name} has {capacity:g} {unit} a minute"
    if math.isinf(wait_s):
        message = f"the request costs {amount:g} {unit} and {quota}; ask for fewer or smaller pictures, or fewer steps"
        return APIError(429, message, "rate_limit_error", code="quota_exceeded", headers={"x-should-retry": "false"})
    message = f"{quota} and they are used up; retry in {wait_s:.1f} s"
    headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(1e3 * wait_s))}
    return APIError(429, message, "rate_limit_error", code="rate_limit_exceeded", headers=headers)


ANYBODY = Caller(None)


class Access:
    """The keys of a server. They follow changes of the key file, so that a key can be removed without a restart."""

    def __init__(self, file: Path | None) -> None:
        """
        Raises:
            ValueError: the file cannot be used.
        """
        self._file = file
        self._callers: dict[str, tuple[APIKey, Caller]] = {}
        self._seen: tuple[int, int] | None = None
        self._looked_s = -math.inf
        if file is not None:
            self._read(file, load_keys(file))

    def caller(self, authorization: str | None) -> Caller:
        """Return the caller with this `Authorization` header.

        Raises:
            APIError: 401, the header has no known key.
        """
        if self._file is None:
            return ANYBODY
        self._look_again(self._file)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() == "basic":
            key = _password(key)
        if scheme.lower() not in ("bearer", "basic") or not key.strip():
            raise _unauthorized("this server needs an API key; send it as `Authorization: Bearer KEY`")
        given, found = hash_key(key.strip()), None
        for sha256, (_, caller) in self._callers.items():
            if hmac.compare_digest(sha256, given):  # compare all: the time reveals nothing
                found = caller
        if found is None:
            raise _unauthorized("this API key is unknown; check it, or ask the server's operator for another")
        return found

    def _look_again(self, file: Path) -> None:
        if time.monotonic() - self._looked_s < LOOK_AGAIN_S:
            return
        self._looked_s = time.monotonic()
        try:
            if _stamp(file) != self._seen:
                self._read(file, load_keys(file))
        except (OSError, ValueError):
            self._callers = {}  # without a readable key file no key is valid
            self._seen = None

    def _read(self, file: Path, keys: list[APIKey]) -> None:
        self._seen = _stamp(file)
        known = {key: caller for key, caller in self._callers.values()}
        # The used quota of an unchanged key stays used.
        self._callers = {key.sha256: (key, known.get(key) or Caller(key)) for key in keys}


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_ino


def _password(credentials: str) -> str:
    """Return the password of Basic credentials, which some clients can send and no others; empty if there is none."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _unauthorized(message: str) -> APIError:
    headers = {"www-authenticate": "Bearer", "x-should-retry": "false"}
    return APIError(401, message, "authentication_error", code="invalid_api_key", headers=headers)
