"""Shared set-up: one thread, as the machine may be shared, the same global random numbers, and the device of a test."""

import contextlib
import importlib.metadata
import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or CUDA's matmuls differ between streams

import models
import pytest
import torch
from compatibility import PACKAGES

from flatlora import GGPOOptimizer, OptimizerWrapper

torch.set_num_threads(1)

# What is run on a CUDA device too: the tests of these files take models and batches from where `models.DEVICE` says.
ON_DEVICES = {
    "test_method_laws",
    "test_method_lifetimes",
    "test_method_states",
    "test_method_bitsandbytes",
    "test_method_devices",
    "test_reference",
    "test_cuda",
    "test_accelerators",
}
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


def pytest_ignore_collect(collection_path, config):
    """`-m cuda` looks into no other files: they import packages that a machine with a GPU need not have."""
    other = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if config.option.markexpr == "cuda" and other and collection_path.stem not in ON_DEVICES:
        return True


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.split(".")[-1] in ON_DEVICES:
        metafunc.parametrize("device", ["cpu", CUDA], indirect=True)


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    """The kind of device that the test's models and batches are on."""
    kind = getattr(request, "param", "cpu")
    monkeypatch.setattr(models, "DEVICE", torch.device(kind))
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.allow_tf32  # by hand: what it is set on computes its attributes, which pytest 9.2 can't put back
    if kind == "cuda":  # results are compared to the bit
        matmul.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    yield torch.device(kind)
    torch.use_deterministic_algorithms(False)
    matmul.allow_tf32 = tf32


@pytest.fixture(autouse=True)
def _seed(device):
    torch.manual_seed(0)


@pytest.fixture
def said(caplog):
    """What this library has logged so far."""
    caplog.set_level(logging.WARNING, "flatlora")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "flatlora"]


WRAPPERS = {
    "wrapper": lambda base, model: OptimizerWrapper(base),
    "ggpo": lambda base, model: GGPOOptimizer(base, model, seed=7),
    "wrapper over ggpo": lambda base, model: OptimizerWrapper(GGPOOptimizer(base, model, seed=7)),
    "ggpo over wrapper": lambda base, model: GGPOOptimizer(OptimizerWrapper(base), model, seed=7),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    """Builds a wrapper of one kind over a base optimizer."""
    return WRAPPERS[request.param]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Versions into a junit report, where `compatibility.py` looks for them: into a test's properties, as pytest-xdist
    drops those of the whole run."""
    for package in PACKAGES if items else ():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            items[0].user_properties.append((package, importlib.metadata.version(package)))
