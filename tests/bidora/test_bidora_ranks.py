"""Two processes: a bilevel step is that of one process on the whole batches, in float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from helpers import RANKS
from problems import bilevel, net_batch, peft_net, relative
from processes import on_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from flatlora import direction_parameters, magnitude_parameters

STEPS = 3
WAYS = [(fed, difference) for fed in ("own loaders", "own loop") for difference in ("central", "forward")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


def loader(seed, rank):
    """Batches of eight for all ranks together, in the order of the examples; a rank has every second of them."""
    torch.manual_seed(seed)
    examples = [dict(zip(("x", "labels"), pair, strict=True)) for pair in zip(*net_batch(24).values(), strict=True)]
    if rank is None:
        return DataLoader(examples, batch_size=8)
    return DataLoader(examples, batch_size=8 // RANKS, sampler=DistributedSampler(examples, RANKS, rank, shuffle=False))


def trained(fed, difference, rank=None, folder=None):
    """Losses and parameters after both phases."""
    model = peft_net()
    if rank:  # seeded apart: rank 0's parameters count
        with torch.no_grad():
            for p in direction_parameters(model):
                p.add_(1.0)
    train, val = loader(1, rank), loader(2, rank)
    parallel = model if rank is None or fed == "own loaders" else DistributedDataParallel(model)
    optimizer = bilevel(parallel, train, val, difference=difference, orthogonality=0.01)
    if fed == "own loop":
        optimizer.remove()
        optimizer = type(optimizer)(
            optimizer.lower, optimizer.upper, parallel, None, val, difference=difference, orthogonality=0.01
        )
    losses = []
    for batch, _ in zip(train, range(STEPS), strict=False):
        if fed == "own loop":
            optimizer.zero_grad()
            parallel(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(direction_parameters(model), 0.5)
        step = optimizer.step()
        losses += [step.train_loss, step.val_loss, step.lower_grad_norm, step.upper_grad_norm]
    magnitudes = [p.detach().clone() for p in magnitude_parameters(model)]
    torch.manual_seed(3)
    anew = torch.optim.SGD(direction_parameters(model), lr=0.1)
    losses += optimizer.retrain(loader(4, rank), STEPS, optimizer=anew)
    directions = [p.detach().clone() for p in direction_parameters(model)]
    return {"losses": torch.tensor(losses, dtype=torch.float64), "magnitudes": magnitudes, "directions": directions}


def failing(rank, folder):
    """One rank's loss is not finite: what every rank then says, and whether everything is as before."""
    model = peft_net()
    batches = [{key: value * (float("nan") if rank else 1.0) for key, value in net_batch().items()}]
    optimizer = bilevel(model, batches, [net_batch()])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="training loss is nan"):
        optimizer.step()
    return all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def cases():
    return {**{" ".join(way): functools.partial(trained, *way) for way in WAYS}, "failing": failing}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("fed", "difference"), WAYS)
def test_two_processes_are_one_on_the_whole_batches(ranks, fed, difference):
    first, second = (found[f"{fed} {difference}"] for found in ranks)
    assert "error" not in first, first["error"]
    alone = trained(fed, difference)
    for key in ("magnitudes", "directions"):
        assert all(map(torch.equal, first[key], second[key]))
        assert relative(first[key], alone[key]) < 1e-9
    torch.testing.assert_close(first["losses"], second["losses"], rtol=0, atol=0)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-8, atol=1e-10)
    assert relative(first["magnitudes"], [p.detach() for p in magnitude_parameters(peft_net())]) > 1e-3


def test_where_one_fails_all_do(ranks):
    assert [found["failing"] for found in ranks] == [True, True]
