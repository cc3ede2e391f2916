"""Makes `.whl/`: the wheels that `.ci/cuda` installs on a GPU machine without a network, some 4 MiB.

    python .ci/gpu_wheels.py [PACKAGE ...]

They are what the tests and `examples/research/gpu.py` need beside torch, transformers, peft and pytest, for Python 3.12
and CUDA 13. bitsandbytes' wheel has a library for every CUDA, ROCm and XPU; only the one for `CUDA` and the CPU's are
kept, which takes it from 41 MiB to 3.4.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".whl"
PYTHON, CUDA = "3.12", "130"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
PACKAGES = ["bitsandbytes==0.50.2", "pytorch-optimizer==4.1.0", "gguf==0.19.0"]
OTHERS = re.compile(rf"libbitsandbytes_(cuda(?!{CUDA}\.)|rocm|xpu)")


def download(packages: list[str], folder: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, "-d", folder, *packages], check=True)


def reduce(wheel: Path, target: Path) -> None:
    """Copies a wheel without the files that `OTHERS` finds, and without their lines in its RECORD."""
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for info in old.infolist():
            if OTHERS.search(info.filename):
                continue
            data = old.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                data = b"".join(line for line in data.splitlines(True) if not OTHERS.search(line.decode()))
            new.writestr(info, data, zipfile.ZIP_DEFLATED)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for former in FOLDER.glob("*.whl"):
        former.unlink()
    with tempfile.TemporaryDirectory() as folder:
        download([*PACKAGES, *sys.argv[1:]], Path(folder))
        for wheel in sorted(Path(folder).glob("*.whl")):
            reduce(wheel, FOLDER / wheel.name)
            print(f"{(FOLDER / wheel.name).stat().st_size / 2**20:6.2f} MiB  {wheel.name}")


if __name__ == "__main__":
    main()
