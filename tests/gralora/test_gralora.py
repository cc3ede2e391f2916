"""GraLoRA against PEFT's, against a loop over its blocks, and against what its files and merged weights compute."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import pickle
import warnings

import ddp_worker
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import noise_of
from peft import GraloraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.gralora.layer import Linear as PeftGraLoRA
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from flatlora import (
    BiLoRAOptimizer,
    GGPOOptimizer,
    GraLoRALinear,
    apply_gralora,
    attach_auxiliary,
    detach_auxiliary,
    load_gralora,
    lora_layers,
    merge_gralora,
    save_gralora,
    unload_gralora,
)
from flatlora.ggpo.rows import Rows, batches, projected_grad_sq, weight_sq
from flatlora.kernels.draw import draw_gaussian
from flatlora.layers.base import linear_base

bnb = pytest.importorskip("bitsandbytes")
warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

IDS = torch.arange(14).view(2, 7) * 5 % 64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- layers and models ----------------------------------------------------------------------------------------------


def base_layer(kind, m, n, bias=True):
    """A frozen linear layer (m, n) of each kind that is supported."""
    if kind == "conv1d":
        base = Conv1D(m, n)
        nn.init.normal_(base.bias)
        return base
    if kind == "int8":
        base = bnb.nn.Linear8bitLt(n, m, bias=bias, has_fp16_weights=False)
    elif kind in ("nf4", "fp4", "double"):
        quant_type = "fp4" if kind == "fp4" else "nf4"
        base = bnb.nn.Linear4bit(
            n, m, bias=bias, quant_type=quant_type, compress_statistics=kind == "double", compute_dtype=torch.float32
        )
    else:
        return nn.Linear(n, m, bias=bias).to({"float64": torch.float64, "bf16": torch.bfloat16}.get(kind))
    return base.to("cpu")


def randomised(module, size=0.3):
    """Adapters in which no term of a formula vanishes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "gralora_" in name:
                parameter.normal_(0, size)
    return module


def layer(kind="float64", m=24, n=16, bias=True, **settings):
    settings = {"r": 8, "k": 4, "alpha": 12, **settings}
    return randomised(GraLoRALinear(base_layer(kind, m, n, bias), **settings))


def peft_layer(ours):
    """PEFT's layer over a copy of the base, with the same weights in the same types."""
    config = GraloraConfig(r=ours.r, gralora_k=ours.k, alpha=ours.alpha, hybrid_r=ours.hybrid_r)
    config.fan_in_fan_out = isinstance(ours.base_layer, Conv1D)
    theirs = PeftGraLoRA(copy.deepcopy(ours.base_layer), "default", "fc", config, r=ours.r)
    for (_, own), parameter in zip(gralora_parameters(ours), (p for _, p in gralora_parameters(theirs)), strict=True):
        parameter.data = own.detach().clone()
    return theirs


def gralora_parameters(module):
    """Named without the adapter's name, in one order for this library's and PEFT's modules."""
    found = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in module.named_parameters()
        if "gralora_" in name
    }
    return sorted(found.items())


def gradients(module, x, weight=None):
    """Output, gradient of x and gradients of the adapter for a fixed upstream gradient."""
    x = x.clone().requires_grad_(True)
    out = module(x)
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape) if weight is None else weight
    for _, parameter in gralora_parameters(module):
        parameter.grad = None
    out.backward(upstream.to(out.dtype))
    return out.detach(), x.grad, [parameter.grad for _, parameter in gralora_parameters(module)]


def dense_delta(ours):
    """ΔW by a loop over the blocks, from the stored parameters: row block i, column block j."""
    A, B, k, q = ours.gralora_A, ours.gralora_B, ours.k, ours.r // ours.k
    rows = []
    for i in range(k):
        row = []
        for j in range(k):
            A_ij = A[j, :, i * q : (i + 1) * q].t()
            B_ij = B[i, j * q : (j + 1) * q].t()
            row.append(B_ij @ A_ij)
        rows.append(torch.cat(row, 1))
    delta = torch.cat(rows)
    if ours.hybrid_r:
        delta = delta + ours.gralora_B_general.weight @ ours.gralora_A_general.weight
    return delta * (ours.alpha / (ours.r + ours.hybrid_r))


def llama(**config):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **config)).eval()


