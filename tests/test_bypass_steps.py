"""Steps, closures, parameters and patches that go past a method; passes that do have their own file."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import closure_of, difference, perturbation, primary
from methods import over
from models import mlp_with, trained
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from test_bypass import ALL, ONE_GROUP, X, loss, sgd, steps
from torch import nn

import flatlora
from flatlora import GGPOOptimizer, LoRASAMOptimizer

# --- steps ----------------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("by", ["loop", "scaler", "scheduler"])
def test_a_step_of_the_base_is_refused_before_anything_moves(method, by):
    model = mlp_with()
    optimizer = over(method, model, sgd)
    steps(model, optimizer)
    before = primary(model)
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
    assert difference(before, primary(model)) is None
    optimizer.step()
    optimizer.remove()
    base.step()  # nothing perturbs any more


@ALL
def test_a_base_whose_wrapper_is_gone_or_superseded_may_be_stepped(method):
    model = mlp_with()
    base = torch.optim.SGD(trained(model), lr=0.01)
    optimizer = GGPOOptimizer(base, model)
    steps(model, optimizer)
    del optimizer
    loss(model).backward()
    base.step()
    optimizer = over(method, model, sgd)
    steps(model, optimizer)
    newer = over(method, model, sgd)
    steps(model, newer)
    assert optimizer._attachment.superseded


@ALL
def test_copies_and_stacks_are_stepped_in_peace(method):
    model = mlp_with()
    optimizer = over(method, model, sgd)
    stack = GGPOOptimizer(optimizer, model) if method != "gaussian" else LoRASAMOptimizer(optimizer, model)
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


@ONE_GROUP
def test_the_two_steps_of_sam_go_through_the_closure(method, said):
    model = mlp_with()
    optimizer = over(method, model, lambda params: SAM(params, lr=0.01))
    before = primary(model)
    loss(model).backward()
    with pytest.raises(AttributeError, match=r"first_step\(\) of the SAM goes past .*step\(closure\)"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="goes past"):
        optimizer.base_optimizer.second_step()
    assert difference(before, primary(model)) is None

    optimizer.step(closure_of(optimizer, lambda: loss(model)))
    assert perturbation(model) > 0 and not said()


# --- closures -------------------------------------------------------------------------------------------------------


@ALL
def test_a_closure_may_set_the_mode_and_choose_the_adapter(method, said):
    results = []
    for within in (False, True):
        model = mlp_with("p", "q")
        optimizer = over(method, model, sgd, adapter="p")

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
        results.append(primary(model))
    assert difference(*results) is None and not said()
    prepare()
    assert perturbation(model) > 0


@ALL
def test_a_base_that_does_not_call_its_closure_is_told_of(method, said):
    class Ignores(torch.optim.SGD):
        def step(self, closure=None):
            super().step()

    model = mlp_with()
    optimizer = over(method, model, lambda params: Ignores(params, lr=0.01))
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
    model = mlp_with("policy", "reference")
    optimizer = over("LoRASAM", model, sgd, adapter="policy")
    noisy = mlp_with("policy", "reference")
    other = over("gaussian", noisy, sgd, adapter="policy")
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

    model = mlp_with("p", "q")
    model, (optimizer,) = run(model, [over("LoRASAM", model, sgd, adapter=["p", "q"])])
    assert float(optimizer.metrics()["perturbation_to_rho"]) == pytest.approx(1, rel=1e-4)
    state = optimizer.state_dict()
    again = over("LoRASAM", mlp_with("p", "q"), sgd, adapter=["p", "q"])
    again.load_state_dict(state)
    assert again._source.direction.keys() == optimizer._source.direction.keys() and len(again._source.direction) == 4

    model = mlp_with("p", "q")
    of = {n: [p for name, p in model.named_parameters() if f".{n}." in name] for n in ("p", "q")}
    run(model, [LoRASAMOptimizer(torch.optim.SGD(of[n], lr=0.01), model, rho=0.3, adapter=n) for n in ("p", "q")])
    assert not said()


# --- parameters -----------------------------------------------------------------------------------------------------


@ONE_GROUP
@pytest.mark.parametrize("how", ["base", "append", "extend"])
def test_adapters_that_come_in_by_hand_are_perturbed(method, how):
    model = mlp_with("p", "q")
    model.set_adapter("p")
    optimizer = over(method, model, sgd)
    model.set_adapter("q")
    new = [p for n, p in model.named_parameters() if ".q." in n]
    if how == "base":
        optimizer.base_optimizer.add_param_group({"params": new})
    elif how == "append":
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": new})
    else:
        optimizer.param_groups[0]["params"].extend(new)
    steps(model, optimizer)
    assert perturbation(model) > 0


@ALL
@pytest.mark.parametrize("how", ["new parameters", "deleted and added"])
def test_adapters_that_were_replaced_are_told_of(method, how, said):
    model = mlp_with()
    optimizer = over(method, model, sgd)
    if how == "new parameters":
        for module in model.modules():
            if isinstance(module, PeftLinear):
                for factor in (module.lora_A, module.lora_B):
                    factor["default"].weight = nn.Parameter(factor["default"].weight.detach().clone())
        match = "nobody trains them"
    else:
        model.add_adapter("new", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
        model.set_adapter("new")
        model.delete_adapter("default")
        match = "no longer in 2 layers"
    loss(model).backward()
    optimizer.step()
    assert any(match in message for message in said())


@ALL
def test_one_optimizer_for_each_parameter_is_named(method):
    model = mlp_with()
    with pytest.raises(ValueError, match=r"within backward, is not supported|has an auxiliary already"):
        kind = {"gaussian": GGPOOptimizer, "LoRASAM": LoRASAMOptimizer}.get(method)
        kept = []
        for p in trained(model):
            kept.append(kind(torch.optim.SGD([p], lr=0.1), model) if kind else over("Bi-LoRA", model, sgd))


@pytest.mark.parametrize("how", ["unmarked", "merged", "popped"])
def test_an_auxiliary_that_comes_out_of_its_ascent_group_is_refused(how):
    model = mlp_with()
    optimizer = over("Bi-LoRA", model, sgd)
    steps(model, optimizer)
    if how == "unmarked":
        optimizer.param_groups[-1]["ascent"] = False
    elif how == "merged":
        optimizer.param_groups[0]["params"].extend(optimizer.param_groups.pop()["params"])
    else:
        optimizer.param_groups.pop()
    before = primary(model)
    loss(model).backward()
    with pytest.raises(ValueError, match=r"ascends|no ascent group"):
        optimizer.step()
    assert difference(before, primary(model)) is None


def test_gradients_of_the_primary_alone_are_told_of(said):
    model = mlp_with()
    optimizer = over("Bi-LoRA", model, sgd)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model).backward(inputs=trained(model))
        optimizer.step()
    assert len(said()) == 1 and "no gradient of the auxiliary" in said()[0]


class Around(torch.optim.Optimizer):
    """A base that keeps another."""

    def __init__(self, params, lr, inner=torch.optim.SGD):
        super().__init__(params, {"lr": lr})
        self.optimizer = inner(self.param_groups, lr=lr)

    def step(self, closure=None):
        self.optimizer.step()


@ONE_GROUP
def test_the_innermost_of_several_bases_is_not_stepped_alone(method):
    model = mlp_with()
    optimizer = over(method, model, lambda params: Around(params, 0.01, Around))
    steps(model, optimizer)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="goes past"):
        optimizer.base_optimizer.optimizer.optimizer.step()


# --- forward, patched by others -------------------------------------------------------------------------------------


@ALL
def test_a_forward_that_others_patched_later_is_still_ours_to_leave(method):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = mlp_with()
    plain = model.eval()(X)
    model.train()
    optimizer = over(method, model, sgd)
    layers = [module for module in model.modules() if isinstance(module, PeftLinear)]
    for layer in layers:
        add_hook_to_module(layer, ModelHook())
    steps(model, optimizer)
    assert perturbation(model) > 0
    newer = over(method, model, sgd)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="built later"):
        optimizer.step()
    newer.zero_grad()
    steps(model, newer)
    assert perturbation(model) > 0
    flatlora.remove_perturbation(model)
    assert perturbation(model) == 0
    for layer in layers:
        remove_hook_from_module(layer)
    assert perturbation(model) == 0 and plain.shape == model(X).shape
    flatlora.remove_perturbation(model)
    assert not any("forward" in vars(layer) for layer in layers)


# --- what Lightning and Fabric hand out -----------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("kind", ["Lightning", "Fabric"])
def test_others_objects_reach_the_optimizer_within(method, kind):
    pytest.importorskip("lightning")
    from lightning.fabric import Fabric
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = mlp_with("p", "q")
    model.set_adapter("p")
    raw = over(method, model, sgd, adapter="p") if method == "Bi-LoRA" else over(method, model, sgd)
    if kind == "Fabric":
        _, theirs = Fabric(accelerator="cpu", devices=1).setup(model, raw)
    else:
        theirs = LightningOptimizer(raw)
    steps(model, raw)
    assert {k: float(v) for k, v in theirs.metrics().items()} == {k: float(v) for k, v in raw.metrics().items()} != {}
    if method != "Bi-LoRA":
        model.set_adapter("q")
        theirs.add_param_group({"params": [p for n, p in model.named_parameters() if ".q." in n]})
        steps(model, raw)
        assert perturbation(model) > 0
        model.set_adapter("p")
    theirs.remove()
    assert perturbation(model) == 0 and not raw._attached
