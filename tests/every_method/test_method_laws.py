"""What every method promises: the base weights, who is perturbed and when, and the global random numbers."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from helpers import adamw, difference, sgd
from methods import (
    OF_PEFT,
    PERTURBING,
    adapted,
    base_bits,
    batch,
    every_method,
    fill,
    logits,
    plain,
    started,
    streams,
    train,
    twin,
    weights,
)
from models import trained
from peft import LoraConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
]


class Interruption(Exception):
    pass


def interrupt(*_):
    raise Interruption


# --- the base is read-only ----------------------------------------------------------------------------------------


@every_method()
def test_the_base_is_untouched_after_ten_steps_and_three_faults(method):
    model = adapted(method, dropout=0.1)
    before = base_bits(model)
    optimizer = method.start(model, adamw)
    start = weights(model)
    down = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("down_proj")))
    train(model, optimizer, range(3))

    handle = down.register_forward_hook(interrupt)
    with pytest.raises(Interruption):
        model(**batch(0))
    handle.remove()
    optimizer.zero_grad()
    train(model, optimizer, range(3, 5))

    handle = down.register_forward_hook(lambda module, args, out: out.register_hook(interrupt) and None)
    with pytest.raises(Interruption):
        model(**batch(0)).loss.backward()
    handle.remove()
    optimizer.zero_grad()
    train(model, optimizer, range(5, 7))

    inner = getattr(optimizer, "base_optimizer", getattr(optimizer, "lower", optimizer))
    handle = inner.register_step_pre_hook(interrupt)
    with pytest.raises(Interruption):
        train(model, optimizer, range(7, 8))
    handle.remove()
    optimizer.zero_grad()
    train(model, optimizer, range(7, 10))
    assert difference(before, base_bits(model)) is None
    assert difference(start, weights(model)) is not None
    assert all(value.isfinite().all() for value in weights(model).values())


# --- who is perturbed, and when -----------------------------------------------------------------------------------


@every_method(among=PERTURBING)
def test_a_pass_that_trains_sees_other_weights_and_one_set_of_them_per_step(method):
    model, optimizer = started(method)
    own = twin(model, method)
    noisy = logits(model)
    assert (noisy - logits(own)).abs().max() > 1e-3
    assert torch.equal(noisy, logits(model))
    train(model, optimizer, range(2, 3))
    assert (logits(model) - noisy).abs().max() > 1e-3


@every_method()
def test_all_micro_batches_of_a_step_see_the_same_model(method):
    """Whatever is evaluated between them, and though gradients are set to zero."""
    model, optimizer = started(method)
    grads = []
    for _ in range(3):
        loss = model(**batch(5)).loss
        loss.backward()
        grads.append([loss.detach(), [p.grad for p in trained(model)]])
        logits(model.eval())
        model.train()
        optimizer.zero_grad()
    assert difference(grads[0], grads[1]) is None and difference(grads[0], grads[2]) is None


@every_method()
def test_micro_batches_add_up_to_the_whole_batch(method):
    ends = []
    for parts in (1, 4):
        model = adapted(method).double()
        optimizer = method.start(model, sgd)
        for i in range(3):
            whole = batch(i, 4)
            for j in range(parts):
                (model(**{key: value.chunk(parts)[j] for key, value in whole.items()}).loss / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((weights(model), logits(model)))
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


@every_method(among=PERTURBING)
def test_the_models_mode_alone_counts(method):
    """Not the optimizer's, which Accelerate and others switch around an evaluation."""
    model, optimizer = started(method)
    noisy = logits(model)
    optimizer.eval()
    assert difference(noisy, logits(model)) is None
    clean = logits(model.eval())
    optimizer.train()
    assert difference(clean, logits(model)) is None
    assert difference(noisy, logits(model.train())) is None


PASSES = {
    "eval mode": (lambda model: model.eval(), torch.enable_grad),
    "eval mode without gradients": (lambda model: model.eval(), torch.no_grad),
    "train mode under no_grad": (lambda model: model.train(), torch.no_grad),
    "train mode under inference_mode": (lambda model: model.train(), torch.inference_mode),
}


