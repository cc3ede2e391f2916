"""Bases whose `weight` is not what they multiply by, and weights that are written without autograd's knowledge."""

import pytest
import torch
import torch.nn.functional as F
from models import Net, one_layer, peft, quantised, trainable
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from flatlora import GGPOOptimizer, GraLoRALinear, LoRASAMOptimizer, lora_layers, merge_gralora
from flatlora.layers.bases import base_weight, linear_base
from flatlora.reference import ggpo_std as expected_std

N = 32


class Scaled8(nn.Linear):
    """As transformers' FP8Linear: `weight` holds W / scale in 8-bit floats."""

    def __init__(self):
        super().__init__(N, N, bias=False)
        scale = self.weight.detach().abs().max() / 448
        self.weight = nn.Parameter((self.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("weight_scale_inv", scale)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv)


class Scaled(nn.Linear):
    """The same in float32."""

    def __init__(self):
        super().__init__(N, N)
        self.register_buffer("scale", torch.rand(N, 1) + 2)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Coarse(nn.Linear):
    """Fake quantisation to a few levels."""

    def forward(self, x):
        step = self.weight.abs().max() / 2
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class Turned(nn.Linear):
    """Stored the other way round, though square."""

    def forward(self, x):
        return x @ self.weight + self.bias


class Honest(nn.Linear):
    """A forward of its own that does what nn.Linear's does."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def patched():
    module = nn.Linear(N, N)
    module.forward = lambda x: F.linear(x, 3 * module.weight, module.bias)
    return module


def parametrized():
    module = nn.Linear(N, N)
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def legacy_weight_norm():
    return torch.nn.utils.weight_norm(nn.Linear(N, N))


BASES = {
    "8-bit floats": (Scaled8, "opaque"),
    "scaled": (Scaled, "opaque"),
    "rounded": (lambda: Coarse(N, N), "opaque"),
    "patched": (patched, "opaque"),
    "parametrized": (parametrized, "opaque"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(N, N)), "opaque"),
    "legacy weight norm": (legacy_weight_norm, "opaque"),
    "turned": (lambda: Turned(N, N), "float"),
    "honest": (lambda: Honest(N, N), "float"),
    "linear": (lambda: nn.Linear(N, N), "float"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("stored", BASES)
def test_rows_and_products_are_those_of_what_the_base_multiplies_by(stored):
    torch.manual_seed(0)
    module = BASES[stored][0]().requires_grad_(False)
    with torch.no_grad():
        weight = (module(torch.eye(N)) - module(torch.zeros(1, N))).t().double()
    for base in (linear_base(module), base_weight(module, (N, N))):
        assert base.kind == BASES[stored][1]
        torch.testing.assert_close(base.row_sq(), weight.square().sum(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(base.dense(torch.float64), weight, rtol=1e-4, atol=1e-5)
        x = torch.randn(3, N)
        torch.testing.assert_close(base.apply_rows(x).double(), weight @ x.double().t(), rtol=1e-4, atol=1e-4)
    assert base.fusable(torch.randn(2, N)) == (stored == "linear")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("stored", BASES)
def test_ggpo_over_such_a_base(stored):
    torch.manual_seed(0)
    module = BASES[stored][0]().requires_grad_(False)
    with torch.no_grad():
        weight = (module(torch.eye(N)) - module(torch.zeros(1, N))).t().double()
    model = peft(Net(module), ["fc"], None)
    optimizer = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.3, seed=1)
    (layer,) = lora_layers(model)
    (adapter,) = layer.adapters()
    dense = weight + adapter.scaling * (adapter.B @ adapter.A).detach().double()
    (std,) = optimizer.row_std().values()
    torch.testing.assert_close(std.double(), expected_std(dense, 0.3), rtol=1e-4, atol=0)
    model(torch.randn(4, N)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "stored", [name for name, (_, kind) in BASES.items() if kind == "opaque" and "norm" not in name]
)
def test_such_a_base_is_not_written_to(stored):
    module = BASES[stored][0]()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ValueError, match="can't be written"):
        base_weight(module, (N, N)).write(torch.zeros(N, N))
    model = nn.Sequential(GraLoRALinear(module, r=4, k=2))
    with pytest.raises(ValueError, match="can't be merged into"):
        merge_gralora(model)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_a_base_is_asked_once_and_left_as_it_is():
    calls = []

    class Counted(Honest):
        def forward(self, x):
            calls.append(self.training)
            return super().forward(x)

    model = peft(Net(Counted(N, N)), ["fc"], None)
    stream = torch.get_rng_state()
    for _ in range(3):
        (layer,) = lora_layers(model)
        assert layer.base.kind == "float"
    assert calls == [False] and model.base_model.model.fc.base_layer.training
    assert torch.equal(torch.get_rng_state(), stream)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_dora_over_int8_is_refused():
    model = peft(Net(quantised(nn.Linear(N, N), "int8")), ["fc"], None, use_dora=True)
    with pytest.raises(ValueError, match=r"layer 'base_model.model.fc', a Linear: DoRA over a bitsandbytes 8-bit"):
        lora_layers(model)


@pytest.mark.parametrize("method", [GGPOOptimizer, LoRASAMOptimizer])
def test_weights_that_accelerate_offloads_are_refused(method):
    accelerate = pytest.importorskip("accelerate")
    model = peft(Net(nn.Linear(N, N)), ["fc"], None)
    params = trainable(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"layer 'base_model.model.fc'.*Accelerate keeps its weights off the model"):
        method(torch.optim.SGD([*params, *trainable(model)], lr=0.1), model)


def test_a_variant_is_named(caplog):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        nn.ModuleDict({"a": nn.Linear(N, N), "b": nn.Linear(N, N)}), LoraConfig(r=2, target_modules=["a"])
    )
    model.add_adapter(
        "other", LoraConfig(r=2, target_modules=["b"], task_type="CAUSAL_LM", alora_invocation_tokens=[1])
    )
    model.base_model.set_adapter(["default", "other"])
    with caplog.at_level("WARNING", "flatlora"):
        assert [layer.name.rsplit(".", 1)[1] for layer in lora_layers(model)] == ["a"]
    assert "b (PEFT's ALoraLinearVariant)" in caplog.text


def test_an_inactive_adapter_of_another_variant_hides_no_other():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Net(nn.Linear(N, N)), LoraConfig(r=2, target_modules=["fc"]))
    model.add_adapter(
        "other", LoraConfig(r=2, target_modules=["fc"], task_type="CAUSAL_LM", alora_invocation_tokens=[1])
    )
    (layer,) = lora_layers(model)
    assert layer.names == {"default"} and [a.name for a in layer.adapters()] == ["default"]
    with pytest.raises(ValueError, match=r"no adapted linear layer .*other: of another kind"):
        lora_layers(model, "other")
    model.base_model.set_adapter("other")
    with pytest.raises(ValueError, match=r"no adapted linear layer .*PEFT's ALoraLinearVariant"):
        lora_layers(model)


# --- written through .data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["in place", "another tensor", "the adapter's reset alone"])
def test_what_is_written_through_data_is_noticed(way):
    """ReLoRA: the update is added to the base weight, and the adapter begins anew."""
    torch.manual_seed(0)
    model = one_layer()
    fc = model.base_model.model.fc
    optimizer = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.3, beta=0.0, seed=1)
    x = torch.randn(4, 7, dtype=torch.float64)
    for _ in range(3):
        model(x)
        weight = fc.base_layer.weight.detach() + fc.scaling["default"] * (
            fc.lora_B["default"].weight @ fc.lora_A["default"].weight
        )
        (std,) = optimizer.row_std().values()
        torch.testing.assert_close(std.double(), expected_std(weight.detach(), 0.3), rtol=1e-9, atol=0)
        if way == "in place":
            fc.base_layer.weight.data += weight.detach()
        elif way == "another tensor":
            fc.base_layer.weight.data = 2 * weight.detach()
        fc.lora_B["default"].weight.data.zero_()
