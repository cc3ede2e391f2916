"""The GraLoRA layer against PEFT's and against a loop over its blocks, and what the paper claims of it."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from gralora_models import dense_delta, gradients, gralora_parameters, layer, peft_layer
from peft import GraloraConfig
from peft.tuners.gralora.layer import Linear as PeftGraLoRA
from torch import nn

from flatlora import GraLoRALinear

bnb = pytest.importorskip("bitsandbytes")


# --- the layer --------------------------------------------------------------------------------------------------------


MATRIX = [
    (r, k, hybrid, bias, kind, shape)
    for (r, k), hybrid in itertools.product([(8, 1), (8, 2), (8, 4), (4, 4)], [0, 3])
    for bias, kind, shape in [
        (True, "float64", (2, 5)),
        (False, "float32", (3, 4)),
        (True, "float32", (6,)),
        (True, "conv1d", (2, 5)),
        (False, "bf16", (2, 5)),
    ]
]


@pytest.mark.parametrize(("r", "k", "hybrid", "bias", "kind", "shape"), MATRIX)
def test_outputs_and_gradients_are_pefts(r, k, hybrid, bias, kind, shape):
    ours = layer(kind, bias=bias, r=r, k=k, hybrid_r=hybrid)
    dtype = torch.bfloat16 if kind == "bf16" else ours.gralora_A.dtype
    x = torch.randn(*shape, 16).to(dtype)
    out, grad_x, grads = gradients(ours, x)
    expected_out, expected_x, expected = gradients(peft_layer(ours), x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert out.dtype == expected_out.dtype and grad_x.dtype == expected_x.dtype
    for found, want in [(out, expected_out), (grad_x, expected_x), *zip(grads, expected, strict=True)]:
        assert found.dtype == want.dtype and found.shape == want.shape
        torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "double", "int8"])
@pytest.mark.parametrize("hybrid", [0, 4])
def test_quantised_outputs_and_gradients_are_pefts_over_the_dequantised_weight(kind, hybrid):
    # PEFT's own layer adds in place into what bitsandbytes returns, which autograd refuses: it has no gradient.
    ours = layer(kind, m=128, n=64, r=8, k=4, hybrid_r=hybrid)
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peft_layer(ours)(x), rtol=1e-4, atol=1e-4)
    out, grad_x, grads = gradients(ours, x)
    dequantised = copy.deepcopy(ours)
    dequantised.base_layer = nn.Linear(64, 128).requires_grad_(False)
    dequantised.base_layer.weight.data = ours.base.dense(torch.float32)
    dequantised.base_layer.bias.data = ours.bias.data
    expected_out, expected_x, expected = gradients(peft_layer(dequantised), x)
    for found, want in [(out, expected_out), (grad_x, expected_x), *zip(grads, expected, strict=True)]:
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_under_autocast_outputs_and_gradients_are_pefts(dtype, kind):
    ours = layer(kind, m=128, n=64, r=8, k=4, hybrid_r=4)
    x = torch.randn(3, 5, 64)
    with torch.autocast("cpu", dtype):
        out, grad_x, grads = gradients(ours, x)  # backward inside the context as well
        assert out.dtype == ours.base_layer(x).dtype
    # PEFT's layer adds in place to what bitsandbytes returns over NF4, a view: torch refuses that or, as 2.6 under
    # autocast, computes a wrong gradient of x. There our own layer without autocast is the measure.
    expected_out, expected_x, expected = gradients(peft_layer(ours) if kind == "float32" else ours, x)
    for found, want in [(out.float(), expected_out), (grad_x, expected_x), *zip(grads, expected, strict=True)]:
        torch.testing.assert_close(found, want.float(), rtol=0.05, atol=0.02 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters(dtype):
    ours = layer("float32")
    x = torch.randn(2, 5, 16)
    expected = ours(x)
    half = ours.to(dtype)
    out, grad_x, grads = gradients(half, x.to(dtype))
    assert {out.dtype, grad_x.dtype, *(grad.dtype for grad in grads)} == {dtype}
    torch.testing.assert_close(out.float(), expected.detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (2, 3, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize(("k", "hybrid"), [(1, 0), (2, 0), (4, 3), (8, 0)])
@pytest.mark.parametrize("kind", ["float64", "conv1d"])
def test_equals_a_loop_over_blocks(shape, k, hybrid, kind):
    ours = layer(kind, r=8, k=k, hybrid_r=hybrid).double()
    if kind == "conv1d" and not shape:
        shape = (1,)  # transformers' Conv1D takes no vector
    x = torch.randn(*shape, 16, dtype=torch.float64)
    out, grad_x, grads = gradients(ours, x)

    weight = ours.base_layer.weight.t() if kind == "conv1d" else ours.base_layer.weight
    reference = copy.deepcopy(ours)
    reference.forward = lambda x: F.linear(x, weight + dense_delta(reference), ours.base_layer.bias)
    expected_out, expected_x, expected = gradients(reference, x)
    for found, want in [(out, expected_out), (grad_x, expected_x), *zip(grads, expected, strict=True)]:
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.delta_weight(), dense_delta(ours).detach(), rtol=1e-12, atol=1e-12)


def test_inputs_that_are_not_contiguous():
    ours = layer()
    x = torch.randn(16, 5, 3, dtype=torch.float64)
    contiguous = gradients(ours, x.permute(1, 2, 0).contiguous())
    strided = gradients(ours, x.permute(1, 2, 0))
    expanded = ours(x[:, :1, :1].permute(1, 2, 0).expand(5, 3, 16))
    torch.testing.assert_close(strided[0], contiguous[0])
    torch.testing.assert_close(strided[2], contiguous[2])
    torch.testing.assert_close(expanded[4, 2], ours(x[:, 0, 0]))
    out = ours(x.permute(1, 2, 0))
    upstream = torch.randn(5, 3, 1, dtype=torch.float64).expand(5, 3, 24)
    grads = [torch.autograd.grad(out, ours.gralora_B, g, retain_graph=True)[0] for g in (upstream, upstream.clone())]
    torch.testing.assert_close(*grads)


def test_starts_as_the_base_layer_with_pefts_initial_values():
    torch.manual_seed(5)
    ours = GraLoRALinear(nn.Linear(16, 24), r=8, k=4, hybrid_r=2)
    torch.manual_seed(5)
    theirs = PeftGraLoRA(nn.Linear(16, 24), "default", "fc", GraloraConfig(r=8, gralora_k=4, hybrid_r=2), r=8)
    for (name, own), (_, parameter) in zip(gralora_parameters(ours), gralora_parameters(theirs), strict=True):
        assert torch.equal(own, parameter), name
    x = torch.randn(3, 16)
    assert torch.equal(ours(x), ours.base_layer(x))
    assert ours.scaling == theirs.scaling["default"]


def test_dropout_is_pefts_and_off_in_eval():
    ours = layer("float32", hybrid_r=4, dropout=0.4)
    theirs = peft_layer(ours)
    theirs.gralora_dropout["default"] = nn.Dropout(0.4)
    x = torch.randn(2, 5, 16)
    torch.manual_seed(1)
    out = ours(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out, theirs(x))
    assert not torch.allclose(out, ours(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_an_output_that_someone_holds_is_not_written_to():
    ours = layer()
    held = []
    ours.base_layer.register_forward_hook(lambda module, args, out: held.append(out))
    x = torch.randn(3, 16, dtype=torch.float64)
    ours(x)
    torch.testing.assert_close(held[0], F.linear(x, ours.weight, ours.bias))


def test_an_int8_matmul_of_a_float_weight_is_not_bypassed():
    base = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True)
    x = torch.randn(3, 64)
    assert torch.equal(GraLoRALinear(base, r=8, k=4)(x), base(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_input_that_the_base_refuses_is_refused(training, dropout):
    with pytest.raises(RuntimeError, match="dtype"):
        layer("float32", dropout=dropout).train(training)(torch.randn(3, 16, dtype=torch.float64))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_base_that_is_unfrozen_gets_its_gradient(part):
    ours = layer()
    parameter = getattr(ours.base_layer, part).requires_grad_(True)
    x, upstream = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    _, grad_x, _ = gradients(ours, x, upstream)
    found, parameter.grad = parameter.grad, None
    x.requires_grad_(True)
    expected = F.linear(x, ours.weight + dense_delta(ours).detach(), ours.bias)
    torch.testing.assert_close([grad_x, found], list(torch.autograd.grad(expected, [x, parameter], upstream)))


def test_copies_and_moves():
    ours = layer(hybrid_r=2)
    x = torch.randn(3, 16, dtype=torch.float64)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), ours(x))
        assert other.gralora_A.data_ptr() != ours.gralora_A.data_ptr()
    assert ours.to(torch.float32)(x.float()).dtype == torch.float32
    assert {parameter.device.type for parameter in ours.to("meta").parameters()} == {"meta"}


# --- what the paper claims --------------------------------------------------------------------------------------------


def test_rank_reaches_k_times_r():
    ours = layer(m=64, n=64, r=8, k=4)
    assert torch.linalg.matrix_rank(ours.delta_weight()) == 32
    lora = layer(m=64, n=64, r=8, k=1)  # one block is LoRA
    assert torch.linalg.matrix_rank(lora.delta_weight()) == 8
    assert ours.gralora_A.numel() + ours.gralora_B.numel() == lora.gralora_A.numel() + lora.gralora_B.numel()


def test_an_outlier_reaches_its_own_block_column_alone():
    k, q, column = 4, 2, 1
    for blocks, width in ((k, 4), (1, 16)):
        ours = layer(r=8, k=blocks)
        x = torch.randn(20, 16, dtype=torch.float64)
        outlier = x.clone()
        outlier[:, 5] += 100  # input 5 is in block column 1 of 4
        upstream = torch.randn(20, 24, dtype=torch.float64)
        _, _, (grad_A, grad_B) = gradients(ours, x, upstream)
        _, _, (outlier_A, outlier_B) = gradients(ours, outlier, upstream)
        changed_A = (grad_A - outlier_A).abs().amax((1, 2)) > 1e-9
        changed_B = (grad_B - outlier_B).abs().amax(2) > 1e-9  # rows j·r/k to (j+1)·r/k belong to block column j
        assert changed_A.tolist() == [j == 5 // width for j in range(blocks)]
        if blocks == k:
            assert changed_B.tolist() == [[j // q == column for j in range(8)]] * k
        else:
            assert changed_B.all()
