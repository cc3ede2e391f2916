"""Base weights, read and written whatever they are stored as."""

import pytest
import torch
import torch.nn.functional as F
from helpers import base_weight as stored_weight
from helpers import noise_of
from models import IntLinear, Net, peft, quantised
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatlora import GGPOOptimizer, lora_layers
from flatlora.layers.bases import BASES, base_weight
from flatlora.reference import ggpo_std as expected_std

M, N = 48, 80


class GPTQLike(nn.Module):
    """As GPTQ's layers: codes and scales are buffers, there is no parameter and no `weight`."""

    def __init__(self, m=M, n=N, dtype=torch.float64):
        super().__init__()
        self.in_features, self.out_features = n, m
        self.register_buffer("qweight", torch.randint(0, 16, (n, m), dtype=torch.int32))
        self.register_buffer("scales", torch.rand(1, m, dtype=dtype) + 0.5)
        self.register_buffer("bias", torch.randn(m, dtype=dtype))

    def dense(self):
        return ((self.qweight - 8) * self.scales).t().double()

    def forward(self, x):
        assert x.dtype == self.scales.dtype  # refuses others, as kernels do
        return x @ ((self.qweight - 8) * self.scales) + self.bias


class AWQLike(nn.Module):
    """As AWQ's layers: integer parameters that pack two codes in one, and no `weight`."""

    def __init__(self, m=M, n=N, dtype=torch.float64):
        super().__init__()
        self.in_features, self.out_features = n, m
        self.qweight = nn.Parameter(torch.randint(0, 256, (m, n // 2), dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.rand(m, 1, dtype=dtype) + 0.5, requires_grad=False)

    def dense(self):
        codes = torch.stack([self.qweight & 15, self.qweight >> 4], 2).flatten(1)
        return ((codes.int() - 8) * self.scales).double()

    def forward(self, x):
        return F.linear(x, self.dense().to(x.dtype))


def reference(module):
    return module.dense() if isinstance(module, GPTQLike | AWQLike) else stored_weight(module).detach()


STORED = {
    "float32": ("float", lambda: nn.Linear(N, M)),
    "float64": ("float", lambda: nn.Linear(N, M).double()),
    "bfloat16": ("float", lambda: nn.Linear(N, M).bfloat16()),
    "conv1d": ("float", lambda: Conv1D(M, N)),
    "nf4": ("4bit", lambda: quantised(nn.Linear(N, M), "nf4")),
    "fp4": ("4bit", lambda: quantised(nn.Linear(N, M), "fp4")),
    "int8": ("8bit", lambda: quantised(nn.Linear(N, M), "int8")),
    "codes": ("opaque", lambda: IntLinear(M, N)),
    "gptq": ("opaque", lambda: GPTQLike(dtype=torch.float32)),
    "awq": ("opaque", lambda: AWQLike(dtype=torch.float32)),
}


def built(stored):
    module = STORED[stored][1]().requires_grad_(False)
    return module, base_weight(module, (M, N), transposed=stored == "conv1d")


@pytest.mark.parametrize("stored", STORED)
def test_base_weight_equals_the_stored_bits(stored):
    module, base = built(stored)
    assert base.kind == STORED[stored][0]
    assert base.module is module and base.shape == (M, N) and base.device.type == "cpu" and not base.trainable
    weight = reference(module)
    torch.testing.assert_close(base.row_sq(), weight.square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(base.dense(torch.float64), weight, rtol=1e-6, atol=1e-6)
    assert base.dense(torch.float32).dtype == torch.float32
    x = torch.randn(5, N)
    expected = weight @ x.double().t()
    error = (base.apply_rows(x).double() - expected).abs().max() / expected.abs().max()
    assert base.apply_rows(x).shape == (M, 5) and error < 2e-6


@pytest.mark.parametrize("stored", STORED)
def test_products_with_blocks_are_those_of_the_blocks(stored):
    module, base = built(stored)
    x = torch.randn(2, 2, 3, N // 2)
    grid = reference(module).unflatten(0, (2, -1)).unflatten(2, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(base.apply_blocks(x).double(), grid @ x.double().mT, rtol=1e-4, atol=1e-4)


def test_int8_scales_are_found_before_and_after_the_first_forward():
    module, base = built("int8")
    before = base.row_sq()
    module(torch.randn(2, N))
    assert torch.equal(base.row_sq(), before)
    torch.testing.assert_close(before, stored_weight(module).square().sum(1), rtol=1e-6, atol=0)


def test_weights_larger_than_a_block_are_summed_completely():
    module = nn.Linear(1000, 700).bfloat16()
    base = base_weight(module, (700, 1000))
    weight, x = module.weight.detach().double(), torch.randn(3, 1000)
    torch.testing.assert_close(base.row_sq(), weight.square().sum(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(base.apply_rows(x), (weight @ x.double().t()).float(), rtol=1e-4, atol=1e-5)


def test_only_a_float_weight_is_handed_out_itself():
    module, base = built("conv1d")
    assert base.float_weight().data_ptr() == module.weight.data_ptr() and base.float_weight().shape == (M, N)
    for stored in ("nf4", "int8", "gptq"):
        module, base = built(stored)
        with pytest.raises(TypeError, match=rf"{type(module).__name__} .*\({base.kind}\).*dense\(\)"):
            base.float_weight()


def test_a_weight_is_read_as_it_is_stored_when_it_is_read():
    import bitsandbytes as bnb

    fc = bnb.nn.Linear4bit(64, 32, quant_type="nf4")  # quantised when it is moved
    before = fc.weight.data.clone()
    model = get_peft_model(Net(fc), LoraConfig(r=4, target_modules=["fc"]))
    (layer,) = lora_layers(model)
    assert layer.base.kind == "float" and torch.equal(layer.base.dense(torch.float32), before)
    model.to("cpu")
    assert layer.base.kind == "4bit" and layer.shape == (32, 64)
    torch.testing.assert_close(layer.base.row_sq(), stored_weight(fc).square().sum(1), rtol=1e-6, atol=0)


def test_a_4bit_weight_that_lost_its_state_is_read_by_its_layers():
    module, base = built("nf4")  # FSDP loses it
    before = base.dense(torch.float32)
    module.quant_state, module.weight.quant_state = module.weight.quant_state, None
    base = base_weight(module, (M, N))
    assert base.kind == "4bit" and torch.equal(base.dense(torch.float32), before)


# --- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "rounding"),
    [("float32", 0), ("float64", 0), ("bfloat16", 2**-8), ("conv1d", 0), ("nf4", 0.3), ("fp4", 0.4), ("int8", 0.02)],
)
def test_a_weight_is_written_as_the_old_one_was_stored(stored, rounding):
    module, base = built(stored)
    old, before = module.weight, base.dense(torch.float32).clone()
    new = torch.randn(M, N)
    x = torch.randn(3, N).to(old.dtype if old.is_floating_point() else torch.float32)
    module(x)  # bitsandbytes' 8-bit layers remember the old weight
    base.write(new)
    assert base_weight(module, (M, N), stored == "conv1d").kind == base.kind
    assert (base.dense(torch.float32) - new).norm() <= rounding * new.norm()
    assert type(module.weight) is type(old) and module.weight.shape == old.shape and module.weight.dtype == old.dtype
    assert not module.weight.requires_grad and module.weight.is_contiguous()
    out = module(x).double() - (0 if module.bias is None else module.bias.double())
    torch.testing.assert_close(out, x.double() @ stored_weight(module).t(), rtol=2e-2, atol=2e-1)
    if base.kind == "float":  # what else holds the old weight keeps it
        assert torch.equal(old.float(), before.t() if stored == "conv1d" else before)


def test_what_is_written_keeps_its_settings():
    module, base = built("nf4")
    old = module.weight.quant_state
    base.write(torch.randn(M, N))
    new = module.weight.quant_state
    assert (new.quant_type, new.blocksize, new.nested, new.dtype, new.shape) == (
        old.quant_type, old.blocksize, old.nested, old.dtype, old.shape,
    )  # fmt: skip


def unquantised():
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(N, M, quant_type="nf4")


@pytest.mark.parametrize(
    ("build", "shape", "words"),
    [
        (lambda: GPTQLike(), (M, N), ["GPTQLike", "can't be written", "float model"]),
        (lambda: IntLinear(M, N), (M, N), ["IntLinear", "can't be written"]),
        (unquantised, (M, N), ["Linear4bit", "Params4bit", "move the model to its device first"]),
        (lambda: nn.Linear(N, M), (N, M), ["(80, 48)", "Linear", "(48, 80)"]),
        (lambda: quantised(nn.Linear(N, M), "nf4"), (M, N + 1), ["(48, 81)", "Linear4bit", "(48, 80)"]),
        (lambda: quantised(nn.Linear(N, M), "int8"), (M,), ["(48,)", "Linear8bitLt", "(48, 80)"]),
    ],
)
def test_what_cannot_be_written_is_refused_and_stays(build, shape, words):
    module = build()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ValueError) as error:
        base_weight(module, (M, N)).write(torch.zeros(shape))
    assert all(word in str(error.value) for word in words), error.value
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


# --- may it be fused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED)
def test_only_a_frozen_plain_base_that_nobody_listens_to_is_fused(stored):
    module, base = built(stored)
    dtype = module.weight.dtype if base.kind == "float" else torch.float32
    x = torch.randn(2, N).to(dtype)
    assert base.fusable(x) == base.plain == (base.kind != "opaque")
    hook = module.register_forward_hook(lambda *_: None)
    assert not base.fusable(x)
    hook.remove()
    module.forward = module.forward
    assert not base.fusable(x)
    del module.forward
    assert base.fusable(x) == base.plain
    if base.kind == "float":
        assert not base.fusable(x.half())  # refused by the layer
        with torch.autocast("cpu", torch.bfloat16):
            assert base.fusable(x.half())
        module.requires_grad_(True)
        assert base.trainable and not base.fusable(x)


def test_a_class_with_a_forward_of_its_own_is_not_fused():
    import bitsandbytes as bnb

    for stored, cls in (("float32", nn.Linear), ("nf4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt)):
        module, _ = built(stored)
        assert base_weight(module, (M, N)).fusable(torch.randn(2, N))
        module.__class__ = type("Other", (cls,), {"forward": lambda self, x: 2 * self.bias})
        assert not base_weight(module, (M, N)).fusable(torch.randn(2, N))


# --- bases that can only be applied -------------------------------------------------------------------------------


class ChildLoRA(nn.Module):
    """A LoRA layer of another library over any base."""

    def __init__(self, base, r=4):
        super().__init__()
        self.base, self.scaling = base, 1.5
        self.lora_A = nn.Parameter(torch.randn(r, N, dtype=torch.float64) / N**0.5)
        self.lora_B = nn.Parameter(torch.randn(M, r, dtype=torch.float64) * 0.3)

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.lora_A.t() @ self.lora_B.t())


def peft_layer(cls):
    def build(base):
        layer = cls(base, "default", LoraConfig(r=4, lora_alpha=6), r=4, lora_alpha=6).double()
        nn.init.normal_(layer.lora_B["default"].weight, 0, 0.3)
        return layer

    return build


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
@pytest.mark.parametrize("adapt", [peft_layer(GPTQLoraLinear), peft_layer(AwqLoraLinear), ChildLoRA])
@pytest.mark.parametrize("stored", [GPTQLike, AWQLike])
def test_ggpo_over_a_base_without_a_weight(stored, adapt, noise):
    base = stored()
    model = Net(adapt(base)).train()
    (layer,) = lora_layers(model)
    assert layer.base.kind == "opaque" and layer.shape == (M, N) and "opaque" in repr(layer)
    (adapter,) = layer.adapters()
    optimizer = GGPOOptimizer(
        torch.optim.SGD([adapter.A_param, adapter.B_param], lr=0.1), model, sigma=0.3, noise=noise, seed=1
    )
    weight = base.dense() + adapter.scaling * (adapter.B @ adapter.A).detach()
    torch.testing.assert_close(optimizer.row_std()["fc"].double(), expected_std(weight, 0.3), rtol=1e-6, atol=0)
    x = torch.randn(6, N, dtype=torch.float64, requires_grad=True)
    noisy = weight + noise_of(optimizer)
    out = model(x)
    bias = getattr(base, "bias", 0.0)
    torch.testing.assert_close(out, x @ noisy.t() + bias, rtol=1e-9, atol=1e-9)
    target = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, target)
    torch.testing.assert_close(grad, target @ noisy, rtol=1e-9, atol=1e-9)
    model.eval()
    torch.testing.assert_close(model(x), x @ weight.t() + bias, rtol=1e-9, atol=1e-9)


def test_an_opaque_layer_that_is_its_own_base_is_left_alone():
    class Own(GPTQLike):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, N)), nn.Parameter(torch.randn(M, 4))
            self.scaling = 1.0

    with pytest.raises(ValueError, match=r"no adapted linear layer .*fc"):  # asked, it would answer with its adapter
        lora_layers(Net(Own()))


def test_a_layer_without_any_tensor_says_so():
    class Nothing(nn.Module):
        pass

    with pytest.raises(ValueError, match="Nothing holds no parameter and no buffer"):
        _ = base_weight(Nothing(), (M, N)).device


def test_every_kind_of_base_is_in_the_table_once():
    kinds = [cls.kind for cls in BASES]
    assert sorted(kinds) == ["4bit", "8bit", "float", "opaque"] and kinds[-1] == "opaque"


def check_ggpo(net, weight, tolerance):
    """Row norms, outputs and gradients over `net.fc`, whose dequantised weight is given, by a float64 reference."""
    bias, dtype = net.fc.bias.detach().double(), net.fc.bias.dtype
    model = peft(net, ["fc"], None)
    (layer,) = lora_layers(model)
    assert layer.base.kind == "opaque" and layer.shape == weight.shape
    (adapter,) = layer.adapters()
    optimizer = GGPOOptimizer(torch.optim.SGD([adapter.A_param, adapter.B_param], lr=0.1), model, sigma=0.3, seed=1)
    dense = weight.double() + adapter.scaling * (adapter.B @ adapter.A).detach().double()
    torch.testing.assert_close(optimizer.row_std()[layer.name].double(), expected_std(dense, 0.3), rtol=1e-2, atol=0)
    x = torch.randn(6, weight.shape[1]).to(dtype)
    out, expected = model(x), x.double() @ (dense + noise_of(optimizer, dtype=dtype).double()).t() + bias
    assert (out.double() - expected).norm() < tolerance * expected.norm()
    out.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (adapter.A_param, adapter.B_param))
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_int8_weights(config, dtype):
    quantization = pytest.importorskip("torchao.quantization")
    net = Net(nn.Linear(N, M)).to(dtype).requires_grad_(False)
    quantization.quantize_(net, getattr(quantization, config)())
    check_ggpo(net, net.fc.weight.dequantize(), 2e-2 if "Dynamic" in config or dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_int4_weights(dtype):
    quantization = pytest.importorskip("torchao.quantization")
    workflow = pytest.importorskip("torchao.prototype.quantization.int4.inference_workflow")  # the one for CPUs
    net = Net(nn.Linear(96, M)).to(dtype).requires_grad_(False)
    exact = net.fc.weight.double()
    quantization.quantize_(net, workflow.PrototypeInt4WeightOnlyConfig(group_size=32))
    weight = (net.fc(torch.eye(96, dtype=dtype)) - net.fc.bias).t().double()  # it can't be dequantised
    assert (weight - exact).norm() < 0.2 * exact.norm()
    check_ggpo(net, weight, 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hqq_weights(dtype):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
    net = Net(quantize.HQQLinear(nn.Linear(N, M), config, compute_dtype=dtype, device="cpu"))
    assert not hasattr(net.fc, "weight")
    check_ggpo(net, net.fc.dequantize(), 2e-2 if dtype == torch.bfloat16 else 1e-5)
