"""Checks resources against the classes of KServe's and Kubernetes' packages: `kserve_schema.py FILE ...`.

Prints a JSON list of what is wrong. It runs in `build/kserve`, because KServe's package wants older packages than the
project.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes.client
import yaml
from kserve import models
from pydantic import ValidationError

SCALARS = {"str": str, "int": int, "bool": bool, "object": object}


def problems(value: Any, kind: str, where: str) -> Iterator[str]:
    """Yield what is wrong with a value of a type as the generated classes name it, such as `list[V1Container]`."""
    if (inner := re.fullmatch(r"list\[(.+)\]", kind)) and isinstance(value, list):
        for number, each in enumerate(value):
            yield from problems(each, inner[1], f"{where}[{number}]")
    elif (inner := re.fullmatch(r"dict\(str, (.+)\)", kind)) and isinstance(value, dict):
        for name, each in value.items():
            yield from problems(each, inner[1], f"{where}.{name}")
    elif kind in SCALARS or not isinstance(value, dict):
        if not isinstance(value, SCALARS.get(kind, dict)):
            yield f"{where} is {value!r}, no {kind}"
    else:
        yield from object_problems(value, kind, where)


def object_problems(value: dict[str, Any], kind: str, where: str) -> Iterator[str]:
    if (cls := getattr(models, kind, None)) is None:
        yield from kubernetes_problems(value, kind, where)
        return
    names = {shown: name for name, shown in cls.attribute_map.items()}
    for shown, each in value.items():
        if shown not in names:
            yield f"{where}.{shown} is unknown"
        else:
            yield from problems(each, cls.openapi_types[names[shown]], f"{where}.{shown}")
    try:
        cls(**{names[shown]: each for shown, each in value.items() if shown in names})
    except ValueError as error:
        yield f"{where}: {error}"


def kubernetes_problems(value: dict[str, Any], kind: str, where: str) -> Iterator[str]:
    try:
        getattr(kubernetes.client, kind).model_validate(value, extra="forbid")
    except ValidationError as error:
        for each in error.errors():
            yield f"{where}.{'.'.join(map(str, each['loc']))}: {each['msg']}"


def check(file: Path) -> Iterator[str]:
    resource = yaml.safe_load(file.read_text())
    group, _, version = resource["apiVersion"].partition("/")
    if group != "serving.kserve.io":
        yield f"{file.name}: the API is {group}"
    yield from problems(resource, f"{version[0].upper()}{version[1:]}{resource['kind']}", file.name)


if __name__ == "__main__":
    print(json.dumps([found for file in sys.argv[1:] for found in check(Path(file))]))
