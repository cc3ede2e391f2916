"""What goes past a method: it is refused or told of, nothing is claimed, and what only looks so is left in peace."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flatlora
from flatlora import BiLoRAOptimizer, GGPOOptimizer, LoRASAMOptimizer

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def lora(*names, seed=0, **config):
    """`Net` under PEFT's LoRA with nonzero B; all the adapters named are trained, the first is active."""
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": ["a", "b"], "init_lora_weights": False, **config}
    names = names or ("default",)
    model = get_peft_model(Net(), LoraConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**config))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model.train()


def params(model):
    return [p for n, p in model.named_parameters() if p.requires_grad and "ascent" not in n]


def ggpo(model, base=torch.optim.SGD, **options):
    return GGPOOptimizer(base(params(model), lr=0.01), model, sigma=0.3, seed=1, **options)


def lorasam(model, base=torch.optim.SGD, **options):
    return LoRASAMOptimizer(base(params(model), lr=0.01), model, rho=0.3, **options)


def bilora(model, base=torch.optim.SGD, **options):
    return BiLoRAOptimizer.for_model(model, base, lr=0.01, rho=0.3, seed=1, **options)


ALL = pytest.mark.parametrize("method", [ggpo, lorasam, bilora])


def loss(model, x=X):
    return model(x).square().mean()


def steps(model, optimizer, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    optimizer.zero_grad()


def values(model):
    return [p.detach().clone() for p in params(model)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def perturbed(model, x=X):
    """How far a pass that trains is from one that does not."""
    trained = model.train()(x)
    found = float((trained - model.eval()(x)).detach().norm())
    model.train()
    return found


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "flatlora")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "flatlora"]


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
    model = lora()
    net = model.base_model.model
    net.forward = lambda x: fuse(net.b)(torch.tanh(fuse(net.a)(x)))
    optimizer = method(model, perturb_no_grad=perturb_no_grad)
    before = values(model)
    with torch.no_grad():
        net.a(X)  # a pass that trains nothing is no sign of life
    loss(model).backward()
    with pytest.raises(RuntimeError, match=r"2 layers \(first: '.*a'\).*forward.*lora_mlp_kernel.*Unsloth"):
        optimizer.step()
    assert same(before, values(model))
    assert all(
        not (name.startswith(("noise", "perturbation")) and value) for name, value in optimizer.metrics().items()
    )
    optimizer.remove()
    optimizer.step()  # goes on as its base
    assert not same(before, values(model))


@ALL
def test_one_layer_gone_past_is_told_of_by_name_and_once(method, said):
    model = lora()
    net = model.base_model.model
    net.forward = lambda x: fuse(net.b)(torch.tanh(net.a(x)))
    steps(model, method(model), 5)
    (message,) = said()
    assert "1 layers" in message and "'base_model.model.b'" in message and "forward" in message


