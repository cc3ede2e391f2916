"""What is loaded, taken off or moved under GraLoRA's feet: refused in one sentence, or done whole."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from gralora_models import assert_unchanged, photograph, randomised
from safetensors.torch import load_file, save_file
from torch import nn

from flatlora import (
    GGPOOptimizer,
    GraLoRALinear,
    apply_gralora,
    attach_auxiliary,
    load_gralora,
    merge_gralora,
    save_gralora,
    unload_gralora,
)
from flatlora.gralora import transform

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return self.head(self.norm(self.down(torch.tanh(self.up(x)))))


def adapted(model=None, saved=("head", "norm"), **settings):
    settings = {"r": 4, "k": 2, "alpha": 8, "hybrid_r": 2, **settings}
    model = Net() if model is None else model
    return randomised(apply_gralora(model, ["up", "down"], modules_to_save=saved, **settings))


# --- loading is all or nothing --------------------------------------------------------------------------------------


def changed(**changes):
    def edit(folder):
        config = json.loads((folder / CONFIG).read_text())
        config = {key: value for key, value in {**config, **changes}.items() if value is not KeyError}
        (folder / CONFIG).write_text(json.dumps(config))

    return edit


def written(text):
    return lambda folder: (folder / CONFIG).write_text(text)


def weights(edit):
    def rewrite(folder):
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return rewrite


def cast(key, dtype):
    return weights(lambda tensors: tensors.update({PREFIX + key: tensors[PREFIX + key].to(dtype)}))


def both(folder):
    """`up` adapted and, in the same file, saved whole."""
    changed(modules_to_save=["head", "norm", "up"])(folder)
    whole = {f"{PREFIX}up.weight": torch.zeros(24, 16), f"{PREFIX}up.bias": torch.zeros(24)}
    weights(lambda tensors: tensors.update(whole))(folder)


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


BROKEN = [
    (written("[]"), "is a list; expected an object"),
    (written("null"), "is a NoneType; expected an object"),
    (written('{"peft_type": "GRALORA", '), "can't be read: Expecting property name"),
    (written(""), "can't be read: Expecting value"),
    (written('{"peft_type": "GRALORA", "r": 4, "r": 8}'), "can't be read: it has 'r' twice"),
    (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), "can't be read: 'utf-8' codec"),
    *[(changed(**{key: KeyError}), f"lacks {key}") for key in ("r", "gralora_k", "alpha", "hybrid_r")],
    (changed(peft_type=KeyError), "is of a None adapter; expected GRALORA"),
    (changed(alpha=float("nan")), "can't be used: alpha must be a finite number > 0.*, got nan"),
    (changed(alpha=True), "alpha must be a finite number > 0.*, got True"),
    (changed(r="4"), "r must be an integer >= 1, got '4'"),
    (changed(r=True), "r must be an integer >= 1, got True"),
    (changed(gralora_k=2.0), "k must be an integer >= 1, got 2.0"),
    (changed(hybrid_r=None), "hybrid_r must be an integer >= 0, got None"),
    (changed(gralora_dropout=2), "dropout must be a finite number >= 0 and < 1, got 2"),
    (changed(modules_to_save="head"), "modules_to_save must be a list of module names, got 'head'"),
    (changed(modules_to_save=[3]), r"modules_to_save must be a list of module names, got \[3\]"),
    (both, "for layer 'up', which its modules_to_save hold whole|'up.bias' is .24,. in the file and not saved whole"),
    (cut, "is no whole safetensors file"),
    (cast("up.gralora_A", torch.int32), "'up.gralora_A' is of torch.int32; expected a float dtype"),
    (cast("up.gralora_B", torch.bool), "'up.gralora_B' is of torch.bool"),
    (cast("down.gralora_A_general.weight", torch.complex64), "general.weight' is of torch.complex64"),
    (cast("head.weight", torch.int64), "'head.weight' is of torch.int64; expected a float dtype"),
    (cast("norm.num_batches_tracked", torch.float32), "tracked' is of torch.float32; expected torch.int64 dtype"),
    (
        weights(lambda tensors: tensors.update({"up.gralora_A": torch.ones(2, 8, 4)})),
        "weights for 'up.gralora_A' twice",
    ),
    (weights(lambda tensors: tensors.pop(f"{PREFIX}up.gralora_B")), "does not fit layer 'up'"),
    (weights(lambda tensors: [tensors.pop(key) for key in list(tensors) if "gralora" in key]), "no weights of GraLoRA"),
    (weights(lambda tensors: tensors.pop(f"{PREFIX}head.bias")), "'head.bias' is missing in the file"),
]


# A model with adapters knows its own modules_to_save and does not ask the configuration for them.
CASES = [
    pytest.param(edit, message, present, id=f"{message[:40]}, {'adapted' if present else 'plain'}")
    for edit, message in BROKEN
    for present in (False, True)
    if not (present and "modules_to_save must be" in message)
]


@pytest.mark.parametrize(("edit", "message", "present"), CASES)
def test_a_broken_adapter_is_one_value_error_and_no_change(tmp_path, edit, message, present):
    save_gralora(adapted(), tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)  # weights as of others: the configuration stands alone
    edit(tmp_path)
    model = adapted() if present else Net()
    model.train(False).up.requires_grad_(False)
    before = photograph(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_gralora(model, tmp_path)
    assert type(caught.value) is ValueError
    assert_unchanged(model, before)


def test_what_is_no_model_or_holds_no_values_is_refused(tmp_path):
    save_gralora(adapted(), tmp_path)
    for call in (
        lambda m: load_gralora(m, tmp_path),
        lambda m: save_gralora(m, tmp_path),
        unload_gralora,
        merge_gralora,
    ):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
            call("model")
    with pytest.raises(ValueError, match="'up' is on the meta device, which holds no values"):
        load_gralora(Net().to("meta"), tmp_path)
    for call in (unload_gralora, merge_gralora):
        layer = GraLoRALinear(nn.Linear(8, 8), r=4, k=2)
        before = photograph(layer)
        with pytest.raises(ValueError, match="is a GraLoRALinear itself; pass the module that holds it"):
            call(layer)
        assert_unchanged(layer, before)


def test_save_refuses_layers_of_different_dropout(tmp_path):
    model = nn.Sequential(*[GraLoRALinear(nn.Linear(8, 8), r=4, k=2, dropout=p) for p in (0.1, 0.2)])
    with pytest.raises(ValueError, match=r"layer '1' has .*'gralora_dropout': 0.2.*PEFT's format holds one of each"):
        save_gralora(model, tmp_path)


# --- faults in the transform ----------------------------------------------------------------------------------------


def test_memory_that_runs_out_in_apply_changes_nothing(monkeypatch):
    class Scarce(GraLoRALinear):
        def __init__(self, base, **settings):
            if base.in_features == 24:
                raise MemoryError
            super().__init__(base, **settings)

    model = Net()
    model.head.bias.requires_grad_(False)
    before = photograph(model)
    monkeypatch.setattr(transform, "GraLoRALinear", Scarce)
    with pytest.raises(MemoryError):
        apply_gralora(model, ["up", "down"], r=4, k=2)
    assert_unchanged(model, before)


def test_memory_that_runs_out_in_merge_leaves_the_same_function(monkeypatch):
    model = adapted().eval()
    x = torch.randn(3, 16)
    expected = model(x)
    delta_weight = GraLoRALinear.delta_weight

    def scarce(layer):
        if layer.in_features == 24:
            raise MemoryError
        return delta_weight(layer)

    with monkeypatch.context() as patch:
        patch.setattr(GraLoRALinear, "delta_weight", scarce)
        with pytest.raises(MemoryError):
            merge_gralora(model)
    torch.testing.assert_close(model(x), expected)
    merge_gralora(model)
    torch.testing.assert_close(model(x), expected)
    assert type(model.up) is type(model.down) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_saved_module_inside_another_goes_with_it(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    before = photograph(model)
    apply_gralora(model, "0", r=4, k=2, modules_to_save=["1", "1.0"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model[0].base_layer.weight.sub_(1)
        model[0].base_layer.bias.sub_(1)
    save_gralora(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["1"]
    again = load_gralora(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())), tmp_path)
    assert torch.equal(again[1][0].weight, model[1][0].weight)
    unload_gralora(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[2][name])


def test_what_wraps_a_model_hides_nothing_of_it(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.head.weight.fill_(7)

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    wrapper = Wrapper(model)
    save_gralora(wrapper, tmp_path / "wrapped")
    save_gralora(model, tmp_path / "plain")
    assert (tmp_path / "wrapped" / CONFIG).read_text() == (tmp_path / "plain" / CONFIG).read_text()
    wrapped, unwrapped = (load_file(tmp_path / name / WEIGHTS) for name in ("wrapped", "plain"))
    assert wrapped.keys() == unwrapped.keys() and all(torch.equal(wrapped[key], unwrapped[key]) for key in wrapped)
    other = adapted()
    load_gralora(Wrapper(other), tmp_path / "plain")
    assert torch.equal(other.head.weight, model.head.weight) and torch.equal(other.up.gralora_A, model.up.gralora_A)
    unload_gralora(wrapper)
    assert type(model.up) is nn.Linear and not torch.equal(model.head.weight, other.head.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unload_follows_a_model_that_was_moved_and_switched():
    model = adapted().to("meta").eval()
    unload_gralora(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not any(module.training for module in model.modules())


# --- perturbations on top -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["noise", "auxiliary", "auxiliary, noise", "noise, auxiliary"])
@pytest.mark.parametrize("take_off", [unload_gralora, merge_gralora])
def test_taking_off_leaves_no_perturbation_behind(take_off, order):
    model, optimizers = adapted(), []
    clean = copy.deepcopy(model).eval()
    for name in order.split(", "):
        if name == "auxiliary":
            auxiliary = attach_auxiliary(model, r=2, seed=1)
            nn.init.normal_(auxiliary[1])
        else:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizers.append(GGPOOptimizer(torch.optim.SGD(trained, lr=0.1), model, sigma=0.5, seed=1))
    assert take_off(model) is model
    assert model.state_dict().keys() == Net().state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in Net().modules()]
    assert not any("forward" in module.__dict__ for module in model.modules())
    x = torch.randn(3, 16)
    torch.testing.assert_close(model.eval()(x), take_off(clean)(x))
    adapted(model)
    attach_auxiliary(model, r=2)  # nothing left stands in the way of the next


def test_a_refused_merge_takes_nothing_off():
    class Codes(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)

    model = apply_gralora(nn.Sequential(nn.Linear(8, 8), Codes()), ["0", "1"], r=4, k=2)
    attach_auxiliary(model, r=2)
    before = photograph(model)
    with pytest.raises(ValueError, match="layer '1': the weight of a Codes can't be merged into"):
        merge_gralora(model)
    assert_unchanged(model, before)


# --- a default device -----------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere():
    """A default device that is not the model's, as a GPU is; whatever strays to it has lost its values."""
    with torch.device("meta"):
        yield


def test_under_another_default_device_all_is_on_the_models(tmp_path, request):
    def draw():
        torch.manual_seed(5)
        return apply_gralora(
            copy.deepcopy(base), ["up", "down"], r=4, k=2, alpha=8, hybrid_r=2, modules_to_save=["head"]
        )

    base, x = Net().eval(), torch.randn(3, 16)
    expected, trained = draw(), adapted(copy.deepcopy(base), saved=["head"])
    outputs = trained(x)
    request.getfixturevalue("elsewhere")
    model = draw()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    save_gralora(trained, tmp_path)
    load_gralora(model, tmp_path)
    fresh = load_gralora(copy.deepcopy(base), tmp_path)
    assert {value.device.type for value in fresh.state_dict().values()} == {"cpu"}
    for loaded in (model, fresh):
        out = loaded.train()(x)
        out.sum().backward()
        assert loaded.up.gralora_A.grad.device.type == "cpu"
        loaded.eval().zero_grad()
        loaded.norm.load_state_dict(base.norm.state_dict())
        torch.testing.assert_close(loaded(x), outputs)
    torch.testing.assert_close(merge_gralora(model)(x), outputs)
    assert torch.equal(unload_gralora(fresh)(x), base(x))
