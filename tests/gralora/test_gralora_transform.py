"""Putting GraLoRA into a model, training it there, taking it off and merging it."""

from __future__ import annotations

import warnings

import pytest
import torch
from gralora_models import (
    IDS,
    adapted,
    assert_unchanged,
    base_layer,
    gradients,
    gralora_parameters,
    layer,
    llama,
    photograph,
    randomised,
)
from helpers import RANKS
from models import trained
from peft import GraloraConfig, LoraConfig, get_peft_model
from peft.tuners.gralora.layer import Linear as PeftGraLoRA
from processes import on_ranks
from torch import nn

from flatlora import GraLoRALinear, apply_gralora, merge_gralora, unload_gralora
from flatlora.layers.bases import linear_base

bnb = pytest.importorskip("bitsandbytes")


# --- the transform ----------------------------------------------------------------------------------------------------


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
    before = photograph(model)
    randomised(apply_gralora(model, ["0"], r=8, k=4, modules_to_save=["2"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).float().square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), expected)
    assert unload_gralora(model) is model
    assert_unchanged(model, before)
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
    before = photograph(model)
    apply_gralora(model, "all-linear", r=8, k=2, modules_to_save=["lm_head"])
    assert model.lm_head.weight.requires_grad and not embedding.requires_grad
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    unload_gralora(model)
    assert model.lm_head.weight is embedding
    assert_unchanged(model, before)


# --- the machinery around training ------------------------------------------------------------------------------------


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


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).double()
    apply_gralora(model, "all-linear", r=8, k=4, hybrid_r=2)
    for p in trained(model):
        nn.init.normal_(p, std=0.3)
    return model


def two_steps(rank, folder, ranks=RANKS):
    model = two_layers()
    x, y = torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    wrapped = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for _ in range(2):
        (wrapped(x.chunk(ranks)[rank]) - y.chunk(ranks)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def cases():
    return {"ddp": two_steps}


def test_two_processes_train_as_one(tmp_path):
    found = on_ranks(cases, tmp_path)[0]["ddp"]
    assert "error" not in found, found["error"]
    start = dict(two_layers().named_parameters())
    for name, p in two_steps(0, tmp_path, ranks=1).items():
        torch.testing.assert_close(found[name], p, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(p, start[name].detach(), rtol=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"r": 8.0}, "r must be an integer"),
        ({"k": 0}, "k must be an integer >= 1"),
        ({"hybrid_r": -1}, "hybrid_r must be an integer >= 0"),
        ({"alpha": 0}, "alpha must be a finite number > 0"),
        ({"dropout": 1.0}, "dropout must be a finite number >= 0 and < 1"),
        ({"r": 6, "k": 4}, "r = 6 is not divisible by k = 4; here k may be 1, 2"),
        ({"r": 9, "k": 3}, "q_proj' has 32 inputs and 32 outputs.*k may be 1 for all 14 layers"),
        ({"r": 32, "k": 32}, "has 32 inputs and 16 outputs.*k may be 1, 2, 4, 8, 16 for all"),
        ({"target_modules": ["q_porj"]}, "'q_porj' matches no module of LlamaForCausalLM; near it are: q_proj"),
        ({"target_modules": ["q_proj", "nothing"]}, "'nothing' matches no module"),
        ({"target_modules": "q_proj"}, r"'q_proj' is a string, which is a regular expression.*list: \['q_proj'\]"),
        ({"modules_to_save": ["q_proj"], "target_modules": ["q_proj"]}, "'q_proj' lies in modules_to_save"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["self_attn"]}, "self_attn' is a LlamaAttention; expected nn.Linear"),
        ({"modules_to_save": ["head"]}, "modules_to_save entry 'head' matches no module"),
        ({"target_modules": ["q_proj", 3]}, r"target_modules must be a list of module names, got \['q_proj', 3\]"),
        ({"target_modules": None}, "target_modules must be a list of module names, got None"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of module names, got 'lm_head'"),
        *[({name: True}, f"{name} must be .*, got True") for name in ("r", "k", "alpha", "hybrid_r", "dropout")],
    ],
)
def test_apply_refuses_and_leaves_the_model(settings, message):
    model = llama()
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        apply_gralora(model, **{"target_modules": "all-linear", "r": 8, "k": 2, **settings})
    assert_unchanged(model, before)


def test_what_cannot_be_adapted_again_or_at_all():
    model = adapted()
    before = photograph(model)
    with pytest.raises(ValueError, match="q_proj' has an adapter already; call unload_gralora"):
        apply_gralora(model, ["o_proj"], r=8, k=2)
    assert_unchanged(model, before)
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
