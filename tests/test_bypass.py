"""What goes past a method: it is refused or told of, nothing is claimed, and what only looks so is left in peace."""

from __future__ import annotations

import pytest
import torch
from helpers import difference, perturbation, primary, step
from methods import over
from models import mlp_with, trained
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flatlora

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
ALL = pytest.mark.parametrize("method", ["gaussian", "LoRASAM", "Bi-LoRA"])
ONE_GROUP = pytest.mark.parametrize("method", ["gaussian", "LoRASAM"])


def sgd(params):
    return torch.optim.SGD(params, lr=0.01)


def loss(model, x=X):
    return model(x).square().mean()


def steps(model, optimizer, n=3):
    optimizer.zero_grad()
    for _ in range(n):
        step(model, optimizer, X)


# --- passes ---------------------------------------------------------------------------------------------------------


def fuse(layer):
    """What fused kernels compute of a PEFT layer: from its weights, without calling it."""

    def product(x):
        A, B, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        return F.linear(x, layer.base_layer.weight, layer.base_layer.bias) + s * (x @ A.T @ B.T)

    return product


@ALL
@pytest.mark.parametrize("perturb_no_grad", [False, True])
def test_passes_that_never_call_the_layers_are_refused_before_anything_moves(method, perturb_no_grad):
    model = mlp_with()
    net = model.base_model.model
    net.forward = lambda x: fuse(net.down)(F.silu(fuse(net.up)(x)))
    optimizer = over(method, model, sgd, perturb_no_grad=perturb_no_grad)
    before = primary(model)
    with torch.no_grad():
        net.up(X)  # a pass that trains nothing is no sign of life
    loss(model).backward()
    with pytest.raises(RuntimeError, match=r"2 layers \(first: '.*up'\).*forward.*lora_mlp_kernel.*Unsloth"):
        optimizer.step()
    assert difference(before, primary(model)) is None
    assert all(
        not (name.startswith(("noise", "perturbation")) and value) for name, value in optimizer.metrics().items()
    )
    optimizer.remove()
    optimizer.step()  # goes on as its base
    assert difference(before, primary(model)) is not None


@ALL
def test_one_layer_gone_past_is_told_of_by_name_and_once(method, said):
    model = mlp_with()
    net = model.base_model.model
    net.forward = lambda x: fuse(net.down)(F.silu(net.up(x)))
    steps(model, over(method, model, sgd), 5)
    (message,) = said()
    assert "1 layers" in message and "'base_model.model.down'" in message and "forward" in message


@ALL
def test_metrics_are_of_the_layers_that_passes_went_through(method):
    found = []
    for bypass in (False, True):
        model = mlp_with()
        net = model.base_model.model
        if bypass:
            net.forward = lambda x, net=net: fuse(net.down)(F.silu(net.up(x)))
        optimizer = over(method, model, sgd)
        steps(model, optimizer)
        found.append({k: float(v) for k, v in optimizer.metrics().items()})
    if method == "LoRASAM":
        assert found[0]["perturbation_to_rho"] == pytest.approx(1)
        assert 0 < found[1]["perturbation_to_rho"] < 0.99  # of up alone
    if method == "Bi-LoRA":  # down's auxiliary never learns
        assert (
            float(model.base_model.model.down.get_submodule(flatlora.bilora.auxiliary.NAME)[0].B.detach().norm()) == 0
        )


@ALL
def test_what_only_looks_like_a_bypass_is_left_in_peace(method, said):
    """Accumulation, checkpoints of both kinds, unused experts with stale gradients, several passes."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.turn = 0

        def forward(self, x):
            return (self.a if self.turn % 2 else self.b)(x)

    torch.manual_seed(0)
    model = get_peft_model(Experts(), LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False)).train()
    optimizer = over(method, model, sgd)
    for turn in range(4):
        model.base_model.model.turn = turn
        for _ in range(2):
            checkpoint(model, X.clone().requires_grad_(), use_reentrant=bool(turn // 2)).square().mean().backward()
        optimizer.step()  # gradients are never zeroed
    assert not said()


@ALL
def test_gradients_older_than_the_optimizer_say_nothing(method, said):
    model = mlp_with()
    loss(model).backward()
    optimizer = over(method, model, sgd)
    optimizer.step()
    steps(model, optimizer)
    assert not said()


@ALL
def test_layers_in_eval_mode_are_told_of(method, said):
    model = mlp_with()
    model.base_model.model.down.eval()
    steps(model, over(method, model, sgd))
    assert len(said()) == 1 and "eval mode" in said()[0]


@ALL
def test_compiled_passes_are_seen(method, said):
    torch._dynamo.reset()
    model = mlp_with()
    optimizer = over(method, model, sgd)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        loss(compiled).backward()
        optimizer.step()
    assert not said()
    if method == "LoRASAM":
        assert float(optimizer.metrics()["perturbation_to_rho"]) == pytest.approx(1, rel=1e-4)


@ALL
def test_a_layer_that_is_fused_from_some_step_on_is_told_of(method, said):
    model = mlp_with()
    optimizer = over(method, model, sgd)
    steps(model, optimizer)
    net = model.base_model.model
    net.forward = lambda x: fuse(net.down)(F.silu(net.up(x)))
    steps(model, optimizer, 4)
    assert len(said()) == 1 and "1 layers" in said()[0] and "forward" in said()[0]


@ALL
def test_fused_layers_are_noticed_though_the_adapter_is_frozen_at_the_step(method):
    model = mlp_with("default", "reference")
    net = model.base_model.model
    net.forward = lambda x: fuse(net.down)(F.silu(fuse(net.up)(x)))
    optimizer = over(method, model, sgd, adapter="default")
    loss(model).backward()
    model.set_adapter("reference")
    with pytest.raises(RuntimeError, match="forward"):
        optimizer.step()


@ALL
def test_a_forward_that_took_the_place_of_ours_is_stood_in_for_again(method):
    """As where Accelerate's hooks were on the layer before the optimizer came, and are taken off."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = mlp_with()
    layers = [module for module in model.modules() if isinstance(module, PeftLinear)]
    for layer in layers:
        add_hook_to_module(layer, ModelHook())
    optimizer = over(method, model, sgd)
    for layer in layers:
        remove_hook_from_module(layer)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="forward"):
        optimizer.step()
    optimizer.remove()
    optimizer = over(method, model, sgd)
    optimizer.zero_grad()
    steps(model, optimizer)
    assert perturbation(model) > 0


