"""Finding adapted layers, and reading their adapters whatever library they are of."""

import pytest
import torch
from helpers import base_weight as stored_weight
from helpers import dense
from models import MLP, ModuleLoRA, Net, ParameterLoRA, one_layer, peft, tiny_gpt2, tiny_llama
from peft import GraloraConfig, LoraConfig, get_peft_model
from torch import nn

from flatlora import LoRALayer, apply_gralora, lora_layers
from flatlora.layers.bases import base_weight
from flatlora.layers.kinds import READERS, OwnGraLoRA, PeftGraLoRA, PeftLoRA, reader_of
from flatlora.layers.plain import PlainLoRA


def test_finds_every_adapted_layer_of_a_llama():
    layers = lora_layers(tiny_llama(layers=2, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"]))
    assert len(layers) == 8
    shapes = {layer.name.rsplit(".", 1)[1]: layer.shape for layer in layers}
    assert shapes == {"q_proj": (32, 32), "v_proj": (16, 32), "gate_proj": (64, 32), "down_proj": (32, 64)}
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
        weight = stored_weight(layer.base.module) + adapter.scaling * adapter.B @ adapter.A
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


# --- kinds of adapters --------------------------------------------------------------------------------------------


def peft_gralora():
    config = GraloraConfig(r=4, gralora_k=2, alpha=8, target_modules=["fc"], init_weights=False)
    return get_peft_model(Net(nn.Linear(8, 12)), config)


KINDS = {
    "lora": (PeftLoRA, lambda: one_layer()),
    "dora": (PeftLoRA, lambda: one_layer(use_dora=True)),
    "peft's gralora": (PeftGraLoRA, peft_gralora),
    "gralora": (OwnGraLoRA, lambda: apply_gralora(Net(nn.Linear(8, 12)), "fc", r=4, k=2)),
    "parameters": (PlainLoRA, lambda: Net(ParameterLoRA(9, 7))),
    "modules": (PlainLoRA, lambda: Net(ModuleLoRA(9, 7))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_has_one_reader(kind):
    cls, build = KINDS[kind]
    (layer,) = lora_layers(build())
    assert [type(reader) for reader in READERS if reader.reads(layer.module)] == [cls]
    assert layer.is_peft == (cls in (PeftLoRA, PeftGraLoRA))
    assert layer.names == {"default"} and layer.active and layer.merged == () and layer.trained
    (adapter,) = layer.adapters()
    assert adapter.name == "default" and adapter.A_param is not None and adapter.A_param.requires_grad
    assert reader_of(layer.base.module) is None or kind == "modules"  # which is its own base


def test_a_module_without_adapters_is_no_layer():
    module = nn.Linear(7, 9)
    with pytest.raises(ValueError, match=r"'fc', a Linear, holds no adapters"):
        LoRALayer("fc", module, base_weight(module, (9, 7)), frozenset({"default"}))


def test_a_layer_is_trained_by_the_adapters_asked_for_that_it_adds():
    model = one_layer(adapters={"first": {}, "second": {}})
    (first,), (both,) = lora_layers(model, "first"), lora_layers(model)
    fc = model.base_model.model.fc
    assert first.trained and both.trained
    fc.lora_A["first"].requires_grad_(False)
    assert first.trained  # B still is
    fc.lora_B["first"].requires_grad_(False)
    assert not first.trained and both.trained
    fc.lora_B["first"].requires_grad_(True)
    with model.disable_adapter():
        assert not first.trained and not both.trained
    model.merge_adapter()
    assert first.active and not first.trained
    model.unmerge_adapter()
    assert first.trained
    model.base_model.set_adapter("second")
    assert not first.trained and both.trained
    module = ParameterLoRA(9, 7)
    (plain,) = lora_layers(Net(module))
    assert plain.trained
    module.merged = True
    assert not plain.trained and plain.active and plain.merged == ("default",)
    module.merged = False
    module.requires_grad_(False)
    assert not plain.trained


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


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_a_parameter_that_peft_adapts_is_no_linear_layer(kind, caplog):
    """PEFT's `target_parameters`: one parameter of a module, such as all experts' weights in one."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 7, 7))

        def forward(self, x):
            return (x @ self.weight).sum(0)

    net = nn.ModuleDict({"fc": nn.Linear(7, 7), "other": Experts() if kind == "experts" else nn.Linear(7, 7)})
    config = LoraConfig(r=2, target_modules=["fc"], target_parameters=["other.weight"])
    with caplog.at_level("WARNING", "flatlora"):
        layers = lora_layers(get_peft_model(net, config))
    assert [layer.name.rsplit(".", 1)[-1] for layer in layers] == ["fc"]
