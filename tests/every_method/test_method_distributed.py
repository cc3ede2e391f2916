"""Every method in two processes: DDP and FSDP2 train as one process does on the whole batch."""

from __future__ import annotations

import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from ddp_exit import leave_together
from ecosystem import difference
from methods import METHODS, adapted, base_bits, batch, every_method, logits, sgd, weights
from torch.nn.parallel import DistributedDataParallel

RANKS = 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


def run(model, optimizer, rank=None):
    """Trains on this rank's share of every batch, or on all of it."""
    for i in range(3):
        whole = batch(i, 2 * RANKS)
        part = whole if rank is None else {key: value.chunk(RANKS)[rank] for key, value in whole.items()}
        model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def full(values):
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in values.items()}


def report(model):
    """What is trained, what is not, and what a pass that trains and one that does not make of the model."""
    noisy = logits(model.train())
    with torch.no_grad():
        clean = logits(model.eval())
    return {"weights": full(weights(model)), "base": full(base_bits(model)), "noisy": noisy, "clean": clean}


def ddp(method, rank):
    model = adapted(method)
    torch.manual_seed(100 + rank)  # every rank's own, as loaders and dropout want it
    parallel = []
    optimizer = method.start(model, sgd, wrap=lambda whole: parallel.append(DistributedDataParallel(whole)))
    run(*parallel, optimizer, rank)
    return report(model)


def fsdp(method, rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))

    def shard(model):
        for module in list(model.modules()):
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)

    model = adapted(method)
    torch.manual_seed(100 + rank)
    optimizer = method.start(model, sgd, wrap=shard)
    held = {type(p).__name__ for group in optimizer.param_groups for p in group["params"]}
    run(model, optimizer, rank)
    return {**report(model), "held": sorted(held)}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    found = {}
    for method in METHODS:
        for parallel in (ddp, fsdp):
            try:
                found[f"{parallel.__name__} {method.name}"] = parallel(method, rank)
            except Exception:  # of one case; the others are still told of
                found[f"{parallel.__name__} {method.name}"] = {"error": traceback.format_exc()}
    torch.save(found, f"{folder}/{rank}.pt")
    leave_together()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank reports of each method."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


SEVERAL = [method for method in METHODS if not method.one_process]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@every_method(among=SEVERAL)
def test_two_processes_train_as_one_does_on_the_whole_batch(ranks, parallel, method):
    first, second = (found[f"{parallel} {method.name}"] for found in ranks)
    assert "error" not in first, first["error"]
    assert difference(first, second) is None  # weights, perturbation and all, to the bit
    assert first.pop("held", ["DTensor"]) == ["DTensor"]

    model = adapted(method)
    start = weights(model), base_bits(model)
    optimizer = method.start(model, sgd)
    run(model, optimizer)
    alone = report(model)
    assert difference(start[0], alone["weights"]) is not None
    assert difference(start[1], {name: first["base"][name] for name in start[1]}) is None
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    if method.perturbs:
        assert (first["noisy"] - first["clean"]).abs().max() > 1e-3


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@every_method(among=[method for method in METHODS if method.one_process])
def test_a_method_of_one_process_says_so(ranks, parallel, method):
    error = ranks[1][f"{parallel} {method.name}"]["error"].splitlines()[-1]
    assert error.startswith("RuntimeError") and "one of 2" in error
