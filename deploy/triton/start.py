"""Start the tritonserver of the nvidia-pytriton package on a model repository, without a container.

    python deploy/triton/start.py [--model-repository DIR] [ARGUMENT ...]

The environment that runs this file holds the package, and its Python runs the models. Further arguments go to
tritonserver; `--http-port`, `--grpc-port` and `--metrics-port` are its usual 8000, 8001 and 8002.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).parents[2] / "model_repository"
LOCAL = "127.0.0.1"


def main(arguments: list[str] | None = None) -> int:
    """Replace this process with tritonserver. Returns only if that is impossible."""
    parser = argparse.ArgumentParser(prog="start.py", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model-repository", type=Path, default=REPOSITORY, help="(%(default)s)")
    parser.add_argument("--address", default=LOCAL, help="address of all three ports (%(default)s)")
    given, others = parser.parse_known_args(arguments)
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        print(f"start.py: {sys.executable} has no nvidia-pytriton; start it with `make triton`", file=sys.stderr)
        return 2
    triton = Path(package.origin).parent / "tritonserver"
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={given.model_repository.resolve()}",
        f"--backend-directory={python_backend(triton)}",
        *(f"--{protocol}-address={given.address}" for protocol in ("http", "grpc", "metrics")),
        "--allow-gpu-metrics=false",
        *others,
    ]
    os.execve(command[0], command, environment(triton))


def python_backend(triton: Path) -> Path:
    """Lay out the Python backend with the stub of this interpreter's version. Returns the backend directory."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise SystemExit(f"start.py: nvidia-pytriton has no stub for Python {version}; use Python 3.11")
    backends = Path(sys.prefix) / "backends"
    (backends / "python").mkdir(parents=True, exist_ok=True)
    for file in (*(triton / "backends" / "python").iterdir(), stub):
        if file.is_file():
            partial = backends / "python" / f"{file.name}.{os.getpid()}"
            shutil.copy2(file, partial)
            partial.replace(backends / "python" / file.name)  # another server may be running the old one
    return backends


def environment(triton: Path) -> dict[str, str]:
    """Return the server's environment: its libraries, and this interpreter for the models."""
    libraries = [triton.parents[1] / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    return os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
    }


if __name__ == "__main__":
    sys.exit(main())
