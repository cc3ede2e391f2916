"""Phase two, checkpoints, and what others see of the two levels."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import SGD, bilevel, difference, everything, net_batch, peft_net, same, state_of
from torch import nn
from torch.utils.data import DataLoader

from flatlora import (
    BilevelOptimizer,
    GGPOOptimizer,
    direction_parameters,
    lora_layers,
    magnitude_parameters,
    split_dataset,
)


def test_phase_two():
    model = peft_net()
    whole = [{**net_batch(1), "i": i} for i in range(10)]
    train, val = split_dataset(whole, 0.2, seed=1)
    seen = []

    def loss_fn(model, data):
        seen.append(int(data["i"]))
        return model(x=data["x"].flatten(0, -2), labels=data["labels"].flatten(0, -2)).loss

    optimizer = bilevel(model, DataLoader(train, shuffle=True), DataLoader(val, shuffle=True), loss_fn=loss_fn)
    for _ in range(3):
        optimizer.step()
    magnitudes = [p.detach().clone() for p in magnitude_parameters(model)]
    directions = [p.detach().clone() for p in direction_parameters(model)]
    stream = torch.get_rng_state()
    second = torch.optim.AdamW(direction_parameters(model), lr=0.01, weight_decay=0.1)
    optimizer.retrain(DataLoader(whole, shuffle=True), 0, optimizer=second)
    assert torch.equal(stream, torch.get_rng_state())
    for adapter in (layer.all_adapters()[0] for layer in lora_layers(model)):
        assert not adapter.B.any() and adapter.A.std() > 0.1
    assert not any(torch.equal(p, old) for p, old in zip(direction_parameters(model), directions, strict=True))
    seen.clear()
    losses = optimizer.retrain(DataLoader(whole, shuffle=True), 10, optimizer=second)
    assert len(losses) == 10 and sorted(seen) == list(range(10))
    assert all(torch.equal(p, old) for p, old in zip(magnitude_parameters(model), magnitudes, strict=True))
    assert all(layer.all_adapters()[0].B.any() for layer in lora_layers(model))
    with pytest.raises(RuntimeError, match="second phase"):
        optimizer.step()
    before = state_of(model)
    with pytest.raises(ValueError, match="magnitudes"):
        optimizer.retrain(whole, 1, optimizer=SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizer must be"):
        optimizer.retrain(whole, 1, optimizer=None)
    with pytest.raises(ValueError, match="no batch"):
        optimizer.retrain([], 1, optimizer=second)
    with pytest.raises(ValueError, match="steps must"):
        optimizer.retrain(whole, True, optimizer=second)
    with pytest.raises(TypeError, match="scheduler must"):
        optimizer.retrain(whole, 1, optimizer=second, scheduler=0.1)
    assert same(before, state_of(model))


def run(steps: int, resume_at: int | None, tmp_path, own_generator: bool) -> tuple[dict, list]:
    """`steps` iterations, then as many of phase two; a new process is played at `resume_at`."""
    data = [net_batch(1, torch.float32) for _ in range(10)]

    def build():
        model = peft_net(0.2, torch.float32)
        torch.manual_seed(7)
        lower = GGPOOptimizer(torch.optim.AdamW(direction_parameters(model), lr=0.01), model, seed=0)
        upper = torch.optim.AdamW(magnitude_parameters(model), lr=0.01)
        generator = torch.Generator().manual_seed(3) if own_generator else None
        train, val = (DataLoader(part, 2, shuffle=True, generator=generator) for part in split_dataset(data, 0.4))
        optimizer = BilevelOptimizer(lower, upper, model, train, val, loss_fn=loss_fn, unroll_steps=2)
        return model, optimizer, torch.optim.AdamW(direction_parameters(model), lr=0.01)

    def loss_fn(model, data):
        return model(x=data["x"].squeeze(1), labels=data["labels"].squeeze(1)).loss

    model, optimizer, second = build()
    torch.manual_seed(9)
    results = []
    for i in range(2 * steps):
        if i == resume_at:
            stream = torch.get_rng_state()
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
            model, optimizer, second = build()
            weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            torch.set_rng_state(stream)
        if i < steps:
            results.append(optimizer.step())
        else:
            optimizer.lower.remove()
            loader = DataLoader(data, 3, shuffle=True)
            results.append(optimizer.retrain(loader, 1, optimizer=second))
    return state_of(model), results


@pytest.mark.parametrize("own_generator", [False, True])
def test_resume_is_bit_identical(tmp_path, own_generator):
    torch.manual_seed(0)
    stream = torch.get_rng_state()
    expected = run(5, None, tmp_path, own_generator)
    for resume_at in (1, 3, 7):
        torch.set_rng_state(stream)
        found = run(5, resume_at, tmp_path, own_generator)
        assert found[1] == expected[1]
        assert same(found[0], expected[0])


def test_state_dict_of_another_optimizer_is_refused():
    model = peft_net()
    optimizer = bilevel(model)
    with pytest.raises(ValueError, match="not written by BilevelOptimizer"):
        optimizer.load_state_dict(optimizer.lower.state_dict())
    others = SGD(direction_parameters(model)[1:], lr=0.1)
    with pytest.raises(ValueError, match="another model"):
        optimizer.load_state_dict(bilevel(model, lower=others).state_dict())


def own(state: dict) -> dict:
    return state["flatlora"]["BilevelOptimizer"]["own"]


def of_lower(state: dict) -> dict:
    return state["flatlora"]["BilevelOptimizer"]["lower"]["flatlora"]["GGPOOptimizer"]


def other_magnitudes(state: dict) -> None:
    """Those of a model with as many magnitudes of other sizes."""
    theirs = peft_net(hidden=9)
    for group in state["flatlora"]["BilevelOptimizer"]["shapes"][1:]:
        group[:] = [list(p.shape) for p in magnitude_parameters(theirs)]


DAMAGES = {  # beside what tests/every_method does to the state of every method
    "phase 3": lambda s: own(s).update(phase=3),
    "phase True": lambda s: own(s).update(phase=True),
    "phase 2 without its state": lambda s: own(s).update(phase=2),
    "phase 1 with the state of phase 2": lambda s: own(s).update(retrain={}),
    "phase 2 with half its state": lambda s: own(s).update(phase=2, retrain={"position": own(s)["val"]}),
    "lower_steps 0.5": lambda s: own(s).update(lower_steps=0.5),
    "no validation position": lambda s: own(s).update(val=None),
    "index beyond the end": lambda s: own(s)["val"].update(index=2),
    "generators None": lambda s: own(s)["val"].update(generators=None),
    "lower a list": lambda s: s["flatlora"]["BilevelOptimizer"].update(lower=[]),
    "own part a list": lambda s: s["flatlora"]["BilevelOptimizer"].update(own=[]),
    "no state": lambda s: s.pop("state"),
    "upper of another model": other_magnitudes,
    "a group less": lambda s: s["param_groups"].pop(),
    "no layers in lower": lambda s: of_lower(s).pop("layers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_changes_nothing(damage):
    def build():
        model = peft_net()
        lower = GGPOOptimizer(torch.optim.AdamW(direction_parameters(model), lr=0.01), model, sigma=0.1, seed=0)
        upper = torch.optim.AdamW(magnitude_parameters(model), lr=0.01)
        return model, BilevelOptimizer(lower, upper, model, [net_batch()] * 4, [net_batch()])

    (_, written), (model, optimizer) = build(), build()
    for _ in range(3):
        written.step()
    optimizer.step()
    state = copy.deepcopy(written.state_dict())
    DAMAGES[damage](state)
    before = everything(model, optimizer)
    with pytest.raises((ValueError, KeyError) if damage == "no layers in lower" else ValueError):
        optimizer.load_state_dict(state)
    assert difference(before, everything(model, optimizer)) is None


def test_a_level_that_refuses_its_state_leaves_the_other_untouched():
    class Picky(torch.optim.AdamW):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            if state_dict["param_groups"][0]["lr"] == 0.5:
                raise RuntimeError("a learning rate of one half")

    def build(lr: float):
        model = peft_net()
        lower, upper = (
            torch.optim.AdamW(direction_parameters(model), lr=lr),
            Picky(magnitude_parameters(model), lr=lr),
        )
        return model, BilevelOptimizer(lower, upper, model, [net_batch()] * 4, [net_batch()])

    (_, written), (model, optimizer) = build(0.5), build(0.1)
    written.step()
    optimizer.step()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="one half"):
        optimizer.load_state_dict(written.state_dict())
    assert difference(before, everything(model, optimizer)) is None


def test_levels_without_the_checkpoints_wrappers_are_refused():
    model = peft_net()
    lower = GGPOOptimizer(SGD(direction_parameters(model), lr=0.1), model, seed=0)
    state = bilevel(model, lower=lower).state_dict()
    with pytest.raises(ValueError, match="written by GGPOOptimizer"):
        bilevel(model).load_state_dict(state)


def test_phase_two_is_not_resumed_with_another_optimizer():
    def build():
        model = peft_net()
        return model, bilevel(model, [net_batch()] * 2, [net_batch()])

    data = [net_batch() for _ in range(4)]
    model, optimizer = build()
    second = torch.optim.AdamW(direction_parameters(model), lr=0.01)
    optimizer.retrain(data, 3, optimizer=second)
    state = copy.deepcopy(optimizer.state_dict())
    model, resumed = build()
    resumed.load_state_dict(state)
    before = everything(model, resumed)
    directions = direction_parameters(model)
    for wrong in (directions[:-1], directions[::-1]):
        with pytest.raises(ValueError, match="another model"):
            resumed.retrain(data, 1, optimizer=torch.optim.AdamW(wrong, lr=0.01))
    with pytest.raises(ValueError, match="after batch 3 of its epoch and has 2"):
        resumed.retrain(data[:2], 1, optimizer=torch.optim.AdamW(directions, lr=0.01))
    assert difference(before, everything(model, resumed)) is None
    second = torch.optim.AdamW(directions, lr=0.01)
    resumed.retrain(data, 1, optimizer=second)
    assert second.state[directions[0]]["step"] == 4


def test_is_an_optimizer_to_others():
    from accelerate import Accelerator

    model = peft_net()
    optimizer = bilevel(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    groups = optimizer.param_groups
    assert groups[0] is optimizer.lower.param_groups[0] and groups[1] is optimizer.upper.param_groups[0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda i: 0.5**i, lambda i: 0.1**i])
    prepared = Accelerator(cpu=True).prepare(optimizer)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    prepared.step()
    assert optimizer.metrics()["hypergradient_norm"] > 0
    scheduler.step()
    assert called == [1]
    assert [group["lr"] for group in optimizer.lower.param_groups + optimizer.upper.param_groups] == [0.05, 0.1 * 0.1]
    prepared.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(NotImplementedError, match=r"optimizer\.lower\.add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.state == {}  # SGD without momentum
    assert "Parameter Group 1" in repr(optimizer)


def test_a_step_that_makes_the_states_of_new_levels_runs_no_batch():
    """torch.distributed.checkpoint takes it, at lr 0 with zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = peft_net()
    params = direction_parameters(model), magnitude_parameters(model)
    optimizer = BilevelOptimizer(*(torch.optim.AdamW(level, lr=0.1) for level in params), model, [{}], [{}])
    before = state_of(model)
    saved = get_optimizer_state_dict(model, optimizer)
    assert len(saved["state"]) == sum(map(len, params))
    assert same(before, state_of(model)) and optimizer.method_state()["train"]["index"] == 0


def test_what_lightnings_object_saves_is_loaded():
    """Lightning's object is of a class of its own, `LightningBilevelOptimizer`, and forwards what it has not itself."""
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = peft_net()
    optimizer = bilevel(model, [net_batch(1)], [net_batch(2)])
    theirs = LightningOptimizer(optimizer)
    optimizer.step()
    second = torch.optim.AdamW(direction_parameters(model), lr=0.01)
    for retrained in (False, True):
        if retrained:
            optimizer.retrain([net_batch(1)], 1, optimizer=second)
        state, ours = theirs.state_dict(), optimizer.state_dict()
        own = state["flatlora"]["BilevelOptimizer"]["own"]
        assert own["lower_steps"] == 1 and own["phase"] == 1 + retrained == theirs.phase
        assert repr(state) == repr(ours)
        optimizer.load_state_dict(state)
        assert repr(optimizer.state_dict()) == repr(ours)
