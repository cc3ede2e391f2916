"""What is run on a machine with a GPU, rehearsed without one: `.ci/cuda`, its wheels, `examples/research/gpu.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from processes import run_script

ROOT = Path(__file__).parent.parent


def loaded(path, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu():
    yield loaded("examples/research/gpu.py", "gpu_script")
    del sys.modules["gpu_script"]


def run(*command):
    """A command in the repository's root, where python3 is this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PATH": path}
    )


@pytest.mark.slow
def test_all_of_it_runs(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("pytorch_optimizer")
    file = tmp_path / "gpu.json"
    result = run_script(ROOT / "examples" / "research" / "gpu.py", "--device", "cpu", "--tiny", "--json", file)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["end"]["wrong or failed"] == found["end"]["skipped for want of time"] == []
    assert len(found["right"]) == 1 + 3 * 7  # the draws; kinds of base, methods
    costs = [part for name, part in found.items() if name.startswith("tiny")]
    assert len(costs) == 2
    for part in costs:
        assert {"PEFT LoRA", "PEFT LoRA, again", "GGPO gaussian", "Bi-LoRA", "LoRASAM", "GraLoRA"} <= part.keys()
        assert all(cost["ms"] > 0 and cost["kernels"] > 100 for cost in part.values())


def run_of(gpu, tmp_path, **args):
    given = {"seconds": 60, "device": "cpu", "tiny": True, "only": None, "json": tmp_path / "gpu.json"}
    return gpu.Run(gpu.argparse.Namespace(**{**given, **args}))


def test_a_part_that_fails_is_noted_and_the_others_are_run(gpu, tmp_path, monkeypatch):
    def fails(model, base):
        raise RuntimeError("no such device")

    monkeypatch.setitem(gpu.METHODS, "LoRASAM", (gpu.lora, fails))
    a_run = run_of(gpu, tmp_path)
    gpu.costs(a_run, gpu.Cell("tiny", 8, "fp32"), ["PEFT LoRA", "LoRASAM", "Bi-LoRA"])
    found = json.loads((tmp_path / "gpu.json").read_text())["tiny fp32, 8 tokens"]
    assert found["LoRASAM"] == {"failed": "RuntimeError: no such device"}
    assert {"PEFT LoRA", "Bi-LoRA"} <= found.keys()
    assert a_run.faults == ["tiny fp32, 8 tokens: LoRASAM"]


def test_times_are_kept_where_kernels_cannot_be_counted(gpu, tmp_path, monkeypatch):
    def kernels(step, ids):
        raise RuntimeError("no counters")

    monkeypatch.setattr(gpu, "kernels", kernels)
    a_run = run_of(gpu, tmp_path)
    gpu.costs(a_run, gpu.Cell("tiny", 8, "fp32"), ["PEFT LoRA"])
    found = json.loads((tmp_path / "gpu.json").read_text())["tiny fp32, 8 tokens"]["PEFT LoRA"]
    assert found["ms"] > 0 and found["kernels"] == "RuntimeError: no counters"
    assert a_run.faults[0] == "tiny fp32, 8 tokens: PEFT LoRA: kernels"


def test_a_wrong_result_is_a_fault(gpu, tmp_path, monkeypatch):
    a_run = run_of(gpu, tmp_path)
    assert max(gpu.one_layer(a_run, "PEFT LoRA", "fp32").values()) < 1e-5
    assert a_run.faults == []
    monkeypatch.setattr(gpu, "dense", lambda extra, m, n: torch.zeros(m, n, dtype=torch.float64))
    gpu.one_layer(a_run, "PEFT LoRA", "fp32")
    assert a_run.faults == ["right: fp32 PEFT LoRA"]


def test_parts_for_which_no_time_is_left_are_named(gpu, tmp_path):
    a_run = run_of(gpu, tmp_path, seconds=10, tiny=False, only=["7B", "right"])
    assert not a_run.wants("0.5B bf16", 5)
    assert a_run.wants("7B bf16", 5)
    assert not a_run.wants("right", 20)
    assert a_run.found["skipped"] == ["right"]


def test_waits_are_counted_with_where_they_are(gpu, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step(ids):
        assert modes == ["warn"]
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert gpu.waits(step, None) == {"waits": 1, "waits at": [f"test_gpu.py:{step.__code__.co_firstlineno + 2}"]}
    assert modes == ["warn", "default"]


def test_wheels_are_reduced_to_one_library(tmp_path):
    wheels = loaded(".ci/gpu_wheels.py", "gpu_wheels")
    del sys.modules["gpu_wheels"]
    libraries = ["cpu.so", "cuda118.so", "cuda130.so", "cuda1301.so", "rocm71.so", "xpu.so"]
    names = [*(f"bitsandbytes/libbitsandbytes_{name}" for name in libraries), "bitsandbytes/__init__.py"]
    record = "bitsandbytes-1.dist-info/RECORD"
    with zipfile.ZipFile(tmp_path / "old.whl", "w") as wheel:
        for name in names:
            wheel.writestr(name, name)
        wheel.writestr(record, "".join(f"{name},sha256=x,1\n" for name in names) + f"{record},,\n")
    wheels.reduce(tmp_path / "old.whl", tmp_path / "new.whl")
    kept = [names[0], names[2], names[-1]]
    with zipfile.ZipFile(tmp_path / "new.whl") as wheel:
        assert wheel.namelist() == [*kept, record]
        assert wheel.read(kept[1]).decode() == kept[1]
        assert [line.split(b",")[0].decode() for line in wheel.read(record).splitlines()] == [*kept, record]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_each_says_so_and_fails(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "torch finds no CUDA device" in capsys.readouterr().err
    if sys.platform != "win32":
        result = run("bash", ".ci/cuda")
        assert result.returncode == 1
        assert result.stderr == ".ci/cuda: torch finds no CUDA device\n"
