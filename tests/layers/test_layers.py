"""Finding adapted layers, and reading their base weights whatever they are stored as."""

import pytest
import torch
from helpers import (
    MLP,
    IntLinear,
    ModuleLoRA,
    Net,
    ParameterLoRA,
    base_weight,
    dense,
    one_layer,
    peft,
    quantised,
    tiny_gpt2,
    tiny_llama,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatlora import lora_layers
from flatlora.layers.base import BaseWeight


def test_finds_every_adapted_layer_of_a_llama():
    layers = lora_layers(tiny_llama(layers=2))
    assert len(layers) == 8
    shapes = {layer.name.rsplit(".", 1)[1]: layer.shape for layer in layers}
    assert shapes == {"q_proj": (32, 32), "v_proj": (16, 32), "gate_proj": (48, 32), "down_proj": (32, 48)}
    assert {layer.base.kind for layer in layers} == {"float"}


def test_conv1d_layers_have_the_shape_of_their_effective_weight():
    for layer in lora_layers(tiny_gpt2()):
        assert layer.shape == ((96, 32) if layer.name.endswith("c_attn") else (128, 32))
        assert torch.equal(layer.base.float_weight(), layer.module.get_base_layer().weight.t())


def test_names_leave_out_what_wrappers_add():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = one_layer()
    plain = [layer.name for layer in lora_layers(model)]
    assert [layer.name for layer in lora_layers(Wrapper(model))] == plain
    assert [layer.name for layer in lora_layers(torch.compile(model, backend="eager"))] == plain


def test_adapter_names_are_selected():
    model = one_layer(adapters={"first": {}, "second": {"r": 2}})
    assert lora_layers(model)[0].names == {"first", "second"}
    assert lora_layers(model, "second")[0].names == {"second"}
    assert lora_layers(model, ["first", "second"])[0].names == {"first", "second"}
    assert [a.A.shape[0] for a in lora_layers(model)[0].adapters()] == [4, 2]


def test_adapters_are_those_the_layer_adds_at_present():
    model = one_layer(adapters={"first": {}, "second": {}})
    (layer,) = lora_layers(model)
    assert layer.active and [a.name for a in layer.adapters()] == ["first", "second"]
    model.base_model.set_adapter("second")
    assert [a.name for a in layer.adapters()] == ["second"]
    with model.disable_adapter():
        assert not layer.active and layer.adapters() == []
    model.merge_adapter()
    assert layer.active and layer.merged == ("second",) and layer.adapters() == []
    model.unmerge_adapter()
    assert [a.name for a in layer.adapters()] == ["second"]


def test_a_layer_is_inactive_under_a_foreign_adapter_alone():
    model = one_layer(adapters={"first": {}, "second": {}})
    (layer,) = lora_layers(model, "first")
    assert layer.active
    model.base_model.set_adapter("second")
    assert not layer.active


def test_factors_and_scaling_reproduce_the_effective_weight():
    for model in (one_layer(), one_layer(use_rslora=True), one_layer(conv1d=True)):
        (layer,) = lora_layers(model)
        (adapter,) = layer.adapters()
        weight = base_weight(layer.base.module) + adapter.scaling * adapter.B @ adapter.A
        torch.testing.assert_close(weight, dense(model.base_model.model.fc)[0], rtol=0, atol=1e-12)
    for module in (ParameterLoRA(9, 7), ParameterLoRA(9, 7, transposed=True), ModuleLoRA(9, 7)):
        (layer,) = lora_layers(Net(module.double()))
        (adapter,) = layer.adapters()
        assert layer.shape == (9, 7) and adapter.A.shape == (3, 7) and adapter.B.shape == (9, 3)
        weight = module.dense()[0] - adapter.scaling * adapter.B @ adapter.A
        torch.testing.assert_close(weight, layer.base.float_weight().detach(), rtol=0, atol=1e-12)


def test_gradients_come_in_the_shapes_of_the_factors():
    module = ParameterLoRA(9, 7, transposed=True)
    (layer,) = lora_layers(Net(module))
    assert not layer.adapters()[0].has_grads
    module(torch.randn(5, 7)).square().sum().backward()
    grad_a, grad_b = layer.adapters()[0].grads()
    assert torch.equal(grad_a, module.lora_A.grad.t()) and torch.equal(grad_b, module.lora_B.grad.t())


def test_embeddings_and_convolutions_are_left_out():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv, self.fc = nn.Embedding(10, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8)

    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["embed", "conv", "fc"]))
    assert [layer.name.rsplit(".", 1)[1] for layer in lora_layers(model)] == ["fc"]
    with pytest.raises(ValueError, match="no adapted linear layer"):
        lora_layers(get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["embed", "conv"])))


