"""An environment for packages that the peers need. BentoML wants older versions than Ray brought along."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import requires
from pathlib import Path

DEFAULT_FOLDER = Path("build/peers")


def interpreter_in(folder: Path) -> str:
    """Return the interpreter of the environment in a folder, which is made where it is missing.

    It has the packages of the extra `peers`, in front of everything that this interpreter has.

    Raises:
        OSError: the folder cannot be written, or pip cannot install the packages.
    """
    python, done = folder.absolute() / "bin" / "python", folder / "installed"
    if done.is_file():
        return str(python)
    venv.create(folder, with_pip=True, clear=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours = folder / "lib" / version / "site-packages" / "tdm_serve_peers.pth"
    ours.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    wanted = [line.partition(";")[0] for line in requires("tdm-serve") or () if line.endswith('extra == "peers"')]
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    ended = subprocess.run(install, capture_output=True, text=True)
    if ended.returncode:
        raise OSError(f"{' '.join(wanted)} cannot be installed into {folder}: {ended.stderr.strip().splitlines()[-1]}")
    done.touch()
    return str(python)