def gpt2():
    torch.manual_seed(3)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


def adapted(model=None, targets="all-linear", **settings):
    model = llama() if model is None else model
    return randomised(apply_gralora(model, targets, **{"r": 8, "k": 2, "alpha": 16, **settings}), 0.1)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- the layer ------------------------------------------------------------------------------------------------------

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


# --- what the paper claims ------------------------------------------------------------------------------------------


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


# --- the transform --------------------------------------------------------------------------------------------------


def test_apply_freezes_the_rest_and_logs_the_count(caplog):
    with caplog.at_level("INFO", "flatlora"):
        model = adapted()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "gralora_" in name}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"14 layers: {count:,} trainable parameters" in caplog.text


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["layers.1.mlp.up_proj"], r".*layers\.0\..*(q|k)_proj", "all-linear", "ALL-LINEAR"],
)
def test_targets_are_pefts(targets):
    theirs = get_peft_model(llama(), GraloraConfig(r=8, gralora_k=2, target_modules=targets))
    expected = {name for name, module in theirs.named_modules() if isinstance(module, PeftGraLoRA)}
    ours = adapted(targets=targets)
    found = {f"base_model.model.{name}" for name, module in ours.named_modules() if isinstance(module, GraLoRALinear)}
    assert found == expected
    assert not any("lm_head" in name for name in found)


@pytest.mark.parametrize("kind", ["float32", "bf16", "conv1d", "nf4", "int8"])
def test_unload_gives_back_the_original(kind):
    model = nn.Sequential(base_layer(kind, 128, 64), nn.ReLU(), nn.Linear(128, 8))
    for parameter in model[0].parameters():
        parameter.requires_grad_(parameter.is_floating_point() and kind != "nf4")
    x = torch.randn(3, 64, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "bf16":
        model.to(torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
    before, modules = state(model), list(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    randomised(apply_gralora(model, ["0"], r=8, k=4, modules_to_save=["2"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).float().square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), expected)
    assert unload_gralora(model) is model
    assert_same_state(model, before)
    assert all(now is then for now, then in zip(model, modules, strict=True))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["float32", "float64", "conv1d"])
def test_merge_computes_what_the_adapter_did(kind):
    model = nn.Sequential(base_layer(kind, 24, 16), nn.Tanh())
    x = torch.randn(5, 16, dtype=torch.float64 if kind == "float64" else torch.float32)
    randomised(apply_gralora(model, ["0"], r=8, k=4, hybrid_r=2))
    expected, delta = model(x), model[0].delta_weight()
    weight = model[0].base_layer.weight
    kept = weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge_gralora(model) is model
    assert torch.equal(weight, kept)  # whoever holds the old tensor keeps it
    assert torch.equal(model[0].weight, kept + (delta.t() if kind == "conv1d" else delta))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "double", "int8"])
def test_merge_into_a_quantised_base(kind):
    model = nn.Sequential(base_layer(kind, 128, 128), nn.Identity(), base_layer(kind, 128, 128))
    randomised(apply_gralora(model, ["0", "2"], r=8, k=4), 0.1)
    x = torch.randn(5, 128)
    expected = [model[i](x) for i in (0, 2)]
    dense = [model[i].base.dense(torch.float32) + model[i].delta_weight() for i in (0, 2)]
    with pytest.warns(UserWarning, match="2 quantised layers") as caught:
        merge_gralora(model)
    assert len(caught) == 1
    for i, weight, out in zip((0, 2), dense, expected, strict=True):
        assert type(model[i]) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
        error = (linear_base(model[i]).dense(torch.float32) - weight).norm() / weight.norm()  # before any forward
        assert error < (0.01 if kind == "int8" else 0.15)
        fresh = base_layer(kind, 128, 128)
        if kind == "int8":
            fresh.weight = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
        else:
            settings = {"quant_type": model[i].weight.quant_type, "compress_statistics": kind == "double"}
            fresh.weight = bnb.nn.Params4bit(weight, requires_grad=False, **settings).to("cpu")
        fresh.bias = model[i].bias
        # exactly what quantising the sum gives, and near what the adapter gave
        torch.testing.assert_close(model[i](x), fresh(x))
        error = (model[i](x) - out).norm() / out.norm()
        assert error < (0.02 if kind == "int8" else 0.2)
        assert not any(parameter.requires_grad for parameter in model[i].parameters() if parameter is model[i].weight)


