"""Loops of others that feed the lower level, and optimizers of others as the levels."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from problems import Net, batch, bilevel, levels, net_batch, peft_net, same, state_of
from torch import Tensor, nn

from flatlora import BilevelOptimizer, direction_parameters, magnitude_parameters
from flatlora.layers.bnb import Bnb4bitBase


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loop_that_feeds_the_lower_level(difference, micro_batches):
    """The same updates as when the optimizer pulls its training batches, with dropout, accumulation and clipping."""
    data, val = [net_batch() for _ in range(4)], [net_batch()]

    def train(fed: bool) -> dict[str, Tensor]:
        model = peft_net(dropout=0.0 if micro_batches > 1 else 0.2)
        torch.manual_seed(1)
        optimizer = BilevelOptimizer(
            *levels(model), model, None if fed else data, val, difference=difference, epsilon=1e-3, unroll_steps=2
        )
        directions = direction_parameters(model)
        optimizer.lower.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(directions, 0.05) and None)
        torch.manual_seed(2)
        for step in range(4 if fed else 2):
            if not fed:
                optimizer.step()
                continue
            for i in range(micro_batches):
                part = {key: value.chunk(micro_batches)[i] for key, value in data[step].items()}
                (model(**part).loss / micro_batches).backward()
            assert all(p.grad is None for p in magnitude_parameters(model))
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
        return state_of(model)

    found, expected = train(True), train(False)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)


def test_a_loop_that_gave_nothing():
    model = peft_net()
    optimizer = BilevelOptimizer(*levels(model), model, None, [net_batch()])
    with pytest.raises(RuntimeError, match="no training batch"):
        optimizer.step()
    with pytest.raises(ValueError, match="closure"):
        bilevel(model).step(lambda: None)
    before = state_of(model)
    optimizer.step(lambda: model(**net_batch()).loss.backward())
    assert not same(before, state_of(model))
    optimizer.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_shallow_copy_is_the_same_optimizer():
    """And takes neither the loop's batches nor the model from the one that it was made of."""

    def train(copied: bool) -> dict[str, Tensor]:
        model = peft_net(dropout=0.2)
        torch.manual_seed(1)
        optimizer = BilevelOptimizer(*levels(model), model, None, [net_batch()] * 3, unroll_steps=2)
        for i in range(6):
            model(**net_batch()).loss.backward()
            stepped = copy.copy(optimizer) if copied and i % 3 < 2 else optimizer
            assert (stepped.step().val_loss is None) == (i % 2 == 0)
            stepped.zero_grad()
        assert len(model._forward_hooks) == 1
        return state_of(model)

    assert same(train(False), train(True))


def test_an_nf4_weight_is_dequantised_once_a_step_for_the_orthogonality_term():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = Net(64, 128, 4)
    for name in ("first", "second"):
        old = getattr(net, name)
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="nf4", compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        setattr(net, name, new.to("cpu"))
    config = LoraConfig(r=64, target_modules=["first", "second"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(net, config).train()
    data = [batch(8, 64, 4, torch.float32) for _ in range(2)]
    reads, dense = [], Bnb4bitBase.dense
    lower = bnb.optim.AdamW8bit(direction_parameters(model), lr=1e-3)
    upper = bnb.optim.AdamW8bit(magnitude_parameters(model), lr=1e-3)
    optimizer = BilevelOptimizer(lower, upper, model, data[:1], data[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bnb4bitBase, "dense", lambda base, dtype: reads.append(base) or dense(base, dtype))
        for _ in range(3):
            optimizer.step()
    assert len(reads) == 3 * 2  # once per step and layer
    assert lower.state[direction_parameters(model)[0]]["state1"].dtype == torch.uint8
    assert upper.state[magnitude_parameters(model)[0]]["state1"].dtype == torch.float32
