"""GraLoRA adapters on disk: PEFT reads what is saved, and what PEFT saves is read."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from gralora_models import (
    adapted,
    assert_unchanged,
    gpt2,
    gralora_parameters,
    layer,
    llama,
    logits,
    photograph,
    randomised,
)
from peft import GraloraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.gralora.layer import Linear as PeftGraLoRA
from safetensors.torch import load_file, save_file
from torch import nn

from flatlora import GraLoRALinear, apply_gralora, load_gralora, save_gralora, unload_gralora


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


# --- bad input --------------------------------------------------------------------------------------------------------


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
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        load_gralora(model, tmp_path)
    assert_unchanged(model, before)


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors; expected a folder"):
        load_gralora(llama(), tmp_path)
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is of a LORA adapter; expected GRALORA"):
        load_gralora(llama(), tmp_path / "lora")
    save_gralora(adapted(modules_to_save=["lm_head"]), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as of others, without a configuration of their own
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
        before = photograph(model)
        with pytest.raises(ValueError, match=message):
            load_gralora(model, tmp_path)
        assert_unchanged(model, before)


def test_load_says_when_the_base_has_another_name(tmp_path, caplog):
    model = llama()
    model.name_or_path = "someone/model"
    save_gralora(adapted(model), tmp_path)
    other = llama()
    other.name_or_path = "someone/else"
    with caplog.at_level("WARNING", "flatlora"):
        load_gralora(other, tmp_path)
    assert "'someone/model', this model is 'someone/else'" in caplog.text
