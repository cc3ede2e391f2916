"""What differs between kinds of accelerators: float64, mixed products, random streams, the capture of CUDA graphs.

Tests are run on a CUDA device too; without one, what a device would do is put in its place.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers import sgd
from methods import PERTURBING, adapted, batch, every_method, gralora, lora
from models import llama, quantise, quantised
from torch import nn

from flatlora import lora_layers
from flatlora.kernels.draw import Draw, draw_gaussian, draw_low_rank, refuse_capture
from flatlora.kernels.low_rank import Added, AddedTerms
from flatlora.layers import base
from flatlora.layers.base import stacked_row_sq
from flatlora.layers.bases import base_weight
from flatlora.layers.bnb import Bnb4bitBase
from flatlora.layers.stack import base_products, bfloat16_parts, stacks
from flatlora.streams import RandomStreams, private_streams

# --- float64 --------------------------------------------------------------------------------------------------------


def test_a_kind_of_device_is_asked_for_float64_once(device, monkeypatch):
    monkeypatch.setattr(base, "_float64", dict(base._float64))
    asked = []

    def ones(*size, device, **options):
        asked.append(device)
        if device == "hpu":
            raise RuntimeError("double is not supported on this device")
        return torch.zeros(1)

    monkeypatch.setattr(torch, "ones", ones)
    for _ in range(2):
        assert base.sum_dtype(torch.device("xpu", 1)) == torch.float64
        assert base.sum_dtype(torch.device("hpu")) == torch.float32
        assert base.sum_dtype(torch.device("mps")) == torch.float32
        assert base.sum_dtype(torch.device("cuda", 1)) == base.sum_dtype(device) == torch.float64
    assert asked == ["xpu", "hpu"]


def test_a_graph_gets_the_dtype_as_a_constant(device, monkeypatch):
    monkeypatch.setattr(base, "_float64", {})  # as for a kind that has not been asked
    torch._dynamo.reset()
    widened = torch.compile(lambda x: x.to(base.sum_dtype(x.device)), backend="eager", fullgraph=True)
    assert widened(torch.ones(2, device=device)).dtype == torch.float64


# --- products of bfloat16 weights and float32 -------------------------------------------------------------------------


BASES = {"bf16": base.FloatBase, "nf4": Bnb4bitBase}


@pytest.fixture
def mixing(device, monkeypatch):
    """On a CPU, the kernel that CUDA has; and nothing is widened in blocks."""
    if not hasattr(torch.ops.aten.mm, "dtype") or (device.type == "cuda" and torch.version.hip is not None):
        pytest.skip("torch has the kernel from version 2.8 on, and not for ROCm")
    library = torch.library.Library("aten", "IMPL")
    if device.type == "cpu":
        library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    for kind in BASES.values():
        monkeypatch.setattr(kind, "mixes", property(lambda base: base.stored_dtype == torch.bfloat16))
        monkeypatch.setattr(kind, "_row_blocks", None)
    yield
    library._destroy()


def test_three_bfloat16_tensors_are_a_float32_one_to_the_bit(device):
    a = torch.randn(100, 1000, device=device) * torch.logspace(-30, 30, 1000, device=device)
    parts = bfloat16_parts(a)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), a.double())


def relative(found, expected):
    return float(((found.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("adapt", [lora, gralora])
def test_a_bf16_base_is_multiplied_without_a_float32_copy(adapt, kind, device, mixing):
    """As a whole and in blocks, and as exactly as in float32."""
    if kind == "nf4" and device.type != "cpu":
        needs_kernels_of_bitsandbytes()
    torch.manual_seed(0)
    model = llama(64, num_hidden_layers=2).to(torch.bfloat16)
    model = adapt(quantise(model, "nf4") if kind == "nf4" else model, r=4, dropout=0.0).to(device)
    stack = next(stack for stack in stacks(lora_layers(model)) if len(stack.layers) == 2)
    assert all(type(layer.base) is BASES[kind] for layer in stack.layers)
    grid = stack.adapters[0][0].k
    assert grid == (2 if adapt is gralora else 1)
    a = torch.stack([adapters[0].blocks(grid)[0] for adapters in stack.adapters]).float() * 1.1
    found = base_products(stack.layers, a)
    weights = torch.stack([layer.base.dense(torch.float64) for layer in stack.layers])
    blocks = weights.unflatten(2, (grid, -1)).unflatten(1, (grid, -1)).transpose(2, 3)
    expected = blocks @ a.double().mT
    assert found.dtype == torch.float32 and found.shape == expected.shape
    in_float32, in_bfloat16 = blocks.float() @ a.mT, blocks @ a.bfloat16().double().mT
    assert relative(found, expected) < 2 * relative(in_float32, expected) < 1e-6
    assert relative(in_bfloat16, expected) > 1e-4


def needs_kernels_of_bitsandbytes():
    if torch.cuda.get_device_name() == "fake":
        pytest.skip("the stand-in for CUDA has no kernels of bitsandbytes'")


def test_bf16_rows_have_products_that_are_not_rounded(device, mixing):
    linear = nn.Linear(96, 80).to(device, torch.bfloat16)
    stored, x = base_weight(linear, (96, 80), True), torch.randn(3, 80, device=device).bfloat16()
    found, expected = stored.apply_rows(x), stored.dense(torch.float64) @ x.double().t()
    assert found.dtype == torch.float32 and relative(found, expected) < 1e-6


def test_only_a_bf16_weight_on_cuda_mixes(device):
    kernel = device.type == "cuda" and torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        stored = base_weight(nn.Linear(4, 4).to(device, dtype), (4, 4))
        assert stored.mixes == (kernel and dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["float", "Conv1D", "nf4", "int8"])
def test_norms_by_one_kernel_are_those_in_float64(kind, dtype, device):
    linear = nn.Linear(128, 96).to(dtype)
    if kind in ("nf4", "int8"):
        if dtype not in (torch.bfloat16, torch.float16) or device.type != "cpu":
            pytest.skip("quantised weights are dequantised to half precision; by kernels of bitsandbytes'")
        linear = quantised(linear, kind)
    elif kind == "Conv1D":
        linear.weight = nn.Parameter(linear.weight.t().contiguous())
    stored = base_weight(linear.to(device), (96, 128), kind == "Conv1D", (nn.Linear.forward, True))
    expected = stored.dense(torch.float64).square().sum(1)
    torch.testing.assert_close(stored.row_norms().double().square(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stacked_row_sq([stored, stored])[1], expected, rtol=1e-6, atol=0)


def test_sums_over_a_half_precision_base_are_wide_and_rounded_once(device):
    """Of output and input's gradient, which are added to as they are, without a copy in the adapters' float32."""
    x, W, g = (torch.randn(*size, device=device).bfloat16() for size in ((7, 96), (80, 96), (7, 80)))
    A, B = torch.randn(4, 96, device=device, requires_grad=True), torch.randn(80, 4, device=device, requires_grad=True)
    x.requires_grad_()
    plan = AddedTerms(torch.float32, (0.5,), grad_scale=(1.0,), weight=lambda stored: stored)
    out = Added.apply(plan, None, x, W, None, A, B)
    (grad,) = torch.autograd.grad(out, x, g)
    expected = (
        (x @ W.t()).float() + 0.5 * (x.float() @ A.t()) @ B.t(),
        (g @ W).float() + 0.5 * (g.float() @ B) @ A,
    )
    for found, wide in zip((out, grad), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found != wide.bfloat16()).float().mean() < 0.01  # where float32 is summed in another order


# --- random streams ---------------------------------------------------------------------------------------------------


class OneDevice:
    """A module such as `torch.mps`, with one stream."""

    count, current = 1, 0

    def __init__(self):
        self.generators = [torch.Generator().manual_seed(i) for i in range(self.count)]

    def get_rng_state(self, device):
        return self.generators[device.index or 0].get_state()

    def set_rng_state(self, state, device):
        self.generators[device.index or 0].set_state(state)

    def manual_seed(self, seed):
        self.generators[self.current].manual_seed(seed)

    def draw(self):
        return [float(torch.rand((), generator=generator)) for generator in self.generators]


class TwoDevices(OneDevice):
    """A module such as `torch.xpu`, of whose devices one is the current one."""

    count = 2

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device.index or 0
        yield
        self.current = before


def test_the_streams_of_any_accelerator_are_held_and_put_back(device, monkeypatch):
    modules = {"xpu": TwoDevices(), "mps": OneDevice()}
    monkeypatch.setattr(torch, "get_device_module", lambda device: modules[device.type])
    devices = [torch.device(name) for name in ("xpu:0", "xpu:1", "mps", "cpu", "meta")]
    streams = RandomStreams(devices)
    first = [module.draw() for module in modules.values()]
    streams.restore()
    with private_streams(5, devices):
        private = [number for module in modules.values() for number in module.draw()]
    assert [module.draw() for module in modules.values()] == first
    assert private == [float(torch.rand((), generator=torch.Generator().manual_seed(5)))] * 3


def test_a_device_without_a_stream_that_is_known_is_an_error(device, monkeypatch):
    with pytest.raises(RuntimeError, match=r"torch\.lazy"):
        RandomStreams([torch.device("lazy")])


def test_private_streams_are_those_of_a_seed(device):
    before = torch.rand(3, device=device)
    with private_streams(3, [device]):
        first = torch.rand(3, device=device)
    after = torch.rand(3, device=device)
    torch.manual_seed(0)
    assert torch.equal(before, torch.rand(3, device=device)) and torch.equal(after, torch.rand(3, device=device))
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(3, device=device))


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_noise_is_not_captured(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refuse_capture(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="CUDA graph is being captured"):
        refuse_capture(torch.device("cuda", 1))
    if device.type == "cuda":
        std = torch.ones(4, device=device)
        with pytest.raises(RuntimeError, match="CUDA graph is being captured"):
            draw_gaussian(Draw("gaussian", std, 1), 3, None, torch.float32)
        with pytest.raises(RuntimeError, match="CUDA graph is being captured"):
            draw_low_rank(Draw("low_rank", std, 1, 2), 3, torch.float32)


@every_method(among=[method for method in PERTURBING if method.name != "Bi-LoRA"])
def test_a_step_is_not_captured(method, device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    model = adapted(method)
    optimizer = method.start(model, sgd)
    data = batch(0)
    model(**data).loss.backward()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="CUDA graph is being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
