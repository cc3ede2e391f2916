"""Numbers of other libraries' types, adapters that are frozen, and strings where batches belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import lora_mlp, trainable

from flatlora import (
    BilevelOptimizer,
    BiLoRAOptimizer,
    GGPOOptimizer,
    LoRASAMOptimizer,
    attach_auxiliary,
    checks,
    detach_auxiliary,
    remove_perturbation,
)
from flatlora import direction_parameters as directions
from flatlora import magnitude_parameters as magnitudes


def ggpo(model, **options):
    return GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, **options)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(2), torch.tensor(0.5), torch.tensor(2)])
def test_numbers_of_other_libraries_become_pythons(value):
    number = checks.number("sigma", value)
    assert type(number) is float and number == value.item()


@pytest.mark.parametrize("value", [np.int64(8), np.uint8(8), torch.tensor(8)])
def test_integers_of_other_libraries_become_pythons(value):
    number = checks.integer("r", value, 1)
    assert type(number) is int and number == 8


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), torch.ones(1), "1", None, 1j, np.float32("nan"), np.ones(1)]
)
def test_what_is_no_number_is_refused_still(value):
    with pytest.raises(ValueError, match="sigma must be a finite number"):
        checks.number("sigma", value)


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), 8.0, np.float32(8), torch.tensor(8.0)])
def test_what_is_no_integer_is_refused_still(value):
    with pytest.raises(ValueError, match="r must be an integer"):
        checks.integer("r", value, 1)


def test_states_hold_pythons_numbers():
    optimizer = ggpo(
        lora_mlp(), sigma=np.float32(0.5), beta=torch.tensor(0.25), noise_rank=np.int64(3), seed=np.int64(7)
    )
    state = optimizer.state_dict()["flatlora"]["GGPOOptimizer"]
    assert [type(state[name]) for name in ("sigma", "beta", "seed")] == [float, float, int]
    assert (state["sigma"], state["beta"], state["seed"]) == (0.5, 0.25, 7)


def test_seeds_are_integers():
    with pytest.raises(ValueError, match=r"seed must be an integer.*got 0.7"):
        ggpo(lora_mlp(), seed=0.7)
    with pytest.raises(ValueError, match=r"seed must be an integer.*got 0.5"):
        attach_auxiliary(lora_mlp(), seed=0.5)


def frozen(model, head=False):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head and name.endswith("bias"))
    return model


@pytest.mark.parametrize("method", [GGPOOptimizer, LoRASAMOptimizer])
def test_frozen_adapters_that_are_held_are_called_frozen(method):
    model = frozen(lora_mlp())
    with pytest.raises(ValueError, match=r"all 2 adapted layers are frozen; unfreeze.*set_adapter.*is_trainable=True"):
        method(torch.optim.SGD(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("method", [GGPOOptimizer, LoRASAMOptimizer, BiLoRAOptimizer])
def test_for_model_wants_an_adapter_to_train(method, head):
    model = frozen(lora_mlp(), head)
    before = set(model.state_dict()), len(list(model.parameters()))
    with pytest.raises(ValueError, match=r"unfreeze the adapter.*is_trainable=True"):
        method.for_model(model, torch.optim.SGD, lr=0.1)
    assert before == (set(model.state_dict()), len(list(model.parameters())))


def test_a_string_is_no_dataloader():
    model = lora_mlp(use_dora=True)
    lower, upper = (torch.optim.SGD(level(model), lr=0.1) for level in (directions, magnitudes))
    with pytest.raises(TypeError, match=r"train_dataloader must be an iterable of batches.*got str"):
        BilevelOptimizer(lower, upper, model, "abc", [torch.ones(1, 32)])


def lorasam(model):
    return LoRASAMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize("method", [ggpo, lorasam])
@pytest.mark.parametrize("left", [{}, {"state": {}}])
def test_a_state_without_groups_is_refused(method, left):
    model = lora_mlp()
    optimizer = method(model)
    with pytest.raises(ValueError, match=r"lacks .*param_groups"):
        optimizer.load_state_dict(left)


@pytest.mark.parametrize("take_off", [detach_auxiliary, remove_perturbation])
def test_what_is_taken_off_is_taken_off_a_model(take_off):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        take_off("model")
