"""Every method in two processes: DDP and FSDP2 train as one process does on the whole batch."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import difference, full, sgd, shard
from methods import (
    KEEPS_STATE,
    METHODS,
    Method,
    adapted,
    base_bits,
    every_method,
    logits,
    lora,
    lorasam,
    train_share,
    weights,
)
from processes import on_ranks
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from flatlora import CheckpointState
from flatlora.metrics import read_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

RISEN = Method("LoRASAM by its rise", lora, functools.partial(lorasam, rise=0.01))  # ρ is chosen from all ranks' losses
ALL = [*METHODS, RISEN]


def report(model):
    """What is trained, what is not, and what a pass that trains and one that does not make of the model."""
    noisy = logits(model.train())
    with torch.no_grad():
        clean = logits(model.eval())
    return {"weights": full(weights(model)), "base": full(base_bits(model)), "noisy": noisy, "clean": clean}


def ddp(method, rank, folder):
    model = adapted(method)
    torch.manual_seed(100 + rank)  # every rank's own, as loaders and dropout want it
    parallel = []
    optimizer = method.start(model, sgd, wrap=lambda whole: parallel.append(DistributedDataParallel(whole)))
    train_share(*parallel, optimizer, rank)
    metrics = {"own": read_metrics(optimizer), "mean": read_metrics(optimizer, over_ranks=True)}
    return {**report(model), "metrics": metrics}


def fsdp(method, rank, folder):
    model = adapted(method)
    torch.manual_seed(100 + rank)
    optimizer = method.start(model, sgd, wrap=shard)
    held = {type(p).__name__ for group in optimizer.param_groups for p in group["params"]}
    train_share(model, optimizer, rank)
    found = {**report(model), "held": sorted(held)}
    get_optimizer_state_dict(model, optimizer)  # after an evaluation, which leaves FSDP2's root gathered
    keeps = method in KEEPS_STATE or method is RISEN
    return {**found, "losses": resumed(method, model, optimizer, folder) if keeps else None}


def resumed(method, model, optimizer, folder):
    """The losses of further steps, and those after all that matters went through a checkpoint into new objects."""
    folder = f"{folder}/{method.name}"
    dcp.async_save(states(model, optimizer), checkpoint_id=folder).result()
    went_on = train_share(model.train(), optimizer, steps=range(3, 5))
    other = adapted(method, seed=1)
    again = method.start(other, sgd, seed=8, wrap=shard)
    state = states(other, again)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    return went_on, train_share(other, again, steps=range(3, 5))


def states(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": CheckpointState(model, optimizer)}


def cases():
    both = itertools.product((ddp, fsdp), ALL)
    return {f"{parallel.__name__} {method.name}": functools.partial(parallel, method) for parallel, method in both}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank reports of each method."""
    return on_ranks(cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@every_method(among=ALL)
def test_two_processes_train_as_one_does_on_the_whole_batch(ranks, parallel, method, record_property):
    first, second = (dict(found[f"{parallel} {method.name}"]) for found in ranks)
    if parallel == "fsdp" and not method.sharded:
        assert "RuntimeError: BilevelOptimizer can't train a sharded model" in first["error"]
        record_property("refused", "by name")
        return
    assert "error" not in first, first["error"]
    for found in (first, second):
        found.pop("losses", None)
        found.pop("metrics", None)
    assert difference(first, second) is None  # weights, perturbation and all, to the bit
    assert first.pop("held", ["DTensor"]) == ["DTensor"]

    model = adapted(method)
    start = weights(model), base_bits(model)
    optimizer = method.start(model, sgd)
    train_share(model, optimizer)
    alone = report(model)
    assert difference(start[0], alone["weights"]) is not None
    assert difference(start[1], {name: first["base"][name] for name in start[1]}) is None
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    if method.perturbs:
        assert (first["noisy"] - first["clean"]).abs().max() > 1e-3


@every_method()
def test_what_is_logged_is_the_mean_over_ranks(ranks, method):
    first, second = (found[f"ddp {method.name}"]["metrics"] for found in ranks)
    assert first["mean"] == second["mean"]
    mean = {name: (value + second["own"][name]) / 2 for name, value in first["own"].items()}
    assert first["mean"] == pytest.approx(mean, rel=1e-6, nan_ok=True)
    if "loss_rise" in mean:  # each rank's is of its own texts
        assert first["own"]["loss_rise"] != second["own"]["loss_rise"]


@every_method(among=[*(method for method in KEEPS_STATE if method.sharded), RISEN])
def test_a_sharded_run_goes_on_in_new_objects_after_an_evaluation(ranks, method):
    for found in ranks:
        went_on, again = found[f"fsdp {method.name}"]["losses"]
        assert went_on == again and len(went_on) == 2
