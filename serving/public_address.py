"""The address at which clients reach the server, where a proxy stands before it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
HOST = re.compile(r"([a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(:[0-9]{1,5})?", re.ASCII | re.IGNORECASE)
PREFIX = re.compile(r"(/(?!\.{1,2}(/|$))[\w.~@:+-]+)*", re.ASCII)
"""Path of a proxy before ours: nothing, or segments of harmless characters, none of which is `.` or `..`."""
_PAIR = re.compile(r'\s*(proto|host)\s*=\s*(?:"([^"\\]*)"|([^\s;,"]+))\s*', re.IGNORECASE)


@dataclass(frozen=True)
class PublicAddress:
    """Parts of an address that differ from those of the request as it arrived; None and "" change nothing."""

    scheme: str | None = None
    """http or https."""
    host: str | None = None
    """Host, with a port where it is not the scheme's own."""
    prefix: str = ""
    """Path before the server's own paths, such as /pictures; it does not end with a slash."""


def parse_url(url: str) -> PublicAddress:
    """Read the value of --public-url.

    Raises:
        ValueError: it is no URL of a server.
    """
    found = urlsplit(url)
    if found.scheme not in ("http", "https"):
        raise ValueError(f"--public-url is {url[:80]!r}; it must begin with http:// or https://")
    prefix = found.path.rstrip("/")
    if HOST.fullmatch(found.netloc) is None or PREFIX.fullmatch(prefix) is None or found.query or found.fragment:
        raise ValueError(
            f"--public-url is {url[:80]!r}; write scheme, host and path, as in https://example.org/pictures"
        )
    return PublicAddress(found.scheme, found.netloc, prefix)


def is_trusted(client: str | None, proxies: Sequence[Network]) -> bool:
    """Return whether the other end of a connection is one of the proxies.

    Args:
        client: its address; None for a Unix socket.
    """
    try:
        address = ipaddress.ip_address(client or "")
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped  # a socket for both versions shows IPv4 clients this way
    return any(address in network for network in proxies)


def forwarded_address(values_of: Callable[[str], list[str]]) -> PublicAddress:
    """Read what a trusted proxy says of a request: X-Forwarded-Proto, -Host and -Prefix, or else RFC 7239's Forwarded.

    Of several values the last counts, which the nearest proxy wrote. Values that are not well-formed are ignored.

    Args:
        values_of: returns the values of a header by its lower-case name.
    """
    pairs = {name.lower(): quoted or plain for name, quoted, plain in _PAIR.findall(_last(values_of("forwarded")))}
    scheme = (_last(values_of("x-forwarded-proto")) or pairs.get("proto", "")).lower()
    host = _last(values_of("x-forwarded-host")) or pairs.get("host", "")
    prefix = _last(values_of("x-forwarded-prefix")).rstrip("/")
    return PublicAddress(
        scheme if scheme in ("http", "https") else None,
        host if HOST.fullmatch(host) else None,
        prefix if PREFIX.fullmatch(prefix) else "",
    )


def _last(values: list[str]) -> str:
    return values[-1].split(",")[-1].strip() if values else ""
