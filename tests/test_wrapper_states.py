"""Copies and checkpoints of a wrapper: each of its kinds, of one method over another, and of its base alone."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from helpers import (
    Plain,
    adamw,
    adapters,
    base_state,
    difference,
    epsilon,
    ggpo,
    loss_of,
    outputs,
    through_a_file,
    train,
)
from models import lora_mlp, trainable
from torch.optim import lr_scheduler

# --- copies --------------------------------------------------------------------------------------------------------


def copied(how, value):
    return copy.deepcopy(value) if how == "deepcopy" else pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_is_linked_and_goes_on_alike(wrap, how):
    model = lora_mlp()
    optimizer = wrap(adamw(model), model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)  # patches step on the instance
    train(model, optimizer, range(3), scheduler)
    model2, optimizer2 = copied(how, (model, optimizer))
    assert type(optimizer2) is type(optimizer) and optimizer2.base_optimizer is not optimizer.base_optimizer
    held = {id(p) for group in optimizer2.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainable(model2)} and held.isdisjoint(id(p) for p in trainable(model))
    before = adapters(model), outputs(model), base_state(optimizer)
    train(model2, optimizer2, range(3, 6))
    assert difference(before, (adapters(model), outputs(model), base_state(optimizer))) is None
    train(model, optimizer, range(3, 6))
    assert difference(adapters(model), adapters(model2)) is None
    assert difference(base_state(optimizer), base_state(optimizer2)) is None
    assert difference(outputs(model), outputs(model2)) is None  # the next noise too


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_alone(wrap, how):
    model = lora_mlp()
    optimizer = wrap(adamw(model), model)
    train(model, optimizer, range(2))
    before = adapters(model), outputs(model)
    twin = copied(how, optimizer)
    assert type(twin) is type(optimizer) and type(twin.base_optimizer) is type(optimizer.base_optimizer)
    assert difference(optimizer.state_dict(), twin.state_dict()) is None
    for group in twin.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    twin.step()
    assert difference(before, (adapters(model), outputs(model))) is None


def test_an_averaged_model_evaluates_the_plain_average():
    model = lora_mlp()
    optimizer = ggpo(model, sigma=0.3)
    average = torch.optim.swa_utils.AveragedModel(model)
    total = {name: torch.zeros_like(p) for name, p in adapters(model).items()}
    for i in range(3):
        train(model, optimizer, range(i, i + 1))
        average.update_parameters(model)
        for name, value in adapters(model).items():
            total[name] += value / 3
    plain = lora_mlp()
    plain.load_state_dict(total, strict=False)
    x = torch.randn(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(average.eval()(x), plain.eval()(x))
    assert all(e.abs().max() < 1e-6 for e in epsilon(average.train().module).values())  # copies carry none
    assert any(e.abs().max() > 0 for e in epsilon(model).values())


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_base_alone_takes_the_wrappers_checkpoint(wrap):
    model = lora_mlp()
    optimizer = wrap(adamw(model), model)
    train(model, optimizer, range(2))
    bare = adamw(lora_mlp())
    bare.load_state_dict(optimizer.state_dict())
    assert difference(bare.state_dict(), base_state(optimizer)) is None


def test_a_checkpoint_of_the_bare_base_is_taken_with_a_warning(caplog):
    source = lora_mlp()
    bare = adamw(source)
    train(source, bare, range(3))
    model = lora_mlp()
    optimizer = ggpo(model)
    fresh = outputs(model)
    train(model, optimizer, range(2))
    model.load_state_dict(adapters(lora_mlp()), strict=False)
    with caplog.at_level(logging.WARNING, logger="flatlora"):
        optimizer.load_state_dict(bare.state_dict())
    assert "no GGPO part" in caplog.text
    assert difference(base_state(optimizer), bare.state_dict()) is None
    assert difference(fresh, outputs(model)) is None  # from the first ε on, without a gradient term


class Other(Plain):
    """Another method."""


def assert_refused(optimizer, model, state, match):
    before = copy.deepcopy(optimizer.state_dict()), adapters(model), outputs(model)
    groups, moments = optimizer.param_groups, optimizer.state
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert difference(before, (optimizer.state_dict(), adapters(model), outputs(model))) is None
    assert optimizer.param_groups is groups and optimizer.state is moments


@pytest.mark.parametrize("change", ["layers", "method", "inner method", "groups"])
def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(change):
    other = lora_mlp()
    base = adamw(other)
    if change == "groups":
        base = torch.optim.AdamW([{"params": [p]} for p in trainable(other)])
    if change == "inner method":
        base = Other(base)
    source = Other(base) if change == "method" else ggpo(other, base)
    train(other, source, range(1))
    state = source.state_dict()
    if change == "layers":
        layers = state["flatlora"]["GGPOOptimizer"]["layers"]
        layers["elsewhere"] = layers.pop(next(iter(layers)))
    match = {"method": "written by Other", "inner method": "written by Other", "groups": "parameter group"}
    model = lora_mlp()
    optimizer = ggpo(model)
    train(model, optimizer, range(2))
    assert_refused(optimizer, model, state, match.get(change, "of another model"))


def test_a_method_over_a_method_keeps_both_parts():
    model = lora_mlp()
    optimizer = ggpo(model, Plain(adamw(model)))
    train(model, optimizer, range(3))
    state = through_a_file(optimizer.state_dict())
    assert state["flatlora"].keys() == {"Plain", "GGPOOptimizer"}
    other = lora_mlp()
    resumed = ggpo(other, Plain(adamw(other)), seed=8)
    other.load_state_dict(adapters(model), strict=False)
    resumed.load_state_dict(state)
    assert resumed.base_optimizer.calls == 3
    assert difference(outputs(model), outputs(other)) is None


def test_one_method_twice_over_two_models_keeps_both_parts():
    def build_both():
        first, second = lora_mlp(), lora_mlp(seed=1)
        base = torch.optim.AdamW(trainable(first) + trainable(second), lr=1e-2)
        return first, second, ggpo(second, ggpo(first, base), seed=8)

    first, second, optimizer = build_both()
    for i in range(3):
        optimizer.zero_grad()
        (loss_of(first, i) + loss_of(second, i)).backward()
        optimizer.step()
    first2, second2, resumed = build_both()
    first2.load_state_dict(adapters(first), strict=False)
    second2.load_state_dict(adapters(second), strict=False)
    resumed.load_state_dict(optimizer.state_dict())
    assert difference(outputs(second), outputs(second2)) is None
    assert difference(outputs(first), outputs(first2)) is None


def test_distributed_checkpoint_round_trip():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = lora_mlp()
    optimizer = ggpo(model)
    train(model, optimizer, range(3))
    before = base_state(optimizer)
    saved = get_optimizer_state_dict(model, optimizer)
    assert all("lora_" in name for name in saved["state"])
    assert difference(before, base_state(optimizer)) is None

    other = lora_mlp()
    resumed = ggpo(other)
    other.load_state_dict(adapters(model), strict=False)
    set_optimizer_state_dict(other, resumed, saved)
    assert difference(adapters(model), adapters(other)) is None
    assert difference(base_state(optimizer)["state"], base_state(resumed)["state"]) is None
    train(other, resumed, range(3, 5))


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_a_step_that_makes_the_state_of_a_new_optimizer_is_none_of_the_methods(lr):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = lora_mlp()
    optimizer = ggpo(model, adamw(model, lr=lr))
    noise = outputs(model), optimizer.method_state()
    assert len(get_optimizer_state_dict(model, optimizer)["state"]) == len(trainable(model))
    assert difference(noise, (outputs(model), optimizer.method_state())) is None


def test_a_first_step_at_lr_0_is_a_step_where_there_are_gradients():
    model = lora_mlp()
    optimizer = ggpo(model, adamw(model, lr=0.0))  # as a schedule that warms up has it
    loss_of(model, 0).backward()
    optimizer.step()
    assert optimizer.method_state()["step"] == 1
