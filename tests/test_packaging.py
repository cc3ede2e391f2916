"""What a user installs: the archives of this checkout hold every module, the marker of types, and nothing else."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flatlora").rglob("*.py")} | {"flatlora/py.typed"}
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
IMPORT_ALL = """
import importlib.util, pathlib, pkgutil, sys
import flatlora
assert pathlib.Path(flatlora.__file__).is_relative_to(sys.prefix), flatlora.__file__
for module in pkgutil.walk_packages(flatlora.__path__, "flatlora."):
    if module.name != "flatlora.kernels.triton_draw" or importlib.util.find_spec("triton"):
        importlib.import_module(module.name)
    print(module.name)
"""


def run(*command, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(part) for part in command]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """What is built of this checkout, and what of the source archive that is."""
    folder = tmp_path_factory.mktemp("archives")
    # A copy, so that a build folder left in the checkout by an earlier build cannot add to the wheel or stay behind.
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=left_out)
    run(sys.executable, "-c", BUILD, "sdist", folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    for name, tree in {"wheel": source, "sdist": unpacked}.items():
        run(sys.executable, "-c", BUILD, "wheel", folder / name, cwd=tree)
    return {name: next((folder / name).glob("*.whl")) for name in ("wheel", "sdist")}


@pytest.mark.slow
def test_the_wheel_is_the_whole_library_and_nothing_else(wheels):
    """Of the source archive too, so it holds all that pip builds with."""
    contents = []
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as file:
            contents.append({name: file.read(name) for name in file.namelist()})
    assert contents[0] == contents[1]
    assert {name for name in contents[0] if ".dist-info/" not in name} == FILES


@pytest.mark.slow
def test_installed_in_a_fresh_environment_every_module_is_imported(wheels, tmp_path):
    run(sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    # It sees what this environment has, pip and setuptools too, so that nothing is fetched. Links to checkouts, which
    # stand in .pth files, are not followed from there.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "outer.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    run(*pip, "--ignore-installed", wheels["wheel"])
    files = FILES - {"flatlora/py.typed"}
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
    assert {"flatlora", *run(python, "-c", IMPORT_ALL, cwd=tmp_path).split()} == modules


@pytest.mark.slow
def test_the_api_pages_have_every_public_name(tmp_path):
    pytest.importorskip("pdoc")
    import flatlora

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(ROOT / ".ci" / "docs"), str(tmp_path)]
    result = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and not result.stderr, result.stderr[-3000:]
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    index = pages[tmp_path / "flatlora.html"]
    for name in [*flatlora.__all__, "hf", "lightning", "reference"]:
        assert f'href="flatlora/{name}.html"' in index
    for name in flatlora.__all__:
        assert f'<section id="{name}">' in pages[tmp_path / "flatlora" / f"{name}.html"]
    sam = pages[tmp_path / "flatlora" / "LoRASAMOptimizer.html"]
    assert "ε_t = ρ·P(G_{t−1})" in sam and 'id="LoRASAMOptimizer.for_model"' in sam
    for path, page in pages.items():
        page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
        for target, anchor in re.findall(r'<a[^>]* href="([^":#]*)#?([^":]*)"', page):
            other = (path.parent / target).resolve() if target else path
            assert other in pages and (not anchor or f'id="{anchor}"' in pages[other]), f"{path}: {target}#{anchor}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [("landscape", ""), ("GGPOOptimizer", "See arXiv:2502.14538.")])
def test_the_api_pages_need_a_docstring_and_a_methods_equation(name, text, tmp_path, monkeypatch):
    pytest.importorskip("pdoc")
    import flatlora

    monkeypatch.setattr(getattr(flatlora, name), "__doc__", text)
    monkeypatch.setattr(sys, "argv", ["pages.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"flatlora.{name}: the docstring is missing"):
        runpy.run_path(str(ROOT / ".ci" / "api" / "pages.py"))
