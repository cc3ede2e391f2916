"""Two processes: DDP and FSDP2 train as one process does on the whole batch, under the same noise on every rank."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from helpers import RANKS, adamw, adapters, difference, frozen, full, ggpo, outputs, shard
from models import lora_mlp
from processes import on_ranks
from torch.nn.parallel import DistributedDataParallel

from flatlora.layers.base import FloatBase

STEPS = 5
CASES = ["ddp built before", "ddp no seed", "ddp accumulating"]
SHARDED = ["fsdp", "fsdp parameters replaced"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


def batch(i):
    """A batch for all ranks together."""
    return torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(i))


def ggpo_of(model, **kwargs):
    return ggpo(model, adamw(model), **{"sigma": 0.1, "beta": 1.0, **kwargs})


def run(model, optimizer, rank=None, accumulate=False):
    """Trains on this rank's share of every batch, or on all of it."""
    for i in range(STEPS):
        x, y = batch(i) if rank is None else batch(i).chunk(RANKS, 1)[rank]
        if accumulate:
            with model.no_sync():
                ((model(x[:2]) - y[:2]).square().mean() / 2).backward()
            ((model(x[2:]) - y[2:]).square().mean() / 2).backward()
        else:
            (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def report(model, optimizer):
    return {"adapters": adapters(model), "outputs": outputs(model), "row_std": optimizer.row_std()}


def ddp(case, rank, folder):
    model = lora_mlp()
    torch.manual_seed(100 + rank)  # every rank's own, as loaders and dropout want it
    if case == "ddp built before":
        optimizer = ggpo_of(model)
        parallel = DistributedDataParallel(model)
    else:
        parallel = DistributedDataParallel(model)
        optimizer = ggpo_of(parallel, **({"seed": None} if case == "ddp no seed" else {}))
    run(parallel, optimizer, rank, accumulate=case == "ddp accumulating")
    return report(model, optimizer)


def fsdp(case, rank, folder):
    model = lora_mlp()
    early = case == "fsdp parameters replaced"
    optimizer = ggpo_of(model) if early else None
    names = {id(p): name for name, p in model.named_parameters()}
    shard(model, model.base_model.model[0], model.base_model.model[2])
    if not early:
        optimizer = ggpo_of(model)
    else:  # as Accelerate does it
        sharded = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(p)]] for p in group["params"]]
    first = optimizer.row_std()
    run(model, optimizer, rank)
    row_std = optimizer.row_std()
    held = [type(p).__name__ for group in optimizer.param_groups for p in group["params"]]
    x = batch(99)[0]
    noisy = model(x).detach().clone()
    model.eval()
    clean = model(x).detach().clone()
    return {
        "first": first,
        "adapters": full(adapters(model)),
        "row_std": row_std,
        "base": full(frozen(model)),
        "noisy": noisy,
        "clean": clean,
        "held": held,
        "reads": reads(model.train(), optimizer, x),
    }


def reads(model, optimizer, x):
    """Whether the base weight was sharded, each time that it was read in the two micro-batches of a step."""
    found = []
    original = FloatBase.apply_rows

    def counted(self, *args):
        found.append(hasattr(self.module.weight, "full_tensor"))
        return original(self, *args)

    optimizer._source.update_every = 1  # so that the step comes in which all are read
    state = optimizer.method_state()
    optimizer.load_method_state({**state, "step": state["step"] + 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FloatBase, "apply_rows", counted)
        for _ in range(2):
            model(x).square().mean().backward()
    return found


def cases():
    return {case: functools.partial(ddp if case.startswith("ddp") else fsdp, case) for case in [*CASES, *SHARDED]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank reports of each case."""
    return on_ranks(cases, tmp_path_factory.mktemp("ranks"))


def same_on_both(ranks, case):
    first, second = (found[case] for found in ranks)
    assert "error" not in first, first["error"]
    assert difference(first, second) is None  # weights, noise and all, to the bit
    return first


def alone(**kwargs):
    model = lora_mlp()
    optimizer = ggpo_of(model, **kwargs)
    first = optimizer.row_std()
    run(model, optimizer)
    return model, optimizer, first


@pytest.mark.parametrize("case", CASES)
def test_ddp_is_one_process_on_the_whole_batch(ranks, case):
    found = same_on_both(ranks, case)
    # Without a seed it is the initial seed of rank 0.
    model, optimizer, _ = alone(**({"seed": 100} if case == "ddp no seed" else {}))
    assert difference(adapters(lora_mlp()), adapters(model)) is not None
    torch.testing.assert_close(found, report(model, optimizer), rtol=1e-4, atol=1e-5)


def test_without_a_seed_it_is_not_that_of_another_rank(ranks):
    model, _, _ = alone(seed=101)
    found = ranks[1]["ddp no seed"]["outputs"]
    assert any((found[name] - value).abs().max() > 1e-3 for name, value in outputs(model).items())


@pytest.mark.parametrize("case", SHARDED)
def test_fsdp2_is_one_process_on_the_whole_batch(ranks, case):
    found = same_on_both(ranks, case)
    assert set(found["held"]) == {"DTensor"}
    assert found["reads"] == [False, False]  # two layers, each once in a step, and never gathered for it
    model, optimizer, std = alone()
    torch.testing.assert_close(found["first"], std)
    torch.testing.assert_close(found["adapters"], adapters(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["row_std"], optimizer.row_std(), rtol=1e-4, atol=1e-5)
    assert difference(found["base"], frozen(lora_mlp())) is None
    x = batch(99)[0]
    noisy = model(x).detach()
    clean = model.eval()(x).detach()
    torch.testing.assert_close(found["noisy"], noisy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["clean"], clean, rtol=1e-4, atol=1e-4)
    assert (noisy - clean).abs().max() > 1e-2