def test_an_evaluation_in_between_does_not_repack_a_4_bit_base():
    # On a CPU with AVX512-BF16 a Linear4bit that runs in eval mode would never again pass a gradient.
    ours = layer("nf4", m=128, n=64)
    x = torch.randn(3, 64)
    before = gradients(ours, x)
    with torch.no_grad():
        ours.eval()(x)
    ours.train()
    for found, want in zip(gradients(ours, x)[:2], before[:2], strict=True):
        assert torch.equal(found, want)


def test_modules_to_save_train_a_copy():
    model = llama(tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    before = state(model)
    apply_gralora(model, "all-linear", r=8, k=2, modules_to_save=["lm_head"])
    assert model.lm_head.weight.requires_grad and not embedding.requires_grad
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    unload_gralora(model)
    assert model.lm_head.weight is embedding
    assert_same_state(model, before)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hybrid", [0, 4])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft_loads_what_we_save(tmp_path, hybrid, make, saved):
    model = adapted(make(), hybrid_r=hybrid, modules_to_save=saved)
    if saved:
        nn.init.normal_(model.lm_head.weight)
    save_gralora(model, tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    theirs = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=2e-5)
    expected = dict(gralora_parameters(model))
    assert dict(gralora_parameters(theirs)).keys() == expected.keys()
    assert not torch.allclose(logits(theirs), logits(make()))


@pytest.mark.parametrize("hybrid", [0, 4])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_we_load_what_peft_saves(tmp_path, hybrid, make, saved):
    config = GraloraConfig(
        r=8, gralora_k=2, alpha=20, hybrid_r=hybrid, target_modules="all-linear", modules_to_save=saved
    )
    theirs = randomised(get_peft_model(make(), config), 0.1).eval()
    if saved:
        nn.init.normal_(theirs.base_model.model.lm_head.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    ours = load_gralora(make(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=2e-5)
    again = load_gralora(randomised(ours), tmp_path)  # into layers that are there
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-4, atol=2e-5)
    save_gralora(ours, tmp_path / "again")
    both = PeftModel.from_pretrained(make(), tmp_path / "again")
    torch.testing.assert_close(logits(both), logits(theirs), rtol=1e-4, atol=2e-5)


def test_config_says_what_peft_needs_and_names_the_base(tmp_path):
    model = llama()
    model.name_or_path = "someone/model"
    save_gralora(adapted(model, hybrid_r=4, dropout=0.1), tmp_path)
    config = GraloraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.gralora_k, config.alpha, config.hybrid_r) == (8, 2, 16, 4)
    assert config.gralora_dropout == 0.1 and config.base_model_name_or_path == "someone/model"
    assert load_gralora(llama(), tmp_path).model.layers[0].mlp.up_proj.dropout.p == 0.1


def test_names_that_are_endings_of_others_are_saved_exactly(tmp_path):
    class Net(nn.Sequential):
        pass

    model = Net(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    randomised(apply_gralora(model, "0", r=4, k=2))
    assert isinstance(model[0], GraLoRALinear) and isinstance(model[1][0], nn.Linear)
    save_gralora(model, tmp_path)
    theirs = PeftModel.from_pretrained(unload_gralora(copy.deepcopy(model)), tmp_path)
    assert sum(isinstance(module, PeftGraLoRA) for module in theirs.modules()) == 1
    x = torch.randn(3, 8)
    torch.testing.assert_close(theirs(x), model(x))


# --- the machinery around training ----------------------------------------------------------------------------------


def train(model, steps=2, ids=IDS, **kwargs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(input_ids=ids, labels=ids, **kwargs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in gralora_parameters(model)}


@pytest.mark.parametrize("hybrid", [0, 4])
def test_compiled_without_a_graph_break(hybrid):
    ours = layer("float32", hybrid_r=hybrid)
    x = torch.randn(2, 5, 16)
    expected_out, expected_x, expected = gradients(ours, x)
    out, grad_x, _ = gradients(compiled := torch.compile(ours, fullgraph=True, backend="aot_eager"), x)
    grads = [parameter.grad for _, parameter in gralora_parameters(compiled)]
    for found, want in [(out, expected_out), (grad_x, expected_x), *zip(grads, expected, strict=True)]:
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    found = []
    for checkpointing in (False, True):
        model = adapted(hybrid_r=4, dropout=0.2).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        found.append(train(model))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-5, atol=1e-7)


def test_two_processes_train_as_one(tmp_path):
    mp.spawn(ddp_worker.run, (2, str(tmp_path)), nprocs=2)
    ddp_worker.run(0, 1, str(tmp_path))
    expected, found = (torch.load(tmp_path / f"{size}.pt", weights_only=True) for size in (1, 2))
    start = dict(ddp_worker.build().named_parameters())
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(parameter, start[name].detach(), rtol=1e-6)


# --- the optimizers on top ------------------------------------------------------------------------------------------


def blocks_of(ours, weight):
    """The k×k blocks of an (m, n) tensor: [i, j] (m/k, n/k)."""
    m, n = weight.shape
    return weight.view(ours.k, m // ours.k, ours.k, n // ours.k).transpose(1, 2)


def projected_rows(ours, gradient):
    """Row norms of the projection of `gradient` (m, n) on the blocks' tangent spaces, with pseudo-inverses."""
    k, q = ours.k, ours.r // ours.k
    total = torch.zeros(k, gradient.shape[0] // k, dtype=gradient.dtype)
    for i, j in itertools.product(range(k), range(k)):
        G = blocks_of(ours, gradient)[i, j]
        A = ours.gralora_A[j, :, i * q : (i + 1) * q].t().detach()
        B = ours.gralora_B[i, j * q : (j + 1) * q].t().detach()
        P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
        total[i] += (P_B @ G + G @ P_A - P_B @ G @ P_A).square().sum(1)
    return total.flatten()


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", ["float64", "conv1d", "nf4", "int8"])
@pytest.mark.parametrize(("k", "hybrid"), [(1, 0), (2, 0), (4, 0), (4, 3)])
def test_row_norms_are_exact(kind, k, hybrid, peft):
    m, n = (24, 16) if kind in ("float64", "conv1d") else (128, 64)
    ours = layer(kind, m=m, n=n, r=8, k=k, hybrid_r=hybrid)
    if kind in ("float64", "conv1d"):
        ours.double()
    module = peft_layer(ours) if peft else ours
    (view,) = lora_layers(nn.Sequential(module))
    assert view.shape == (m, n) and view.base.kind == {"nf4": "4bit", "int8": "8bit"}.get(kind, "float")
    base = view.base.float_weight() if view.base.kind == "float" else view.base.dense(torch.float32)
    (found,), _ = weight_sq(*batches([Rows(view)]))
    tolerance = 1e-12 if kind == "float64" else 1e-4
    expected = (base + ours.delta_weight()).double().square().sum(1)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_projected_gradient_is_exact_block_by_block(k, peft):
    ours = layer("float64", m=32, n=32, r=8, k=k)
    module = peft_layer(ours) if peft else ours
    x, upstream = torch.randn(20, 32, dtype=torch.float64), torch.randn(20, 32, dtype=torch.float64)
    gradients(module, x, upstream)
    (view,) = lora_layers(nn.Sequential(module))
    gradient = upstream.t() @ x
    (found,) = projected_grad_sq(*batches([Rows(view)]))
    torch.testing.assert_close(found, projected_rows(ours, gradient), rtol=1e-7, atol=0)
    assert found.sum() < gradient.square().sum()


def test_projected_gradient_of_a_hybrid_is_that_of_its_blocks():
    ours = layer("float64", m=32, n=32, r=8, k=4, hybrid_r=3)
    x, upstream = torch.randn(20, 32, dtype=torch.float64), torch.randn(20, 32, dtype=torch.float64)
    gradients(ours, x, upstream)
    (found,) = projected_grad_sq(*batches([Rows(lora_layers(nn.Sequential(ours))[0])]))
    torch.testing.assert_close(found, projected_rows(ours, upstream.t() @ x), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["float64", "nf4"])
@pytest.mark.parametrize("hybrid", [0, 4])
def test_ggpo_trains_at_the_perturbed_weight(kind, hybrid):
    model = nn.Sequential(layer(kind, m=64, n=64, hybrid_r=hybrid))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = GGPOOptimizer(torch.optim.SGD(parameters, lr=0.0), model, sigma=0.5, seed=1)
    x = torch.randn(3, 64, dtype=model[0].gralora_A.dtype)
    base = model[0].base
    dense = base.float_weight() if kind == "float64" else base.dense(torch.float32)
    draw = optimizer._noise.draw(optimizer._perturbations[0].layer)
    perturbed = draw_gaussian(draw, 64, dense, dense.dtype) + model[0].delta_weight()
    expected = F.linear(x, perturbed, model[0].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model(x).square().sum().backward()
    optimizer.step()
    assert optimizer._noise.rows["0"].grad_sq is not None
    assert not torch.allclose(model(x), expected, rtol=1e-2)
    reference = F.linear(x, dense + model[0].delta_weight(), model[0].bias)
    torch.testing.assert_close(model.eval()(x), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float64", "bf16", "conv1d", "nf4"])
@pytest.mark.parametrize("hybrid", [0, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
def test_ggpo_adds_its_noise_to_any_layer(kind, hybrid, dropout, noise):
    model = nn.Sequential(layer(kind, m=64, n=64, hybrid_r=hybrid, dropout=dropout))
    optimizer = GGPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, sigma=0.5, seed=1, noise=noise)
    dtype = {"float64": torch.float64, "bf16": torch.bfloat16}.get(kind, torch.float32)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)

    def outcome():
        torch.manual_seed(1)
        out = model(x)
        return out, *torch.autograd.grad(out.float().square().sum() / 2, [x, model[0].gralora_B])

    out, grad_x, grad_B = outcome()
    with optimizer.perturbed_as({}):
        clean, clean_x, clean_B = outcome()
    assert optimizer._noise.rows["0"].layer.module.training and not torch.equal(grad_B, clean_B)
    epsilon = noise_of(optimizer, dtype=dtype).double()
    added = x.detach().double() @ epsilon.t()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]  # the loss is in float32
    assert (out - clean - added).norm() <= tolerance * added.norm()
    if dropout == 0:
        base = model[0].base.dense(torch.float32) if kind == "nf4" else model[0].base.float_weight()
        weight = (base + model[0].delta_weight()).double()
        for value, g, w in [(out, grad_x, weight + epsilon), (clean, clean_x, weight)]:
            assert (g - value.double() @ w).norm() <= tolerance * g.norm()


def test_an_auxiliary_climbs_beside_the_blocks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = layer(hybrid_r=2), layer(m=8, n=24)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    model = Net()
    x = torch.randn(5, 16, dtype=torch.float64)
    plain = model(x)
    primary = [p for p in model.parameters() if p.requires_grad]
    ascending = attach_auxiliary(model, r=2, seed=1)
    base = torch.optim.SGD([{"params": primary}, {"params": ascending, "ascent": True}], lr=0.1)
    optimizer = BiLoRAOptimizer(base, model, rho=0.05)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < optimizer.perturbation_norm() <= 0.05
    first, s = model.up, 2.0
    update = s * ascending[1] @ ascending[0]
    expected = F.linear(x, first.weight + first.delta_weight() + update, first.bias)
    torch.testing.assert_close(first(x), expected)
    torch.testing.assert_close(first.eval()(x), F.linear(x, first.weight + first.delta_weight(), first.bias))
    detach_auxiliary(model)
    assert not torch.allclose(model(x), plain)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"r": 8.0}, "r must be an integer"),
        ({"k": 0}, "k must be an integer >= 1"),
        ({"hybrid_r": -1}, "hybrid_r must be an integer >= 0"),
        ({"alpha": 0}, "alpha must be a finite number > 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"r": 6, "k": 4}, "r = 6 is not divisible by k = 4; here k may be 1, 2"),
        ({"r": 9, "k": 3}, "q_proj' has 32 inputs and 32 outputs.*k may be 1 for all 14 layers"),
        ({"r": 32, "k": 32}, "has 32 inputs and 16 outputs.*k may be 1, 2, 4, 8, 16 for all"),
        ({"target_modules": ["q_porj"]}, "'q_porj' matches no module of LlamaForCausalLM; near it are: q_proj"),
        ({"target_modules": ["q_proj", "nothing"]}, "'nothing' matches no module"),
        ({"target_modules": "q_proj"}, "regular expression.*'q_proj' matches no module.*near it are: q_proj"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["self_attn"]}, "self_attn' is a LlamaAttention; expected nn.Linear"),
        ({"modules_to_save": ["head"]}, "modules_to_save entry 'head' matches no module"),
    ],
)
def test_apply_refuses_and_leaves_the_model(settings, message):
    model = llama()
    before, modules = state(model), list(model.modules())
    with pytest.raises(ValueError, match=message):
        apply_gralora(model, **{"target_modules": "all-linear", "r": 8, "k": 2, **settings})
    assert_same_state(model, before)
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_adapted_again_or_at_all():
    model = adapted()
    before = state(model)
    with pytest.raises(ValueError, match="q_proj' has an adapter already; call unload_gralora"):
        apply_gralora(model, ["o_proj"], r=8, k=2)
    assert_same_state(model, before)
    with pytest.raises(ValueError, match="has an adapter already"):
        apply_gralora(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), "all-linear", r=8, k=2)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        apply_gralora("model", "all-linear")
    with pytest.raises(TypeError, match=r"base must be nn.Linear.*got Embedding"):
        GraLoRALinear(nn.Embedding(4, 4))
    with pytest.raises(TypeError, match="got NonDynamicallyQuantizableLinear"):
        GraLoRALinear(nn.MultiheadAttention(32, 2).out_proj)
    for function in (merge_gralora, unload_gralora):
        with pytest.raises(ValueError, match="has no GraLoRA layers"):
            function(llama())