@every_method()
def test_a_pass_that_does_not_train_sees_the_plain_model(method):
    model, _ = started(method)
    own = twin(model, method)
    for how, (mode, context) in PASSES.items():
        with context():
            assert difference(logits(mode(model)), logits(mode(own))) is None, how


@every_method()
def test_generation_in_train_mode_sees_the_plain_model(method):
    model, _ = started(method)
    own = twin(model, method)

    def generated(which):
        return which.generate(
            input_ids=batch(3)["input_ids"],
            max_new_tokens=6,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )

    found, expected = generated(model), generated(own)
    assert model.training
    assert difference(found.sequences, expected.sequences) is None
    assert difference(list(found.scores), list(expected.scores)) is None


@every_method(among=OF_PEFT)
def test_disabled_adapters_leave_the_base_model(method):
    model, _ = started(method)
    own = twin(model, method)
    with model.disable_adapter(), own.disable_adapter():
        assert difference(logits(model), logits(own)) is None


def with_reference(method):
    """A model with a second adapter, frozen, as preference optimisation has it."""
    model = adapted(method)
    config = model.peft_config["default"]
    model.add_adapter("ref", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=config.use_dora))
    fill(model, seed=3)
    model.set_adapter("default")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)
    return model


@every_method(among=OF_PEFT)
def test_a_frozen_reference_adapter_is_trained_by_nobody_and_perturbed_by_nobody(method):
    model = with_reference(method)
    before = base_bits(model)
    optimizer = method.start(model, adamw)
    train(model, optimizer, range(3))
    assert difference(before, base_bits(model)) is None
    own = with_reference(method)
    own.load_state_dict({name: p for name, p in model.state_dict().items() if name in own.state_dict()})

    def reference(which, how):
        which.set_adapter("ref")  # which makes its parameters trainable
        for name, p in which.named_parameters():
            if ".ref." in name:
                p.requires_grad_(how != "frozen")
        with torch.no_grad() if how == "no_grad" else torch.enable_grad():
            found = logits(which)
        which.set_adapter("default")
        return found

    for how in ("no_grad", "frozen", "trainable"):
        assert difference(reference(model, how), reference(own, how)) is None
    if method.perturbs:
        assert (logits(model) - logits(own)).abs().max() > 1e-3
    train(model, optimizer, range(3, 5))
    assert difference(before, base_bits(model)) is None


# --- files and merged weights -------------------------------------------------------------------------------------


@every_method(among=OF_PEFT)
def test_what_is_saved_or_merged_is_the_plain_model(method, tmp_path):
    model, _ = started(method)
    own = twin(model, method)
    for which, folder in ((model, "perturbed"), (own, "plain")):
        which.save_pretrained(tmp_path / folder)
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "perturbed" / file.name).read_bytes()
    expected = own.merge_and_unload()
    for which in (copy.deepcopy(model), model):
        merged = which.merge_and_unload()
        assert difference(logits(merged.train()), logits(expected.train())) is None
        assert difference(merged.state_dict(), expected.state_dict()) is None


# --- recomputation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@every_method()
def test_recomputation_sees_the_same_perturbation(method, reentrant):
    results = []
    for checkpointing in (False, True):
        model = adapted(method, dropout=0.1).double()
        optimizer = method.start(model, sgd)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(5)
        losses = train(model, optimizer, range(3))
        model(**batch(50)).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((losses, grads, weights(model)))
    assert len(results[0][1]) > 10
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


# --- random numbers -----------------------------------------------------------------------------------------------


def drawn():
    return torch.rand(2), random.random(), np.random.rand()


@every_method()
def test_the_global_random_streams_are_as_without_the_method(method):
    found = []
    for start in (method.start, plain):
        model = adapted(method, dropout=0.1)
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        optimizer = start(model, adamw)
        numbers = [drawn()]
        for i in range(4):
            train(model, optimizer, range(i, i + 1))
            numbers.append(drawn())
            logits(model)
        found.append((numbers, streams()))
    assert difference(*found) is None
