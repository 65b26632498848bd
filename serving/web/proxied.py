"""ASGI middleware that gives each request the address that its client used, where a proxy stands before the server."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.config import ServerConfig
from serving.public_address import PublicAddress, forwarded_address, is_trusted, parse_url


class PublicAddresses:
    """Changes scheme, host and path of requests. Everything behind it then makes the right URLs by itself."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self._proxies = config.trusted_proxies
        self._fixed = None if config.public_url is None else parse_url(config.public_url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = moved(scope, self._address(scope))
        await self.app(scope, receive, send)

    def _address(self, scope: Scope) -> PublicAddress:
        if self._fixed is not None:
            return self._fixed
        client = scope.get("client")
        if client is None or not is_trusted(client[0], self._proxies):
            return PublicAddress()
        return forwarded_address(Headers(scope=scope).getlist)


def moved(scope: Scope, address: PublicAddress) -> Scope:
    """Return the scope of a request at another address. As in ASGI, its path begins with its root path."""
    headers = scope["headers"]
    if address.host is not None:
        headers = [(b"host", address.host.encode()), *(header for header in headers if header[0] != b"host")]
    return {
        **scope,
        "scheme": address.scheme or scope.get("scheme", "http"),
        "headers": headers,
        "root_path": address.prefix + scope.get("root_path", ""),
        "path": address.prefix + scope["path"],
    }


def own_path(scope: Scope) -> str:
    """Return the path of a request as the server names it, without what a proxy put before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("app_root_path", scope.get("root_path", "")))