# --- recomputation --------------------------------------------------------------------------------------------------


def recomputed(function, block, x):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return function(block, x), x


def _backward(ctx, grad):
    out, x = recomputed(lambda block, x: block(x), ctx.block, ctx.saved_tensors[0])
    torch.autograd.backward(out, grad)
    return None, x.grad


class NamedSelf(torch.autograd.Function):
    @staticmethod
    def forward(self, block, x):
        self.block = block
        self.save_for_backward(x)
        return block(x)

    backward = staticmethod(_backward)


class InArgs(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return NamedSelf.forward(*args)

    backward = staticmethod(_backward)


class WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(block, x):
        return block(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.block = inputs[0]
        ctx.save_for_backward(inputs[1])

    backward = staticmethod(_backward)


class Caller:
    """A decorator that is an object."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


class ByObject(torch.autograd.Function):
    forward = staticmethod(Caller(NamedSelf.forward))
    backward = staticmethod(_backward)


class CustomForward(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(c, block, x):
        return NamedSelf.forward(c, block, x)

    backward = staticmethod(torch.amp.custom_bwd(_backward, device_type="cpu"))


FUNCTIONS = pytest.mark.parametrize("function", [NamedSelf, InArgs, WithSetup, CustomForward, ByObject])


@ALL
@FUNCTIONS
def test_recomputation_of_ones_own_sees_the_first_pass_perturbation(method, function):
    results = []
    for kept in (False, True):
        model = mlp_with()
        optimizer = over(method, model, sgd)
        steps(model, optimizer)
        x = X.clone().requires_grad_()
        out = (function.apply(model, x) if kept else model(x)).square().mean()
        out.backward()
        results.append([out.detach(), x.grad, *(p.grad for p in trained(model))])
    for plain, own in zip(*results, strict=True):
        torch.testing.assert_close(own, plain)


@ALL
@FUNCTIONS
def test_such_a_function_under_no_grad_stays_unperturbed(method, function):
    model = mlp_with()
    optimizer = over(method, model, sgd)
    steps(model, optimizer)
    with torch.no_grad():
        assert torch.equal(function.apply(model, X), model(X))


# --- one loss in two passes -----------------------------------------------------------------------------------------


@ALL
def test_two_passes_of_one_loss_are_told_of_once_and_exact_when_asked_for(method, said):
    model = mlp_with()
    optimizer = over(method, model, sgd)
    steps(model, optimizer)
    for _ in range(2):
        with torch.no_grad():
            first = model(X)
        assert not torch.equal(first, model(X))
    assert len([message for message in said() if "perturb_no_grad=True" in message]) == 1
    optimizer.remove()
    optimizer = over(method, model, sgd, perturb_no_grad=True)
    steps(model, optimizer)
    with torch.no_grad():
        first = model(X)
    torch.testing.assert_close(first, model(X))


@ALL
def test_no_word_of_two_passes_where_nothing_is_perturbed_or_a_step_lies_between(method, said):
    model = mlp_with()
    optimizer = over(method, model, sgd)
    with torch.no_grad():
        model(X)
    if method != "gaussian":  # its noise is there from the first pass
        loss(model).backward()
        optimizer.step()
        assert not [message for message in said() if "perturb_no_grad" in message] or method == "Bi-LoRA"
    model.eval()
    with torch.no_grad():
        model(X)  # an evaluation
    model.train()
    steps(model, optimizer)
    assert len(said()) <= 1


@ALL
def test_no_word_of_two_passes_where_other_layers_ran_without_gradients(method, said):
    """A tower that is frozen for a while, or lower layers."""
    model = mlp_with()
    optimizer = over(method, model, sgd)
    net = model.base_model.model

    def forward(x):
        with torch.no_grad():
            x = F.silu(net.up(x))
        return net.down(x)

    steps(model, optimizer)
    net.forward = forward
    steps(model, optimizer)
    assert not said()
