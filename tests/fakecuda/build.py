"""Builds `device.cpp`, by a C++20 compiler and torch's headers: `python tests/fakecuda/build.py LIBRARY`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")  # does not import it
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def obstacle() -> str | None:
    """Why it can't be built here."""
    if sys.platform != "linux":
        return "it is built on Linux alone"
    if compiler() is None:
        return "there is no C++ compiler (g++, or another that $CXX names)"
    if not (torch_folder() / "include" / "ATen" / "ops").is_dir():
        return "torch has no C++ headers"
    return None


def build(library: Path) -> None:
    torch = torch_folder()
    options = ["-std=c++20", "-O0", "-w", "-fPIC", "-shared", f"-I{torch / 'include'}"]
    link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    subprocess.run([str(compiler()), *options, str(SOURCE), "-o", str(library), *link], check=True)


if __name__ == "__main__":
    sys.exit(obstacle() or build(Path(sys.argv[1])))
