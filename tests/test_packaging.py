"""What a user installs: the wheel of this checkout holds every module, the marker of types, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
import flatlora
assert pathlib.Path(flatlora.__file__).is_relative_to(sys.argv[1]), flatlora.__file__
for module in pkgutil.walk_packages(flatlora.__path__, "flatlora."):
    importlib.import_module(module.name)
    print(module.name)
"""


@pytest.mark.slow
def test_the_wheel_is_the_whole_library_and_nothing_else(tmp_path):
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    # A copy, so that a build folder left in the checkout by an earlier build cannot add to the wheel or stay behind.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.iterdir()

    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flatlora").rglob("*.py")} | {"flatlora/py.typed"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files

    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(target)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files - {"flatlora/py.typed"}
    }
    assert {"flatlora", *result.stdout.split()} == modules
