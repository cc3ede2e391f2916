"""Two processes: the ways of sharding that are refused, and FSDP2's and ZeRO's options."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from helpers import adamw, difference, full, sgd, shard
from methods import METHODS, adapted, logits, train_share, weights
from processes import on_ranks
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from flatlora import attach_auxiliary

NAMED = {method.name: method for method in METHODS}
TRIED = ["GGPO gaussian", "GGPO low_rank", "LoRASAM", "Bi-LoRA"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


def trained_alone(name, base=sgd):
    model = adapted(NAMED[name])
    train_share(model, NAMED[name].start(model, base))
    return weights(model)


def mixed_precision(name, rank, folder):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = adapted(NAMED[name])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    optimizer = NAMED[name].start(model, sgd, wrap=lambda model: shard(model, mp_policy=policy))
    train_share(model, optimizer, rank)
    assert logits(model).dtype == torch.bfloat16
    return full(weights(model))


def offload(name, rank, folder):
    from torch.distributed.fsdp import CPUOffloadPolicy

    model = adapted(NAMED[name])
    policy = CPUOffloadPolicy(pin_memory=False)
    optimizer = NAMED[name].start(model, sgd, wrap=lambda model: shard(model, offload_policy=policy))
    train_share(model, optimizer, rank)
    return full(weights(model))


def zero_base(params):
    return ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def zero(name, rank, folder):
    model = adapted(NAMED[name])
    parallel = []
    optimizer = NAMED[name].start(model, zero_base, wrap=lambda whole: parallel.append(DistributedDataParallel(whole)))
    train_share(*parallel, optimizer, rank)
    return weights(model)


def attached_after(rank, folder):
    model = adapted(NAMED["Bi-LoRA"])
    shard(model)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="before it") as error:
        attach_auxiliary(model)
    assert names == [name for name, _ in model.named_modules()]
    return str(error.value)


def fsdp1(name, early, rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, method = adapted(NAMED[name]), NAMED[name]
    method.before_wrapping(model, 7)
    optimizer = method.build(model, sgd, 7) if early else None
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="FSDP1") as error:
        optimizer = method.build(sharded, sgd, 7) if optimizer is None else optimizer
        train_share(sharded, optimizer, rank)
    return str(error.value)


def cases():
    ways = [mixed_precision, offload, zero]
    found = {f"{way.__name__} {name}": functools.partial(way, name) for way in ways for name in TRIED}
    found |= {
        f"fsdp1 {early} {name}": functools.partial(fsdp1, name, early) for early in (False, True) for name in TRIED[::3]
    }
    return {**found, "attached after": attached_after}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.parametrize(
    ("way", "tolerance", "base"), [("mixed_precision", 5e-4, sgd), ("offload", 1e-5, sgd), ("zero", 1e-4, adamw)]
)
def test_it_is_one_process_on_the_whole_batch(ranks, way, tolerance, base, name):
    first, second = (found[f"{way} {name}"] for found in ranks)
    assert "error" not in first, first["error"]
    assert difference(first, second) is None
    alone = trained_alone(name, base)
    torch.testing.assert_close(first, alone, rtol=0, atol=tolerance)
    moved = max((alone[key] - value).abs().max() for key, value in weights(adapted(NAMED[name])).items())
    assert moved > 4 * tolerance


@pytest.mark.parametrize("case", ["attached after", *(case for case in cases() if case.startswith("fsdp1"))])
def test_what_cannot_be_is_refused_by_name(ranks, case):
    assert all("fully_shard" in found[case] for found in ranks), ranks[0][case]
