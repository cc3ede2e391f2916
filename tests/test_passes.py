"""Which passes are perturbed, beyond tests/every_method: frozen adapters, closures, checkpoints, patches, devices."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch
from helpers import adapters, closure_of, difference, epsilon, ggpo, outputs, perturbation, tokens, train, wrapped
from models import lora_mlp, tiny_llama, trainable
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

from flatlora import (
    BiLoRAOptimizer,
    GGPOOptimizer,
    LoRASAMOptimizer,
    apply_gralora,
    detach_auxiliary,
    remove_perturbation,
)


def bilora(model, **kwargs):
    """Bi-LoRA with auxiliaries that are not zero."""
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, seed=0, **kwargs)
    with torch.no_grad():
        for p in optimizer.perturbation_parameters():
            p.normal_(0, 0.1)
    return optimizer


def lorasam(model, **kwargs):
    """LoRASAM after a step that moves nothing, as its first passes are unperturbed."""
    optimizer = wrapped(LoRASAMOptimizer, model, rho=0.3, **kwargs)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    return optimizer


METHODS = {
    "gaussian": lambda model, **kwargs: ggpo(model, sigma=0.3, **kwargs),
    "low_rank": lambda model, **kwargs: ggpo(model, sigma=0.3, noise="low_rank", **kwargs),
    "bilora": bilora,
    "lorasam": lorasam,
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def gralora_mlp():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32))
    model = apply_gralora(net, ["0", "2"], r=4, k=2, hybrid_r=2)
    for name, p in model.named_parameters():
        if "_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.train()


def perturbed(model):
    return perturbation(model) > 1e-3


def with_reference(model):
    """A second adapter that nothing trains, as a reference policy's."""
    model.add_adapter("ref", LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    for name, p in model.named_parameters():
        if ".ref." in name:
            p.requires_grad_(False)
    return model


# --- adapters -------------------------------------------------------------------------------------------------------


def test_all_parameters_may_be_handed_over():
    model = with_reference(lora_mlp())
    optimizer = GGPOOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, sigma=0.3, seed=1)
    assert perturbed(model)
    model.set_adapter("ref")
    assert not perturbed(model)
    optimizer.remove()
    both = GGPOOptimizer(optimizer.base_optimizer, model, sigma=0.3, adapter=["default", "ref"])
    assert perturbed(model) and both.row_std()


def test_an_adapter_that_is_frozen_is_unperturbed_until_it_is_trained_again(method):
    model = lora_mlp()
    optimizer = method(model)
    params = trainable(model)
    for p in params:
        p.requires_grad_(False)
    assert not perturbed(model)
    for p in params:
        p.requires_grad_(True)
    assert perturbed(model) and optimizer is not None


def test_an_adapter_that_wakes_up_unperturbed_is_named(caplog):
    model = with_reference(lora_mlp())
    optimizer = GGPOOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, sigma=0.3, seed=1)
    train(model, optimizer, range(2))
    assert not caplog.records
    model.set_adapter("ref")
    train(model, optimizer, range(2))
    assert len([record for record in caplog.records if "'ref'" in record.getMessage()]) == 1


# --- passes without gradients ---------------------------------------------------------------------------------------


def test_those_who_want_them_perturbed_may_say_so(method):
    model = lora_mlp()
    optimizer = method(model, perturb_no_grad=True)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x))
        assert not torch.allclose(model(x), model.eval()(x), atol=1e-3)
    assert optimizer is not None


def test_nested_reentrant_checkpoints(method):
    model = lora_mlp()
    optimizer = method(model)
    x = torch.randn(3, 32, requires_grad=True)
    expected = model(x)
    found = checkpoint(lambda x: checkpoint(model, x, use_reentrant=True), x, use_reentrant=True)
    torch.testing.assert_close(found, expected)
    assert optimizer is not None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_without_gradients_outside_is_unperturbed(method, reentrant, context):
    model = lora_mlp()
    x = torch.randn(3, 32, requires_grad=True)
    clean = model.eval()(x).detach()
    optimizer = method(model.train())
    with context():
        found = checkpoint(model, x, use_reentrant=reentrant)
    torch.testing.assert_close(found, clean)
    assert optimizer is not None