# --- base weights -------------------------------------------------------------------------------------------------


BASES = {
    "float32": ("float", lambda: nn.Linear(80, 48)),
    "bfloat16": ("float", lambda: nn.Linear(80, 48).bfloat16()),
    "conv1d": ("float", lambda: Conv1D(48, 80)),
    "nf4": ("4bit", lambda: quantised(nn.Linear(80, 48), "nf4")),
    "fp4": ("4bit", lambda: quantised(nn.Linear(80, 48), "fp4")),
    "int8": ("8bit", lambda: quantised(nn.Linear(80, 48), "int8")),
    "opaque": ("opaque", lambda: IntLinear(48, 80)),
}


@pytest.mark.parametrize("stored", BASES)
def test_base_weight_equals_the_stored_bits(stored):
    kind, build = BASES[stored]
    module = build().requires_grad_(False)
    base = BaseWeight(module, (48, 80), transposed=stored == "conv1d")
    assert base.kind == kind
    weight = base_weight(module)
    torch.testing.assert_close(base.row_sq(), weight.square().sum(1), rtol=1e-6, atol=0)
    x = torch.randn(5, 80)
    expected = weight @ x.double().t()
    error = (base.apply_rows(x).double() - expected).abs().max() / expected.abs().max()
    assert base.apply_rows(x).shape == (48, 5) and error < 2e-6
    if base.kind in ("4bit", "8bit"):
        torch.testing.assert_close(base.dense(torch.float64), weight, rtol=1e-6, atol=1e-9)


def test_int8_scales_are_found_before_and_after_the_first_forward():
    module = quantised(nn.Linear(80, 48), "int8")
    base = BaseWeight(module, (48, 80), False)
    before = base.row_sq()
    module(torch.randn(2, 80))
    assert torch.equal(base.row_sq(), before)
    torch.testing.assert_close(before, base_weight(module).square().sum(1), rtol=1e-6, atol=0)


def test_weights_larger_than_a_block_are_summed_completely():
    module = nn.Linear(1000, 700).bfloat16()
    base = BaseWeight(module, (700, 1000), False)
    weight, x = module.weight.detach().double(), torch.randn(3, 1000)
    torch.testing.assert_close(base.row_sq(), weight.square().sum(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(base.apply_rows(x), (weight @ x.double().t()).float(), rtol=1e-4, atol=1e-5)


# --- wrong calls --------------------------------------------------------------------------------------------------


def without_scaling():
    module = ParameterLoRA(9, 7)
    del module.scaling
    return Net(module)


def misfit():
    module = ParameterLoRA(9, 7)
    module.lora_A = nn.Parameter(torch.randn(3, 6))
    return Net(module)


@pytest.mark.parametrize(
    ("model", "adapter", "error", "words"),
    [
        (lambda: "model", None, TypeError, ["torch.nn.Module", "str"]),
        (lambda: MLP(), None, ValueError, ["MLP", "no adapted linear layer", "get_peft_model"]),
        (lambda: one_layer(), "other", ValueError, ["unknown adapter", "other", "default"]),
        (lambda: one_layer(), ["default", "other"], ValueError, ["['other']", "default"]),
        (without_scaling, None, ValueError, ["ParameterLoRA", "scaling", "alpha"]),
        (misfit, None, ValueError, ["(3, 6)", "(9, 3)", "(9, 7)", "(r, 7)"]),
    ],
)
def test_wrong_calls_say_what_was_found_and_what_to_do(model, adapter, error, words):
    with pytest.raises(error) as raised:
        lora_layers(model(), adapter)
    for word in words:
        assert word in str(raised.value)


def test_repr_names_the_layer():
    model = peft(Net(nn.Linear(7, 9)), ["fc"])
    text = repr(lora_layers(model)[0])
    assert "fc" in text and "7 -> 9" in text and "float" in text