@ALL
def test_metrics_are_of_the_layers_that_passes_went_through(method):
    found = []
    for bypass in (False, True):
        model = lora()
        net = model.base_model.model
        if bypass:
            net.forward = lambda x, net=net: fuse(net.b)(torch.tanh(net.a(x)))
        optimizer = method(model)
        steps(model, optimizer)
        found.append({k: float(v) for k, v in optimizer.metrics().items()})
    if method is lorasam:
        assert found[0]["perturbation_to_rho"] == pytest.approx(1)
        assert 0 < found[1]["perturbation_to_rho"] < 0.99  # of a alone
    if method is bilora:  # b's auxiliary never learns
        assert float(model.base_model.model.b.get_submodule(flatlora.bilora.auxiliary.NAME)[0].B.detach().norm()) == 0


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
    optimizer = method(model)
    for step in range(4):
        model.base_model.model.turn = step
        for _ in range(2):
            checkpoint(model, X.clone().requires_grad_(), use_reentrant=bool(step // 2)).square().mean().backward()
        optimizer.step()  # gradients are never zeroed
    assert not said()


@ALL
def test_gradients_older_than_the_optimizer_say_nothing(method, said):
    model = lora()
    loss(model).backward()
    optimizer = method(model)
    optimizer.step()
    steps(model, optimizer)
    assert not said()


@ALL
def test_layers_in_eval_mode_are_told_of(method, said):
    model = lora()
    model.base_model.model.b.eval()
    steps(model, method(model))
    assert len(said()) == 1 and "eval mode" in said()[0]


@pytest.mark.parametrize("method", [ggpo, lorasam, bilora])
def test_compiled_passes_are_seen(method, said):
    torch._dynamo.reset()
    model = lora()
    optimizer = method(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        loss(compiled).backward()
        optimizer.step()
    assert not said()
    if method is lorasam:
        assert float(optimizer.metrics()["perturbation_to_rho"]) == pytest.approx(1, rel=1e-4)


@ALL
def test_a_layer_that_is_fused_from_some_step_on_is_told_of(method, said):
    model = lora()
    optimizer = method(model)
    steps(model, optimizer)
    net = model.base_model.model
    net.forward = lambda x: fuse(net.b)(torch.tanh(net.a(x)))
    steps(model, optimizer, 4)
    assert len(said()) == 1 and "1 layers" in said()[0] and "forward" in said()[0]


@ALL
def test_fused_layers_are_noticed_though_the_adapter_is_frozen_at_the_step(method):
    model = lora("default", "reference")
    net = model.base_model.model
    net.forward = lambda x: fuse(net.b)(torch.tanh(fuse(net.a)(x)))
    optimizer = method(model, adapter="default")
    loss(model).backward()
    model.set_adapter("reference")
    with pytest.raises(RuntimeError, match="forward"):
        optimizer.step()


@ALL
def test_a_forward_that_took_the_place_of_ours_is_stood_in_for_again(method):
    """As where Accelerate's hooks were on the layer before the optimizer came, and are taken off."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = lora()
    layers = [module for module in model.modules() if isinstance(module, PeftLinear)]
    for layer in layers:
        add_hook_to_module(layer, ModelHook())
    optimizer = method(model)
    for layer in layers:
        remove_hook_from_module(layer)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="forward"):
        optimizer.step()
    optimizer.remove()
    optimizer = method(model)
    optimizer.zero_grad()
    steps(model, optimizer)
    assert perturbed(model) > 0


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
        model = lora()
        optimizer = method(model)
        steps(model, optimizer)
        x = X.clone().requires_grad_()
        out = (function.apply(model, x) if kept else model(x)).square().mean()
        out.backward()
        results.append([out.detach(), x.grad, *(p.grad for p in params(model))])
    for plain, own in zip(*results, strict=True):
        torch.testing.assert_close(own, plain)


@ALL
@FUNCTIONS
def test_such_a_function_under_no_grad_stays_unperturbed(method, function):
    model = lora()
    optimizer = method(model)
    steps(model, optimizer)
    with torch.no_grad():
        assert torch.equal(function.apply(model, X), model(X))


# --- one loss in two passes -----------------------------------------------------------------------------------------


@ALL
def test_two_passes_of_one_loss_are_told_of_once_and_exact_when_asked_for(method, said):
    model = lora()
    optimizer = method(model)
    steps(model, optimizer)
    for _ in range(2):
        with torch.no_grad():
            first = model(X)
        assert not torch.equal(first, model(X))
    assert len([message for message in said() if "perturb_no_grad=True" in message]) == 1
    optimizer.remove()
    optimizer = method(model, perturb_no_grad=True)
    steps(model, optimizer)
    with torch.no_grad():
        first = model(X)
    torch.testing.assert_close(first, model(X))


@ALL
def test_no_word_of_two_passes_where_nothing_is_perturbed_or_a_step_lies_between(method, said):
    model = lora()
    optimizer = method(model)
    with torch.no_grad():
        model(X)
    if method is not ggpo:  # its noise is there from the first pass
        loss(model).backward()
        optimizer.step()
        assert not [message for message in said() if "perturb_no_grad" in message] or method is bilora
    model.eval()
    with torch.no_grad():
        model(X)  # an evaluation
    model.train()
    steps(model, optimizer)
    assert len(said()) <= 1


@ALL
def test_no_word_of_two_passes_where_other_layers_ran_without_gradients(method, said):
    """A tower that is frozen for a while, or lower layers."""
    model = lora()
    optimizer = method(model)
    net = model.base_model.model

    def forward(x):
        with torch.no_grad():
            x = torch.tanh(net.a(x))
        return net.b(x)

    steps(model, optimizer)
    net.forward = forward
    steps(model, optimizer)
    assert not said()


# --- steps ----------------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("by", ["loop", "scaler", "scheduler"])
def test_a_step_of_the_base_is_refused_before_anything_moves(method, by):
    model = lora()
    optimizer = method(model)
    steps(model, optimizer)
    before = values(model)
    loss(model).backward()
    base = optimizer.base_optimizer
    with pytest.raises(RuntimeError, match=f"SGD.step.. was called, which goes past the {type(optimizer).__name__}"):
        if by == "scaler":
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(loss(model)).backward()
            scaler.step(base)
        else:
            torch.optim.lr_scheduler.ConstantLR(base) if by == "scheduler" else None
            base.step()
    assert same(before, values(model))
    optimizer.step()
    optimizer.remove()
    base.step()  # nothing perturbs any more


@ALL
def test_a_base_whose_wrapper_is_gone_or_superseded_may_be_stepped(method):
    model = lora()
    base = torch.optim.SGD(params(model), lr=0.01)
    optimizer = GGPOOptimizer(base, model)
    steps(model, optimizer)
    del optimizer
    loss(model).backward()
    base.step()
    optimizer = method(model)
    steps(model, optimizer)
    newer = method(model)
    steps(model, newer)
    assert optimizer._attachment.superseded


@ALL
def test_copies_and_stacks_are_stepped_in_peace(method):
    model = lora()
    optimizer = method(model)
    stack = GGPOOptimizer(optimizer, model) if method is not ggpo else LoRASAMOptimizer(optimizer, model)
    steps(model, stack)
    model, stack = copy.deepcopy((model, stack))
    steps(model, stack)
    with pytest.raises(RuntimeError, match="goes past"):
        stack.base_optimizer.base_optimizer.step()


class SAM(torch.optim.Optimizer):
    """Two-pass SAM, as its users know it."""

    def __init__(self, params, lr, rho=0.05):
        super().__init__(params, {"rho": rho, "lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack(grads).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.detach().clone()
                    p.add_(p.grad, alpha=float(group["rho"] / norm))

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "old" in self.state[p]:
                    p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure=None):
        closure()
        self.first_step()
        self.zero_grad()
        closure()
        self.second_step()


@pytest.mark.parametrize("method", [ggpo, lorasam])
def test_the_two_steps_of_sam_go_through_the_closure(method, said):
    model = lora()
    optimizer = method(model, SAM)
    before = values(model)
    loss(model).backward()
    with pytest.raises(AttributeError, match=r"first_step\(\) of the SAM goes past .*step\(closure\)"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="goes past"):
        optimizer.base_optimizer.second_step()
    assert same(before, values(model))

    def closure():
        optimizer.zero_grad()
        out = loss(model)
        out.backward()
        return out

    optimizer.step(closure)
    assert perturbed(model) > 0 and not said()


# --- closures -------------------------------------------------------------------------------------------------------


@ALL
def test_a_closure_may_set_the_mode_and_choose_the_adapter(method, said):
    results = []
    for within in (False, True):
        model = lora("p", "q")
        optimizer = method(model, adapter="p")

        def prepare(model=model):
            model.train()
            model.set_adapter("p")

        def closure(within=within, prepare=prepare, model=model, optimizer=optimizer):
            if within:
                prepare()
            optimizer.zero_grad()
            out = loss(model)
            out.backward()
            return out

        for _ in range(3):
            model.eval()
            model.set_adapter("q")
            if not within:
                prepare()
            optimizer.step(closure)
        results.append(values(model))
    assert same(*results) and not said()
    prepare()
    assert perturbed(model) > 0


@ALL
def test_a_base_that_does_not_call_its_closure_is_told_of(method, said):
    class Ignores(torch.optim.SGD):
        def step(self, closure=None):
            super().step()

    model = lora()
    optimizer = method(model, Ignores)
    loss(model).backward()
    optimizer.step(lambda: None)
    assert any("Ignores did not call its closure" in message for message in said())


# --- adapters that are not active when the step comes ---------------------------------------------------------------


def projection(A, B, g_a, g_b, s):
    """P(G) (m, n) in float64 from the gradients of A and B, by pseudo-inverses."""
    A, B, g_a, g_b = (t.detach().double() for t in (A, B, g_a, g_b))
    of_a = g_b / s @ torch.linalg.pinv(A).T  # G·P_A, as g_B = s·G·Aᵀ
    of_b = torch.linalg.pinv(B).T @ (g_a / s)  # P_B·G, as g_A = s·Bᵀ·G
    return of_b + of_a - B @ torch.linalg.pinv(B) @ of_a


def dense_direction(model, name):
    """u of each layer of an adapter, of norm one over all."""
    found = {}
    for layer, module in model.named_modules():
        if isinstance(module, PeftLinear):
            A, B = module.lora_A[name].weight, module.lora_B[name].weight
            found[layer] = projection(A, B, A.grad, B.grad, module.scaling[name])
    norm = math.sqrt(sum(float(u.square().sum()) for u in found.values()))
    return {layer: u / norm for layer, u in found.items()}


def current(optimizer, rho=0.3):
    """ε/ρ of each layer (m, n) at present."""
    return {name: eps.B.double() @ eps.A.double() for name, eps in optimizer.current_perturbation().items()}


def test_a_reference_adapter_may_be_active_at_the_step(said):
    model = lora("policy", "reference")
    optimizer = lorasam(model, adapter="policy")
    noisy = lora("policy", "reference")
    other = ggpo(noisy, adapter="policy", beta=1.0)
    for one, opt in ((model, optimizer), (noisy, other)):
        opt.zero_grad()
        loss(one).backward()
        want = dense_direction(one, "policy")
        one.set_adapter("reference")
        opt.step()
        one.set_adapter("policy")
        rows = {name: layer["grad_sq"] for name, layer in opt.method_state()["layers"].items() if "grad_sq" in layer}
        if rows:
            norms = {name: grad.sum() for name, grad in rows.items()}
            total = sum(norms.values())
            for name, u in want.items():
                torch.testing.assert_close((rows[name] / total).double(), u.square().sum(1), rtol=1e-4, atol=1e-7)
        else:
            for name, u in want.items():
                torch.testing.assert_close(current(opt)[name], u, rtol=1e-4, atol=1e-6)
    assert not said()


def test_adapters_that_take_turns_have_a_direction_each(said, tmp_path):
    """One optimizer for both, or one for each."""

    def run(model, optimizers):
        wants = {}
        for name in ("p", "q"):
            model.set_adapter(name)
            for n, p in model.named_parameters():
                p.requires_grad_("lora_" in n)
            loss(model).backward()
            wants[name] = dense_direction(model, name)
        for optimizer in optimizers:
            optimizer.step()
        for i, name in enumerate(("p", "q")):
            model.set_adapter(name)
            for key, u in wants[name].items():
                torch.testing.assert_close(current(optimizers[i % len(optimizers)])[key], u, rtol=1e-4, atol=1e-6)
        return model, optimizers

    model = lora("p", "q")
    model, (optimizer,) = run(model, [lorasam(model, adapter=["p", "q"])])
    assert float(optimizer.metrics()["perturbation_to_rho"]) == pytest.approx(1, rel=1e-4)
    state = optimizer.state_dict()
    again = lorasam(lora("p", "q"), adapter=["p", "q"])
    again.load_state_dict(state)
    assert again._source.direction.keys() == optimizer._source.direction.keys() and len(again._source.direction) == 4

    model = lora("p", "q")
    of = {n: [p for name, p in model.named_parameters() if f".{n}." in name] for n in ("p", "q")}
    run(model, [LoRASAMOptimizer(torch.optim.SGD(of[n], lr=0.01), model, rho=0.3, adapter=n) for n in ("p", "q")])
    assert not said()


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ggpo, lorasam])
@pytest.mark.parametrize("how", ["base", "append", "extend"])
def test_adapters_that_come_in_by_hand_are_perturbed(method, how):
    model = lora("p", "q")
    model.set_adapter("p")
    optimizer = method(model)
    model.set_adapter("q")
    new = [p for n, p in model.named_parameters() if ".q." in n]
    if how == "base":
        optimizer.base_optimizer.add_param_group({"params": new})
    elif how == "append":
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": new})
    else:
        optimizer.param_groups[0]["params"].extend(new)
    steps(model, optimizer)
    assert perturbed(model) > 0


@ALL
@pytest.mark.parametrize("how", ["new parameters", "deleted and added"])
def test_adapters_that_were_replaced_are_told_of(method, how, said):
    model = lora()
    optimizer = method(model)
    if how == "new parameters":
        for module in model.modules():
            if isinstance(module, PeftLinear):
                for factor in (module.lora_A, module.lora_B):
                    factor["default"].weight = nn.Parameter(factor["default"].weight.detach().clone())
        match = "nobody trains them"
    else:
        model.add_adapter("new", LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False))
        model.set_adapter("new")
        model.delete_adapter("default")
        match = "no longer in 2 layers"
    loss(model).backward()
    optimizer.step()
    assert any(match in message for message in said())


@ALL
def test_one_optimizer_for_each_parameter_is_named(method):
    model = lora()
    with pytest.raises(ValueError, match=r"within backward, is not supported|has an auxiliary already"):
        kind = {ggpo: GGPOOptimizer, lorasam: LoRASAMOptimizer}.get(method)
        kept = []
        for p in params(model):
            kept.append(kind(torch.optim.SGD([p], lr=0.1), model) if kind else bilora(model))


@pytest.mark.parametrize("how", ["unmarked", "merged", "popped"])
def test_an_auxiliary_that_comes_out_of_its_ascent_group_is_refused(how):
    model = lora()
    optimizer = bilora(model)
    steps(model, optimizer)
    if how == "unmarked":
        optimizer.param_groups[-1]["ascent"] = False
    elif how == "merged":
        optimizer.param_groups[0]["params"].extend(optimizer.param_groups.pop()["params"])
    else:
        optimizer.param_groups.pop()
    before = values(model)
    loss(model).backward()
    with pytest.raises(ValueError, match=r"ascends|no ascent group"):
        optimizer.step()
    assert same(before, values(model))


def test_gradients_of_the_primary_alone_are_told_of(said):
    model = lora()
    optimizer = bilora(model)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model).backward(inputs=params(model))
        optimizer.step()
    assert len(said()) == 1 and "no gradient of the auxiliary" in said()[0]


class Around(torch.optim.Optimizer):
    """A base that keeps another."""

    def __init__(self, params, lr, inner=torch.optim.SGD):
        super().__init__(params, {"lr": lr})
        self.optimizer = inner(self.param_groups, lr=lr)

    def step(self, closure=None):
        self.optimizer.step()


@pytest.mark.parametrize("method", [ggpo, lorasam])
def test_the_innermost_of_several_bases_is_not_stepped_alone(method):
    model = lora()
    optimizer = method(model, lambda params, lr: Around(params, lr, Around))
    steps(model, optimizer)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="goes past"):
        optimizer.base_optimizer.optimizer.optimizer.step()


# --- forward, patched by others -------------------------------------------------------------------------------------


@ALL
def test_a_forward_that_others_patched_later_is_still_ours_to_leave(method):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = lora()
    plain = model.eval()(X)
    model.train()
    optimizer = method(model)
    layers = [module for module in model.modules() if isinstance(module, PeftLinear)]
    for layer in layers:
        add_hook_to_module(layer, ModelHook())
    steps(model, optimizer)
    assert perturbed(model) > 0
    newer = method(model)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="built later"):
        optimizer.step()
    newer.zero_grad()
    steps(model, newer)
    assert perturbed(model) > 0
    flatlora.remove_perturbation(model)
    assert perturbed(model) == 0
    for layer in layers:
        remove_hook_from_module(layer)
    assert perturbed(model) == 0 and plain.shape == model(X).shape
    flatlora.remove_perturbation(model)
    assert not any("forward" in vars(layer) for layer in layers)


# --- what Lightning and Fabric hand out -----------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("kind", ["Lightning", "Fabric"])
def test_others_objects_reach_the_optimizer_within(method, kind):
    pytest.importorskip("lightning")
    from lightning.fabric import Fabric
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = lora("p", "q")
    model.set_adapter("p")
    raw = method(model, adapter="p") if method is bilora else method(model)
    if kind == "Fabric":
        _, theirs = Fabric(accelerator="cpu", devices=1).setup(model, raw)
    else:
        theirs = LightningOptimizer(raw)
    steps(model, raw)
    assert {k: float(v) for k, v in theirs.metrics().items()} == {k: float(v) for k, v in raw.metrics().items()} != {}
    if method is not bilora:
        model.set_adapter("q")
        theirs.add_param_group({"params": [p for n, p in model.named_parameters() if ".q." in n]})
        steps(model, raw)
        assert perturbed(model) > 0
        model.set_adapter("p")
    theirs.remove()
    assert perturbed(model) == 0 and not raw._attached
