"""URLs in answers behind a reverse proxy: what trusted ones say, what others say, and --public-url."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from serving.command.arguments import parse_arguments
from serving.config import ServerConfig
from serving.web.proxied import PublicAddresses, own_path
from tests.serving.conftest import RunningServer
from tests.serving.web.reverse_proxy import PREFIX, reverse_proxy

PROXY = "10.1.2.3"
STATED = {"x-forwarded-proto": "https", "x-forwarded-host": "art.example:8443", "x-forwarded-prefix": "/pictures/"}


def seen(
    headers: dict[str, str] | list[tuple[str, str]], client: str = PROXY, path: str = "/where", **config: Any
) -> str:
    """Return the base URL and path that an application sees of a request to http://inner from a client."""
    app = FastAPI()

    @app.get("/where")
    async def where(request: Request) -> str:
        return f"{request.base_url} {own_path(request.scope)}"

    app.add_middleware(
        PublicAddresses, config=ServerConfig(trusted_proxies=(ip_network("10.0.0.0/8"), ip_network("::1")), **config)
    )

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(client, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://inner") as asking:
            return await asking.get(path, headers=headers)

    answer = asyncio.run(ask())
    return str(answer.json()) if answer.status_code == 200 else answer.headers["location"]


@pytest.mark.parametrize("client", [PROXY, "::1", "::ffff:10.9.9.9"])
def test_a_trusted_proxy_decides_scheme_host_and_prefix(client: str) -> None:
    assert seen(STATED, client) == "https://art.example:8443/pictures/ /where"


@pytest.mark.parametrize("client", ["192.0.2.1", "::2", "::ffff:192.0.2.1", "unix"])
def test_headers_of_others_are_ignored(client: str) -> None:
    assert seen(STATED | {"forwarded": "proto=https;host=evil.example"}, client) == "http://inner/ /where"


def test_a_redirect_keeps_scheme_host_and_prefix() -> None:
    assert seen(STATED, path="/where/") == "https://art.example:8443/pictures/where"


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        ([("x-forwarded-host", "evil.example, art.example")], "http://art.example"),
        ([("x-forwarded-host", "evil.example"), ("x-forwarded-host", "art.example")], "http://art.example"),
        ([("forwarded", 'for=192.0.2.1;host=evil.example, for="[::2]:80";Proto=HTTPS;host="art.example:1"')],
         "https://art.example:1"),
        ([("forwarded", "proto=https;host=a.example"), ("x-forwarded-host", "b.example")], "https://b.example"),
        ([("x-forwarded-host", "[2001:db8::1]:80")], "http://[2001:db8::1]:80"),
    ],
)  # fmt: skip
def test_the_last_value_counts_and_forwarded_is_read_too(headers: list[tuple[str, str]], base: str) -> None:
    assert seen(headers) == f"{base}/ /where"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-forwarded-proto", "javascript"),
        ("x-forwarded-host", "evil.example/path"),
        ("x-forwarded-host", 'a"b'),
        ("x-forwarded-host", ""),
        ("x-forwarded-prefix", "//evil.example"),
        ("x-forwarded-prefix", "/../up"),
        ("x-forwarded-prefix", '/"><script>'),
        ("x-forwarded-prefix", "no-slash"),
        ("forwarded", 'host="a b"'),
    ],
)
def test_values_that_are_not_well_formed_are_ignored(name: str, value: str) -> None:
    assert seen({name: value}) == "http://inner/ /where"


def test_a_public_url_decides_alone(tmp_path: Path) -> None:
    for headers in (STATED, {}):
        assert seen(headers, public_url="https://example.org/gallery") == "https://example.org/gallery/ /where"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trusted-proxies", "10.0.0.1,nginx"], "'nginx' is neither an address nor a network such as 10.0.0.0/8"),
        (["--trusted-proxies", "10.0.0.1/8"], "has host bits set"),
        (["--trusted-proxies", ""], "'' is neither"),
        (["--public-url", "ftp://example.org"], "it must begin with http:// or https://"),
        (["--public-url", "https://example.org/a?b"], "write scheme, host and path"),
        (["--public-url", "https://user@example.org"], "write scheme, host and path"),
    ],
)
def test_bad_values_are_refused_at_the_start(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_addresses_and_networks_are_read() -> None:
    found = parse_arguments(["--trusted-proxies", "127.0.0.1, 10.0.0.0/8,fd00::/8"]).trusted_proxies
    assert [str(network) for network in found] == ["127.0.0.1/32", "10.0.0.0/8", "fd00::/8"]


# -- behind a real proxy ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Proxied:
    """A server behind a proxy that claims HTTPS."""

    url: str
    """URL of the server behind the proxy, over http."""

    @property
    def claimed(self) -> str:
        return self.url.replace("http://", "https://")


@pytest.fixture(scope="module")
def proxied(server: RunningServer) -> Iterator[Proxied]:
    with reverse_proxy(server.url, scheme="https") as url:
        yield Proxied(url)


def test_urls_of_files_lead_through_the_proxy(proxied: Proxied) -> None:
    body = {"prompt": "a cat", "num_inference_steps": 1, "response_format": "url"}
    made = httpx.post(f"{proxied.url}/v1/images/generations", json=body, timeout=60).json()["data"][0]
    assert made["url"].startswith(f"{proxied.claimed}/v1/files/")
    assert httpx.get(made["url"].replace("https://", "http://")).headers["content-type"] == "image/png"


def test_redirects_schema_page_and_errors_know_the_prefix(proxied: Proxied) -> None:
    assert httpx.get(f"{proxied.url}/v1/models/").headers["location"] == f"{proxied.claimed}/v1/models"
    assert httpx.get(f"{proxied.url}/openapi.json").json()["servers"] == [{"url": PREFIX}]
    assert f'src="{PREFIX}/playground/static/playground.js"' in httpx.get(proxied.url).text
    script = httpx.get(f"{proxied.url}/playground/static/server.js")
    assert script.status_code == 200
    assert f"{PREFIX}/nowhere" in httpx.get(f"{proxied.url}/nowhere").json()["error"]["message"]
    assert "error" in httpx.get(f"{proxied.url}/v2/nowhere").json()


def test_metrics_name_the_route_without_the_prefix(proxied: Proxied) -> None:
    httpx.get(f"{proxied.url}/playground/static/page.js")
    metrics = httpx.get(f"{proxied.url}/metrics").text
    assert PREFIX not in metrics
    assert 'route="/playground/static/{path}"' in metrics
