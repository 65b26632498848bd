"""Environments of their own for packages of other projects, which may want other versions than this project has.

Each is made from an extra of `pyproject.toml`:

| extra | for |
|---|---|
| `peers` | LitServe and BentoML, which wants older versions than Ray brought along |
| `peers-genai` | OpenVINO GenAI, which may bring along an OpenVINO of its own |
| `peers-sdcpp` | stable-diffusion.cpp, which is compiled for this CPU: minutes, with a C++ compiler and cmake |
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import requires
from pathlib import Path

FOLDER = Path("build")
"""Folder of the environments, each in a folder with the name of its extra."""
PEERS_EXTRA, GENAI_EXTRA, SDCPP_EXTRA = "peers", "peers-genai", "peers-sdcpp"
COMPILED = {SDCPP_EXTRA: {"CMAKE_ARGS": "-DGGML_LLAMAFILE=ON"}}
"""Extra that pip compiles -> environment variables for it. With these a picture takes half the time."""


def interpreter_of(extra: str) -> str:
    """Return the interpreter of an extra's environment in `FOLDER`, or this one without an extra.

    Raises:
        OSError: as of `interpreter_in`.
    """
    return sys.executable if not extra else interpreter_in(FOLDER / extra, extra)


def interpreter_in(folder: Path, extra: str = PEERS_EXTRA) -> str:
    """Return the interpreter of the environment in a folder, which is made where it is missing or has another extra.

    It has the packages of the extra, in front of everything that this interpreter has.

    Raises:
        OSError: the folder cannot be written, or pip cannot install the packages.
    """
    python, done = folder.absolute() / "bin" / "python", folder / "installed"
    wanted = [line.partition(";")[0] for line in requires("tdm-serve") or () if line.endswith(f'extra == "{extra}"')]
    if not wanted:
        raise OSError(f"the installed tdm-serve has no extra {extra!r}; install it again with `pip install -e .`")
    if done.is_file() and done.read_text(encoding="utf-8").split() == wanted:
        return str(python)
    print(f"installing {' '.join(wanted)} into {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours = folder / "lib" / version / "site-packages" / "tdm_serve_peers.pth"
    ours.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    install += ["--no-cache-dir"] if extra in COMPILED else []  # a build of other settings may lie there
    ended = subprocess.run(install, capture_output=True, text=True, env=os.environ | COMPILED.get(extra, {}))
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or ["pip printed nothing"]
        raise OSError(f"{' '.join(wanted)} cannot be installed into {folder}: {said[-1]}")
    done.write_text("\n".join(wanted), encoding="utf-8")
    return str(python)
