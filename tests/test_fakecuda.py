"""Every method on a GPU that is none: the tests marked cuda, on the device that `fakecuda/device.cpp` adds to torch.

It finds mixtures of devices, reads on the host and wrong random streams. What it can't have: graphs of CUDA, inductor,
and the kernels of bitsandbytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakecuda.build import build, obstacle

TESTS = Path(__file__).parent
CHOSEN = [
    "test_cuda.py",
    "test_accelerators.py",
    "every_method/test_method_devices.py",
    "every_method/test_method_laws.py::test_all_micro_batches_of_a_step_see_the_same_model",
    "every_method/test_method_laws.py::test_recomputation_sees_the_same_perturbation",
    "every_method/test_method_laws.py::test_the_global_random_streams_are_as_without_the_method",
    "every_method/test_method_states.py::test_a_resumed_run_is_the_uninterrupted_one",
]
LACKING = ["compiled", "paged", "step_is_not_captured"]


@pytest.fixture
def library(tmp_path):
    if torch.version.cuda is not None or torch.version.hip is not None or torch.__version__ < "2.13":
        pytest.skip(f"device.cpp is for CPU builds of torch 2.13 and later; this is {torch.__version__}")
    if (reason := obstacle()) is not None:
        pytest.skip(reason)
    build(tmp_path / "libfakecuda.so")
    return tmp_path / "libfakecuda.so"


@pytest.mark.slow
def test_all_methods_pass_the_tests_for_a_gpu(library):
    options = ["-q", "-m", "cuda", "-k", " and ".join(f"not {word}" for word in LACKING), "-p", "no:cacheprovider"]
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "fakecuda.plugin", *options, *CHOSEN],
        cwd=TESTS,
        env={**os.environ, "FAKECUDA": str(library), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    print(result.stdout[-8000:], result.stderr[-2000:])
    assert result.returncode == 0
    assert int(result.stdout.rpartition(" passed")[0].split()[-1]) > 100
