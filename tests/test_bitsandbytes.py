"""8-bit and paged base optimizers, and 4-bit and 8-bit base models."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import adapters, base_state, build, difference, optimizers_of, outputs, tokens, train
from methods import base_bits
from methods import train as train_tokens
from models import WIDE, lora_mlp, tiny_llama, trainable
from torch.optim.lr_scheduler import ExponentialLR

from flatlora import GGPOOptimizer, lora_layers, noise_rise

bnb = pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
]

BROKEN = {
    "AdEMAMix32bit": "fails by itself on the CPU: keeps two first moments, which its CPU kernel does not know",
    "PagedAdEMAMix32bit": "as AdEMAMix32bit",
}
MOMENTUM = ("SGD", "LARS", "PytorchLARS")  # refuse to run without
QUANTS = ["nf4", "fp4", "int8"]
repacks = pytest.mark.skipif(
    not getattr(bnb.functional, "has_avx512bf16", lambda: False)(), reason="bitsandbytes does not repack on this CPU"
)


# --- optimizers ----------------------------------------------------------------------------------------------------


def base_of(cls, model):
    momentum = {"momentum": 0.9} if cls.__name__.startswith(MOMENTUM) else {}
    return build(cls, trainable(model), **momentum)


def run(cls, wrapped):
    model = lora_mlp(width=WIDE, r=8)
    base = base_of(cls, model)
    optimizer = GGPOOptimizer(base, model, sigma=0.0) if wrapped else base
    train(model, optimizer, range(10), ExponentialLR(optimizer, 0.9), width=WIDE)
    assert cls.__name__.endswith("8bit") == any(t.dtype == torch.uint8 for t in moments(optimizer))
    return adapters(model), base_state(optimizer)


def moments(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


@pytest.mark.parametrize("cls", list(optimizers_of(bnb.optim)), ids=lambda cls: cls.__name__)
def test_without_noise_it_is_the_base_optimizer(cls):
    if cls.__name__ in BROKEN:
        pytest.skip(BROKEN[cls.__name__])
    bare, wrapped = run(cls, False), run(cls, True)
    assert difference(adapters(lora_mlp(width=WIDE, r=8)), bare[0]) is not None
    assert difference(bare, wrapped) is None


# --- quantised models ----------------------------------------------------------------------------------------------


def adam8(model, **kwargs):
    base = bnb.optim.AdamW8bit(trainable(model), lr=3e-3)
    return GGPOOptimizer(base, model, **{"seed": 5, **kwargs})


@pytest.mark.parametrize("quant", QUANTS)
def test_without_noise_training_is_that_of_the_base_optimizer(quant):
    def run(wrapped):
        model = tiny_llama(width=64, quant=quant, dropout=0.1)
        base = bnb.optim.AdamW8bit(trainable(model), lr=3e-3)
        optimizer = GGPOOptimizer(base, model, sigma=0.0) if wrapped else base
        torch.manual_seed(4)
        return train_tokens(model, optimizer, range(5)), adapters(model), base_state(optimizer)

    assert difference(run(False), run(True)) is None


@pytest.mark.parametrize("quant", QUANTS)
def test_evaluation_in_between_disturbs_nothing(quant):
    def run(evaluate):
        model = tiny_llama(width=64, quant=quant)
        optimizer = adam8(model)
        before = base_bits(model)
        losses = []
        for i in range(5):
            losses += train_tokens(model, optimizer, range(i, i + 1))
            if evaluate:
                model.eval()
                with torch.no_grad():
                    first, second = (model(input_ids=tokens(99)).logits for _ in range(2))
                assert torch.equal(first, second)
                noise_rise(model, lambda m, ids: m(input_ids=ids, labels=ids).loss, [tokens(98)], draws=1)
                with torch.inference_mode():
                    model(input_ids=tokens(97))
                model.train()
        assert difference(before, base_bits(model)) is None
        return losses, adapters(model), optimizer.state_dict(), outputs(model)

    assert difference(run(False), run(True)) is None


@pytest.mark.parametrize("quant", QUANTS)
def test_evaluation_sees_the_model_without_noise(quant):
    def logits(with_noise):
        model = tiny_llama(width=64, quant=quant)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        if with_noise:  # the perturbation lives as long as its optimizer
            optimizer = GGPOOptimizer(optimizer, model, sigma=0.5)
        # Without the optimizer on it, a 4-bit model would be repacked in eval mode and compute something else.
        output = model.train(not with_noise and quant != "int8")(input_ids=tokens(0)).logits.detach()
        return output, optimizer

    assert difference(logits(True)[0], logits(False)[0]) is None


# --- repacking for CPU inference -----------------------------------------------------------------------------------


def evaluate(model):
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens(0))
    model.train()


def repacked(model):
    return [
        layer.name
        for layer in lora_layers(model)
        if getattr(layer.base.module.weight.quant_state, "packing_format_for_cpu", False)
    ]


@repacks
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_an_attached_model_is_not_repacked(quant):
    model = tiny_llama(width=128, quant=quant)
    optimizer = adam8(model)
    evaluate(model)
    assert repacked(model) == []
    ids = tokens(0)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model))
    optimizer.step()


@repacks
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_a_repacked_model_is_refused(quant):
    model = tiny_llama(width=128, quant=quant)
    before = {name: "forward" in module.__dict__ for name, module in model.named_modules()}
    evaluate(model)
    with pytest.raises(ValueError, match=r"repacked .* build the optimizer before the first evaluation"):
        adam8(model)
    assert before == {name: "forward" in module.__dict__ for name, module in model.named_modules()}


@repacks
def test_after_remove_bitsandbytes_may_repack_again():
    model = tiny_llama(width=128, quant="nf4")
    optimizer = adam8(model)
    evaluate(model)
    optimizer.remove()
    evaluate(model)
    with pytest.raises(ValueError, match="repacked"):
        lora_layers(model)


# --- transformers' own quantised loading ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_loaded_quantised(tmp_path, bits):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(width=64).unload().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        base = prepare_model_for_kbit_training(base)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    assert {layer.base.kind for layer in lora_layers(model)} == {f"{bits}bit"}
    optimizer = adam8(model)
    before = base_bits(model)
    for i in range(3):
        train_tokens(model, optimizer, range(i, i + 1))
        evaluate(model)
    assert difference(before, base_bits(model)) is None
    assert all(std.isfinite().all() and (std > 0).all() for std in optimizer.row_std().values())
