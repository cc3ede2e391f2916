"""Groups in which others' tensors have taken the adapters' place: refused where a method would go wrong."""

from __future__ import annotations

import pytest
import torch
from helpers import sgd
from methods import METHODS, adapted, batch, every_method, ggpo, logits, lora, lorasam
from models import Net, one_layer, trainable
from peft import LoraConfig
from torch import nn

from flatlora import BiLoRAOptimizer, GGPOOptimizer, LoRASAMOptimizer

READ_GRADIENTS = [method for method in METHODS if method.build not in (lorasam,) and method.perturbs]


def copied(optimizer):
    """Has copies stepped instead of the parameters, as mixed-precision wrappers do; scaled gradients stay behind."""
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]


def backward(model, scale=2.0**16):
    (model(**batch(0)).loss * scale).backward()


@every_method(among=READ_GRADIENTS)
def test_copies_whose_gradients_are_scaled_are_refused_at_the_first_step(method):
    model = adapted(method)
    optimizer = method.start(model, sgd)
    copied(optimizer)
    backward(model)
    with pytest.raises(RuntimeError, match=r"copies stand in their place.*Use ZeRO stage 0 in float32"):
        optimizer.step()


@pytest.mark.parametrize(
    ("build", "perturbs"),
    [(lorasam, True), (ggpo(beta=0.0), True), (ggpo(sigma=0.0), False)],
    ids=["scale-free", "no gradient term", "off"],
)
def test_what_no_scale_of_the_gradients_matters_to_goes_on(build, perturbs):
    seen = []
    for scale in (1.0, 2.0**16):
        model = adapted(METHODS[0])
        optimizer = build(model, sgd, 0)
        copied(optimizer)
        backward(model, scale)
        optimizer.step()
        seen.append(logits(model.train()))
    torch.testing.assert_close(*seen)
    assert ((logits(model.eval()) - seen[1]).abs().max() > 1e-4) == perturbs


def test_bilora_over_layers_of_its_users_own():
    model = Net(nn.Linear(6, 5))
    model.A2, model.B2 = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(5, 2))
    groups = [{"params": [model.fc.weight]}, {"params": [model.A2, model.B2], "ascent": True}]
    optimizer = BiLoRAOptimizer(torch.optim.SGD(groups, lr=0.1), model, auxiliary=[(model.A2, model.B2, 1.0)])
    copied(optimizer)
    with pytest.raises(RuntimeError, match="copies stand in their place"):
        optimizer.step()


@pytest.mark.parametrize("wrap", [GGPOOptimizer, LoRASAMOptimizer])
@pytest.mark.parametrize("gone", ["group", "adapter"])
def test_adapters_that_their_user_takes_out_are_told_of(wrap, gone, caplog):
    """A phase that trains the head alone, or a model that has dropped the adapter."""
    model = one_layer()
    head = nn.Linear(10, 1).double()
    optimizer = wrap(torch.optim.SGD([{"params": trainable(model)}, {"params": head.parameters()}], lr=0.1), model)
    if gone == "group":
        optimizer.param_groups.pop(0)
        model.requires_grad_(False)
    else:
        model.add_adapter("other", LoraConfig(target_modules=["fc"]))
        model.set_adapter("other")
        model.delete_adapter("default")
    head(model(torch.randn(3, 7).double())).sum().backward()
    optimizer.step()
    assert "no adapter gradients" in caplog.text


@every_method(among=[method for method in METHODS if method.adapt is lora and method.perturbs])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_empty_factor_is_refused_by_name(method, factor):
    model = adapted(method)
    optimizer = method.start(model, sgd)
    for name, p in model.named_parameters():
        if factor in name:
            p.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"is empty: .*DeepSpeed's ZeRO stage 3"):
        model(**batch(0)).loss.backward()
        optimizer.step()
