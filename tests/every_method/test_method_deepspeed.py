"""Every method under DeepSpeed, in two processes: without sharding as one process on the whole batch, else refused."""

from __future__ import annotations

import functools
import importlib.util
import os
import re

import pytest
import torch
import torch.distributed as dist
from helpers import RANKS, difference, sgd
from methods import METHODS, Method, adapted, batch, every_method, ggpo, lora, weights
from processes import on_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]
UNGUIDED = Method("β = 0", lora, ggpo(beta=0.0))


def train(model, optimizer, *, engine=None, rank=None):
    for i in range(3):
        whole = batch(i, 2 * RANKS)
        if engine is None:
            model(**whole).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(engine(**{key: value.chunk(RANKS)[rank] for key, value in whole.items()}).loss)
            engine.step()
    return weights(model)


def under_deepspeed(method, stage, mode, rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    model = adapted(method)
    optimizer = method.start(model, sgd)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **({} if mode is None else {mode: {"enabled": True}}),
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return {"weights": train(model, optimizer, engine=engine, rank=rank)}


# One stage with every method, and the others with each kind of optimizer: one that reads gradients, BiDoRA's two, none.
KINDS = [method for method in METHODS if method.name in ("GGPO gaussian", "BiDoRA", "GraLoRA")]
SHARDED = [(2, method) for method in METHODS] + [(stage, method) for stage in (1, 3) for method in KINDS]
REFUSED = [pytest.param(*case, id=f"{case[0]}-{case[1].name}") for case in SHARDED if case[1].name != "GraLoRA"]
IN_BF16 = [method for method in METHODS if method.name in ("GGPO gaussian", "LoRASAM", "Bi-LoRA")]


def cases():
    every = [*((0, None, method) for method in METHODS), *((stage, None, method) for stage, method in SHARDED)]
    every += [(2, None, UNGUIDED), *((0, "bf16", method) for method in IN_BF16)]
    return {f"{mode or stage} {m.name}": functools.partial(under_deepspeed, m, stage, mode) for stage, mode, m in every}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(cases, tmp_path_factory.mktemp("ranks"))


@every_method()
def test_two_processes_train_as_one_does_on_the_whole_batch(ranks, method):
    first, second = (found[f"0 {method.name}"] for found in ranks)
    assert "error" not in first, first["error"]
    assert difference(first, second) is None
    model = adapted(method)
    alone = train(model, method.start(model, sgd))
    torch.testing.assert_close(first["weights"], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stage", "method"), REFUSED)
def test_what_reads_gradients_of_sharded_ones_is_refused_by_name(ranks, stage, method):
    for found in ranks:
        error = found[f"{stage} {method.name}"]["error"]
        assert re.search("Error: .*(no longer in the groups|is empty).*ZeRO", error), error


@every_method(among=IN_BF16)
def test_under_bf16_only_what_is_free_of_the_gradients_scale_goes_on(ranks, method):
    for found in ranks:
        error = found[f"bf16 {method.name}"].get("error", "")
        assert ("RuntimeError: the adapters' parameters are no longer" in error) == (method.name != "LoRASAM"), error


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gralora_needs_no_optimizer_of_ours_and_is_sharded(ranks, stage):
    for found in ranks:
        assert "error" not in found[f"{stage} GraLoRA"]


def test_noise_without_a_gradient_term_needs_no_gradients(ranks):
    """Under ZeRO stage 2, as in a process of its own on the whole batch."""
    first, second = (found["2 β = 0"] for found in ranks)
    assert "error" not in first, first["error"]
    assert difference(first, second) is None
    model = adapted(UNGUIDED)
    torch.testing.assert_close(first["weights"], train(model, UNGUIDED.start(model, sgd)), rtol=1e-4, atol=1e-5)
