"""`tdm-keys`: makes, lists and removes API keys."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from serving.fronts.access import APIKey, draw_key, hash_key, load_keys, save_keys

USAGE_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Change or show a key file. Returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        keys = load_keys(given.file) if given.file.exists() or given.command != "add" else []
        {"add": _add, "list": _list, "remove": _remove}[given.command](given, keys)
    except (ValueError, OSError) as error:
        print(f"tdm-keys: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdm-keys", description="API keys for `tdm-serve --api-keys FILE`.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a key and print it once; only its hash is kept")
    remove = commands.add_parser("remove", help="remove a key; running servers follow within a second")
    listing = commands.add_parser("list", help="list names and quotas")
    for command in (add, remove, listing):
        command.add_argument("file", type=Path)
    for command in (add, remove):
        command.add_argument("name", help="name of the key's user")
    add.add_argument("--requests-per-minute", type=float, metavar="N", help="unlimited by default")
    add.add_argument(
        "--cost-per-minute",
        type=float,
        metavar="N",
        help="megapixel-steps: pictures x width x height x frames x steps / 10^6; unlimited by default",
    )
    return parser


def _add(given: argparse.Namespace, keys: list[APIKey]) -> None:
    if any(key.name == given.name for key in keys):
        raise ValueError(f"{given.file} has a key {given.name!r} already; remove it first, or choose another name")
    key = draw_key()
    added = APIKey(given.name, hash_key(key), given.requests_per_minute, given.cost_per_minute)
    save_keys(given.file, [*keys, added])
    print(key)


def _list(given: argparse.Namespace, keys: list[APIKey]) -> None:
    for key in keys:
        requests, cost = key.requests_per_minute, key.cost_per_minute
        quotas = [f"{requests:g} requests a minute"] if requests else []
        quotas += [f"{cost:g} megapixel-steps a minute"] if cost else []
        print(f"{key.name}\t{', '.join(quotas) or 'no quota'}")


def _remove(given: argparse.Namespace, keys: list[APIKey]) -> None:
    kept = [key for key in keys if key.name != given.name]
    if len(kept) == len(keys):
        names = ", ".join(key.name for key in keys) or "none"
        raise ValueError(f"{given.file} has no key {given.name!r}; it has {names}")
    save_keys(given.file, kept)


if __name__ == "__main__":
    sys.exit(main())
