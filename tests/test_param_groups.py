"""Groups that come later: all wrappers of a stack take them in, or none does."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import difference, loss_of
from models import lora_mlp

from flatlora import GGPOOptimizer, LoRASAMOptimizer, OptimizerWrapper

SGD = torch.optim.SGD
STACKS = {
    "GGPO over LoRASAM": lambda base, model: GGPOOptimizer(LoRASAMOptimizer(base, model, rho=0.3), model, seed=7),
    "plain over GGPO over plain over LoRASAM": lambda base, model: OptimizerWrapper(
        GGPOOptimizer(OptimizerWrapper(LoRASAMOptimizer(base, model, rho=0.3)), model, seed=7)
    ),
}


def begin(stack):
    model = lora_mlp()
    first, second = (
        [p for p in part.parameters() if p.requires_grad]
        for part in (model.base_model.model[0], model.base_model.model[2])
    )
    optimizer = STACKS[stack](SGD(first, lr=0.1), model)
    train(model, optimizer, range(2))
    return model, second, optimizer


def train(model, optimizer, steps):
    for i in steps:
        loss_of(model, i).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("stack", STACKS)
def test_a_group_that_an_outer_wrapper_refuses_is_in_none(stack):
    runs = []
    for refusing in (False, True):
        model, second, optimizer = begin(stack)
        if refusing:
            before = copy.deepcopy(optimizer.state_dict())
            other = GGPOOptimizer(SGD(second, lr=0.1), model, seed=1)  # which has not stepped yet
            with pytest.raises(ValueError, match="already perturbed"):
                optimizer.add_param_group({"params": second})
            other.remove()
            assert len(optimizer.param_groups) == 1
            assert difference(before, optimizer.state_dict()) is None
        train(model, optimizer, range(2, 5))
        runs.append(([p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict())))
        optimizer.add_param_group({"params": second})
        train(model, optimizer, range(5, 8))
        runs[-1] += ([p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict()))
    assert difference(*runs) is None
    state = optimizer.state_dict()["flatlora"]
    assert [len(part["layers"]) for part in state.values()] == [2, 2]