def test_merge_refuses_a_base_it_cannot_write():
    class Codes(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)

    model = apply_gralora(nn.Sequential(nn.Linear(8, 8), Codes()), ["0", "1"], r=4, k=2)
    before = state(model)
    with pytest.raises(ValueError, match="layer '1': the weight of a Codes can't be merged into"):
        merge_gralora(model)
    assert_same_state(model, before)


def test_save_refuses_what_the_format_cannot_say(tmp_path):
    with pytest.raises(ValueError, match="no GraLoRA layers; there is nothing to save"):
        save_gralora(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"layer '1' has .*'r': 4.*PEFT's format holds one of each"):
        save_gralora(nn.Sequential(layer(r=8), layer(n=24, r=4)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted(r=4), "the adapter has .*'r': 8.*q_proj' of the model .*'r': 4"),
        (lambda: adapted(k=4), "'gralora_k': 2.*'gralora_k': 4"),
        (lambda: adapted(alpha=8), "'alpha': 16.*'alpha': 8"),
        (lambda: adapted(hybrid_r=2), "'hybrid_r': 4.*'hybrid_r': 2"),
        (lambda: adapted(targets=["q_proj"], hybrid_r=4), "the adapter has 14 layers, the model 2"),
        (lambda: gpt2(), "for another base: layer 'model.layers.0.* is no such module in GPT2LMHeadModel"),
        (lambda: llama(head_dim=16), "does not fit layer .* with .*expected .*found"),
        (lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), "has an adapter already"),
    ],
)
def test_load_refuses_another_adapter_and_leaves_the_model(tmp_path, make, message):
    save_gralora(adapted(hybrid_r=4), tmp_path)
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_gralora(model, tmp_path)
    assert_same_state(model, before)


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json; expected a folder"):
        load_gralora(llama(), tmp_path)
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is of a LORA adapter; expected GRALORA"):
        load_gralora(llama(), tmp_path / "lora")
    save_gralora(adapted(modules_to_save=["lm_head"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in [
        ({"modules_to_save": None}, "'lm_head.weight' is .64, 32. in the file and not saved whole in the model"),
        ({"bias": "all"}, "bias='all'; only 'none' can be loaded"),
        ({"r": 4}, "does not fit layer"),
        ({"gralora_k": 3}, "r = 8 is not divisible by k = 3"),
    ]:
        file.write_text(json.dumps({**config, **change}))
        model = llama()
        before = state(model)
        with pytest.raises(ValueError, match=message):
            load_gralora(model, tmp_path)
        assert_same_state(model, before)


def test_load_says_when_the_base_has_another_name(tmp_path, caplog):
    model = llama()
    model.name_or_path = "someone/model"
    save_gralora(adapted(model), tmp_path)
    other = llama()
    other.name_or_path = "someone/else"
    with caplog.at_level("WARNING", "flatlora"):
        load_gralora(other, tmp_path)
    assert "'someone/model', this model is 'someone/else'" in caplog.text
