"""Which passes are perturbed, and by whom: reference adapters, generation, checkpointing, modes, copies, successors."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from helpers import adamw, adapters, difference, epsilon, ggpo, outputs, tokens, train
from models import lora_mlp, tiny_llama, trainable
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

from flatlora import BiLoRAOptimizer, GGPOOptimizer, attach_auxiliary, detach_auxiliary, remove_perturbation


def bilora(model, **kwargs):
    """Bi-LoRA with auxiliaries that are not zero."""
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, seed=0, **kwargs)
    with torch.no_grad():
        for p in optimizer.perturbation_parameters():
            p.normal_(0, 0.1)
    return optimizer


METHODS = {
    "gaussian": lambda model, **kwargs: ggpo(model, sigma=0.3, **kwargs),
    "low_rank": lambda model, **kwargs: ggpo(model, sigma=0.3, noise="low_rank", **kwargs),
    "bilora": bilora,
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def perturbed(model):
    return max(float(e.abs().max()) for e in epsilon(model).values()) > 1e-3


def with_reference(model):
    """A second adapter that nothing trains, as a reference policy's."""
    model.add_adapter("ref", LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    for name, p in model.named_parameters():
        if ".ref." in name:
            p.requires_grad_(False)
    return model


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unfrozen", [False, True])
def test_a_reference_adapter_is_never_perturbed(method, unfrozen):
    model = with_reference(lora_mlp())
    optimizer = method(model)
    assert perturbed(model)
    model.set_adapter("ref")  # which makes PEFT ask for its gradients
    if not unfrozen:
        model.base_model.requires_grad_(False)
    assert not perturbed(model)
    model.set_adapter("default")
    assert perturbed(model) and optimizer is not None


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


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_passes_that_record_no_gradients_are_unperturbed(method, context):
    model = lora_mlp()
    x = torch.randn(3, 32)
    clean = model.eval()(x).detach()
    optimizer = method(model.train())
    with context():
        found = model(x)
    torch.testing.assert_close(found, clean)
    assert not torch.allclose(model(x), clean, atol=1e-3)
    assert optimizer is not None


def test_those_who_want_them_perturbed_may_say_so(method):
    model = lora_mlp()
    optimizer = method(model, perturb_no_grad=True)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x))
        assert not torch.allclose(model(x), model.eval()(x), atol=1e-3)
    assert optimizer is not None


def test_generation_in_train_mode_is_unperturbed(method):
    model = tiny_llama()
    kwargs = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = model.eval().generate(tokens(0), **kwargs)
    optimizer = method(model.train())
    found = model.generate(tokens(0), **kwargs)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores, expected.scores)
    assert optimizer is not None and model.training


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_regions_are_perturbed_in_both_their_passes(method, reentrant):
    def gradients(checkpointed):
        model = lora_mlp()
        optimizer = method(model)
        seen = []
        layer = model.base_model.model[0]
        layer.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        out.square().sum().backward()
        assert len(seen) == 1 + checkpointed and all(torch.equal(one, seen[0]) for one in seen)
        return [p.grad for p in trainable(model)], x.grad, optimizer

    plain, again = gradients(False), gradients(True)
    assert difference(plain[:2], again[:2]) is None


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


def test_update_bn_and_averages_see_the_plain_model(method):
    model = lora_mlp()
    net = torch.nn.Sequential(model, torch.nn.BatchNorm1d(32))
    batches = [torch.randn(8, 32) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, net)
    expected = net[1].running_mean.clone()
    optimizer = method(model)
    torch.optim.swa_utils.update_bn(batches, net)
    torch.testing.assert_close(net[1].running_mean, expected)
    assert optimizer is not None


# --- the life of a perturbation -------------------------------------------------------------------------------------


def test_a_perturbation_goes_with_its_optimizer(method):
    model, plain = lora_mlp(), lora_mlp()
    optimizer = method(model)
    assert perturbed(model)
    del optimizer
    gc.collect()
    assert not perturbed(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    train(model, adamw(model), range(3))
    train(plain, adamw(plain), range(3))
    assert difference({k: v for k, v in adapters(model).items() if "ascent_branches" not in k}, adapters(plain)) is None
    assert method(model) is not None and perturbed(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_model_carry_none(method, how, tmp_path):
    model, plain = lora_mlp(), lora_mlp()
    optimizer = method(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not perturbed(twin) and perturbed(model)
    train(twin, adamw(twin), range(3))
    train(plain, adamw(plain), range(3))
    assert difference({k: v for k, v in adapters(twin).items() if "ascent_branches" not in k}, adapters(plain)) is None
    detach_auxiliary(twin)
    assert method(twin) is not None and perturbed(twin) and optimizer is not None


def test_a_pickled_model_needs_no_flatlora():
    model = lora_mlp()
    optimizer = ggpo(model)
    assert b"flatlora" not in pickle.dumps(model) and optimizer is not None


def test_an_optimizer_that_has_trained_hands_over_to_its_successor(method):
    model = lora_mlp()
    first = method(model)
    train(model, first, range(2))
    second = method(model)
    assert perturbed(model)
    train(model, second, range(2))
    with pytest.raises(RuntimeError, match="built later"):
        first.step()
    del first
    gc.collect()
    assert perturbed(model)


def test_two_optimizers_at_once_are_refused():
    model = lora_mlp()
    optimizer = ggpo(model)
    with pytest.raises(ValueError, match="already perturbed"):
        ggpo(model)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="already perturbed"):
        GGPOOptimizer(optimizer, model)
    assert perturbed(model)


ORDERS = [
    ("aux", "ggpo", "detach", "remove"),
    ("ggpo", "aux", "remove", "detach"),
    ("aux", "ggpo", "remove", "detach", "detach"),
    ("ggpo", "aux", "detach", "all"),
    ("aux", "ggpo", "all", "detach", "remove"),
    ("ggpo", "aux", "all", "aux", "ggpo", "detach", "remove"),
    ("aux", "detach", "ggpo", "aux", "remove", "all", "all"),
]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_any_order_of_attaching_and_removing_ends_with_a_clean_model(order):
    model = lora_mlp()
    keys, clean = set(model.state_dict()), outputs(model)
    optimizers = []
    for what in order:
        if what == "aux":
            attach_auxiliary(model, seed=0)
        elif what == "ggpo":
            optimizers.append(ggpo(model))
        elif what == "remove":
            optimizers[-1].remove()
        elif what == "detach":
            detach_auxiliary(model)
        else:
            remove_perturbation(model)
    assert set(model.state_dict()) == keys and difference(outputs(model), clean) is None
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert method_works(model)


def method_works(model):
    optimizers = [bilora(model), ggpo(model)]
    return perturbed(model) and len(optimizers) == 2


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
    optimizer = ggpo(model, sigma=0.3)
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


@pytest.mark.parametrize("sigma", [1e155, float("inf"), float("nan"), -1.0, True, "0.1", None])
def test_noise_that_cannot_be_drawn_is_refused(sigma):
    model = lora_mlp()
    with pytest.raises(ValueError, match="sigma must be"):
        ggpo(model, sigma=sigma)
    assert not perturbed(model)
