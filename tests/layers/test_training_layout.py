"""Who keeps bitsandbytes from repacking 4-bit weights, and until when.

It repacks only on CPUs with AVX512-BF16, and reads its leave to do so in an attribute of each layer, in eval mode
alone. So the attribute is set by hand here, and what is asserted is what bitsandbytes would read.
"""

import copy
import gc
import io
import itertools
import pickle

import pytest
import torch
from models import quantised, quantised_mlp, trainable
from torch import nn

from flatlora import BiLoRAOptimizer, GGPOOptimizer, apply_gralora, attach_auxiliary, detach_auxiliary, weight_noise
from flatlora.layers.bnb import TrainingLayout, hold_training_layout

pytest.importorskip("bitsandbytes")

FLAG = "support_avx512bf16_for_cpu"


def willing(model):
    """`model` as if it had been built on such a CPU."""
    for module in model.modules():
        if hasattr(module, FLAG):
            setattr(module, FLAG, True)
    return model


def repackable(model):
    """What bitsandbytes may do to each 4-bit layer."""
    found = {bool(getattr(module, FLAG)) for module in model.modules() if hasattr(module, FLAG)}
    assert len(found) == 1
    return found.pop()


def as_found(model):
    return all(getattr(module, FLAG) is True for module in model.modules() if hasattr(module, FLAG))


def adapted():
    return willing(quantised_mlp("nf4"))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_it_is_held_until_the_last_holder_lets_go(order):
    model = adapted()
    holders = [hold_training_layout(model) for _ in order]
    for i, holder in enumerate(order):
        assert not repackable(model)
        holders[holder].release()
        holders[holder].release()  # once is enough
        assert repackable(model) == (i == len(order) - 1)
    assert as_found(model)


def test_methods_hold_it_in_any_order():
    model = adapted()
    ggpo = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model)
    attach_auxiliary(model)
    ggpo.remove()
    assert not repackable(model)  # under the live auxiliary
    ggpo.remove()
    with weight_noise(model, 0.1):
        assert not repackable(model)
    assert not repackable(model)
    detach_auxiliary(model)
    assert as_found(model)


def test_an_auxiliary_that_goes_first_leaves_it_held():
    model = adapted()
    attach_auxiliary(model)
    ggpo = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model)
    detach_auxiliary(model)
    assert not repackable(model)
    ggpo.remove()
    assert as_found(model)


def test_a_holder_that_is_collected_lets_go():
    model = adapted()
    first, second = hold_training_layout(model), hold_training_layout(model)
    del first
    gc.collect()
    assert not repackable(model)
    del second
    gc.collect()
    assert repackable(model)
    again = hold_training_layout(model)
    assert not repackable(model)
    again.release()
    assert as_found(model)


def test_a_part_of_a_model_may_be_held():
    model = nn.ModuleList([quantised(nn.Linear(64, 64), "nf4") for _ in range(2)])
    willing(model)
    part, all_of_it = hold_training_layout(model[0]), hold_training_layout(model)
    all_of_it.release()
    assert not getattr(model[0], FLAG) and getattr(model[1], FLAG) is True
    part.release()
    assert as_found(model)


def test_layers_that_are_not_repacked_are_left_alone():
    model = quantised_mlp("nf4")
    before = {name: getattr(module, FLAG) for name, module in model.named_modules() if hasattr(module, FLAG)}
    for module in model.modules():
        if hasattr(module, FLAG):
            setattr(module, FLAG, False)
    holder = hold_training_layout(model)
    holder.release()
    assert before and not repackable(model)
    plain = nn.Linear(3, 3)
    hold_training_layout(plain).release()
    assert not hasattr(plain, FLAG)


def test_what_was_changed_meanwhile_is_not_changed_back():
    model = adapted()
    holder = hold_training_layout(model)
    for module in model.modules():
        if hasattr(module, FLAG):
            setattr(module, FLAG, False)
    holder.release()
    assert not repackable(model)


# --- copies -------------------------------------------------------------------------------------------------------


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved]


def base_model():
    return willing(nn.Sequential(quantised(nn.Linear(64, 64), "nf4"), nn.ReLU(), quantised(nn.Linear(64, 64), "nf4")))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_the_model_alone_is_held_by_nobody(copied):
    model = base_model()
    holder = hold_training_layout(model)
    twin = copied(model)
    assert repackable(twin) and not repackable(model)
    other = hold_training_layout(twin)
    holder.release()
    assert as_found(model) and not repackable(twin)
    other.release()
    assert as_found(twin)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("model_first", [True, False])
def test_a_copy_of_the_model_and_its_holder_holds_the_copied_model(copied, model_first):
    model = base_model()
    holder = hold_training_layout(model)
    if model_first:
        twin, other = copied((model, holder))
    else:
        other, twin = copied((holder, model))
    assert isinstance(other, TrainingLayout) and not repackable(twin)
    holder.release()
    assert as_found(model) and not repackable(twin)
    other.release()
    assert as_found(twin)


def test_a_shallow_copy_of_a_holder_is_a_holder_of_its_own():
    model = base_model()
    holder = hold_training_layout(model)
    other = copy.copy(holder)
    holder.release()
    assert not repackable(model)
    other.release()
    assert as_found(model)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_gralora_model_is_held_by_itself(copied):
    model = apply_gralora(base_model(), ["0", "2"], r=8, k=2)
    twin = copied(model)
    del model
    gc.collect()
    assert not repackable(twin)
    twin.eval()(torch.randn(2, 64))


def test_a_copy_under_an_auxiliary_can_be_freed_on_its_own():
    model = adapted()
    attach_auxiliary(model)
    twin = copy.deepcopy(model)
    detach_auxiliary(twin)
    assert repackable(twin) and not repackable(model)
    detach_auxiliary(model)
    assert as_found(model)


def test_an_optimizer_that_is_gone_holds_nothing():
    model = adapted()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    assert not repackable(model)
    del optimizer
    gc.collect()
    assert repackable(model)
    detach_auxiliary(model)
    assert repackable(model)