@pytest.mark.parametrize("adapt", [lora_mlp, gralora_mlp])
@pytest.mark.parametrize("method", ["gaussian", "low_rank", "lorasam"])
def test_a_closure_sees_one_epsilon_wherever_it_moves_the_parameters(method, adapt):
    model = adapt().double()
    base = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=4)
    if method == "lorasam":
        optimizer = LoRASAMOptimizer(base, model, rho=0.3)
    else:
        optimizer = ggpo(model, base, sigma=0.3, beta=10.0, noise=method)
    x, seen, places = torch.randn(5, 32, dtype=torch.float64), [], []

    def loss():
        seen.append(epsilon(model))
        places.append(trainable(model)[0].detach().clone())
        return (model(x) - 0.4).square().mean()

    for t in range(2):
        seen.clear(), places.clear()
        optimizer.step(closure_of(optimizer, loss))
        assert len(seen) > 2 and not torch.equal(places[0], places[-1])
        torch.testing.assert_close(seen, [seen[0]] * len(seen), rtol=1e-9, atol=1e-12)
        sizes = [float(value.abs().max()) for value in seen[0].values()]
        assert max(sizes) < 1e-14 if method == "lorasam" and t == 0 else min(sizes) > 1e-4


# --- the life of a perturbation -------------------------------------------------------------------------------------


def test_a_pickled_model_needs_no_flatlora():
    model = lora_mlp()
    optimizer = ggpo(model)
    assert b"flatlora" not in pickle.dumps(model) and optimizer is not None


def test_two_optimizers_at_once_are_refused():
    model = lora_mlp()
    optimizer = ggpo(model)
    with pytest.raises(ValueError, match="already perturbed"):
        ggpo(model)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="already perturbed"):
        GGPOOptimizer(optimizer, model)
    assert perturbed(model)


def test_a_patch_of_another_library_in_between_is_kept():
    model = lora_mlp()
    layer, clean = model.base_model.model[0], outputs(model)
    first = ggpo(model, sigma=0.3)
    ours = layer.forward
    layer.forward = patch = lambda x: ours(x)
    second = bilora(model)
    assert perturbed(model)
    first.remove()
    detach_auxiliary(model)
    assert layer.forward is patch and difference(outputs(model), clean) is None
    layer.forward = ours  # the other library takes its patch off
    remove_perturbation(model)
    assert "forward" not in layer.__dict__ and difference(outputs(model), clean) is None
    assert second is not None


# --- looking, and writing past autograd -----------------------------------------------------------------------------


@pytest.mark.parametrize("look", ["train", "eval", "midway"])
def test_looking_at_row_std_changes_nothing(look):
    def run(looks):
        model = tiny_llama()
        optimizer = ggpo(model, sigma=0.3, beta=1.0)
        for i in range(3):
            if looks:
                model.train(look != "eval")
                optimizer.row_std()
                model.train()
            ids = tokens(i)
            model(input_ids=ids, labels=ids).loss.backward()
            if looks and look == "midway":
                model.eval()
                optimizer.row_std()
                model.train()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return adapters(model)

    assert difference(run(False), run(True)) is None


def test_weights_that_peft_swaps_in_are_seen_at_once(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model, other = lora_mlp(seed=0), lora_mlp(seed=1)
    other.save_pretrained(tmp_path)
    optimizer = ggpo(model, sigma=0.3, update_every=1)
    before = outputs(model)
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    fresh = lora_mlp(seed=0)
    fresh.load_state_dict(adapters(other), strict=False)
    expected = ggpo(fresh, sigma=0.3)
    assert difference(optimizer.row_std(), expected.row_std()) is None
    assert difference(outputs(model), outputs(fresh)) is None and difference(before, outputs(model)) is not None


def test_a_replica_is_refused(method):
    model = lora_mlp()
    optimizer = method(model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        model.base_model.model[0]._replicate_for_data_parallel()
    del optimizer
    gc.collect()
    assert model.base_model.model[0]._replicate_for_data_parallel() is not model.base_model.model[0]


@pytest.mark.parametrize("autocast", [False, True])
def test_backward_through_weights_that_have_moved_is_refused(method, autocast):
    model = lora_mlp()
    optimizer = method(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(torch.randn(3, 32)).float().square().sum()
    with torch.no_grad():
        for p in trainable(model):
            p.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert optimizer is not None


def test_shapes_alone_on_the_meta_device(method):
    model = lora_mlp()
    optimizer = method(model)
    model.to("meta")
    out = model(torch.empty(3, 32, device="meta"))
    assert out.shape == (3, 32) and out.is_meta
    out.sum().backward()
    assert all(p.grad.shape == p.shape for p in trainable(model)) and optimizer is not None


def test_another_default_device():
    model = lora_mlp()
    with torch.device("meta"):  # stands in for an accelerator
        # SGD, as torch 2.6's AdamW puts its own step counts on the default device.
        optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=1e-2, seed=0)
        noise = GGPOOptimizer(optimizer, model, sigma=0.3)
        model(torch.randn(3, 32, device="cpu")).sum().backward()
        noise.step()
    assert all(p.device.type == "cpu" for p in model.parameters())
