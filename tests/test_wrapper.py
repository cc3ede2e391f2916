"""The wrapper is its base optimizer to everyone who looks: same steps, same objects, same hooks, same checkpoints."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from helpers import (
    Plain,
    adamw,
    adapters,
    base_state,
    build,
    closure_of,
    difference,
    ggpo,
    loss_of,
    optimizers_of,
    outputs,
    train,
)
from models import lora_mlp, trainable
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from flatlora import GGPOOptimizer, LoRASAMOptimizer, OptimizerWrapper

torch_optimizer = pytest.importorskip("torch_optimizer")


# --- sigma = 0: bit-identical to the bare base optimizer -----------------------------------------------------------

# torch_optimizer's classes that do not take a plain step().
TAKES_MORE = {"Adahessian": "needs backward(create_graph=True)", "Lookahead": "wraps an optimizer: tested below"}
VARIANTS = [
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.AdamW, {"amsgrad": True, "foreach": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"maximize": True, "lr": torch.tensor(1e-2)}),
    (torch.optim.LBFGS, {"line_search_fn": "strong_wolfe"}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
]
BASES = [
    *((cls, {}) for cls in optimizers_of(torch.optim)),
    *VARIANTS,
    *((cls, {}) for cls in optimizers_of(torch_optimizer) if cls.__name__ not in TAKES_MORE),
]


def run(cls, kwargs, wrapped, steps=12):
    model = lora_mlp(dropout=0.1)
    if kwargs:
        kwargs = {key: value.clone() if torch.is_tensor(value) else value for key, value in kwargs.items()}
    base = build(cls, trainable(model), **kwargs)
    optimizer = GGPOOptimizer(base, model, sigma=0.0) if wrapped else base
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch_optimizer|pytorch_ranger")
        warnings.filterwarnings("ignore", message="This overload of")
        train(model, optimizer, range(steps), scheduler, sparse=cls is torch.optim.SparseAdam)
    return adapters(model), base_state(optimizer), torch.random.get_rng_state()


@pytest.mark.parametrize(
    ("cls", "kwargs"), BASES, ids=lambda v: f"{v.__module__.split('.')[0]}.{v.__name__}" if isinstance(v, type) else ""
)
def test_without_noise_it_is_the_base_optimizer(cls, kwargs):
    start = adapters(lora_mlp(dropout=0.1))
    bare, wrapped = run(cls, kwargs, False), run(cls, kwargs, True)
    assert difference(start, bare[0]) is not None
    assert difference(bare, wrapped) is None


def test_all_of_torch_optim_is_covered():
    newer = {"Muon"} if hasattr(torch.optim, "Muon") else set()
    assert {"AdamW", "SGD", "LBFGS", "Adafactor", "SparseAdam", *newer} <= {cls.__name__ for cls, _ in BASES}
    assert sum(cls.__module__.startswith("torch_optimizer") for cls, _ in BASES) > 20


def test_without_noise_over_an_optimizer_that_wraps_another():
    results = []
    for wrapped in (False, True):
        model = lora_mlp()
        base = torch_optimizer.Lookahead(adamw(model), k=2)
        optimizer = GGPOOptimizer(base, model, sigma=0.0) if wrapped else base
        train(model, optimizer, range(7))
        results.append(adapters(model))  # its state_dict() fails by itself
    assert difference(*results) is None


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_with_noise_the_base_optimizer_does_what_it_does_with_the_same_gradients(cls):
    model = lora_mlp()
    optimizer = GGPOOptimizer(build(cls, trainable(model)), model, sigma=0.3, seed=1)
    twin = lora_mlp()
    bare = build(cls, trainable(twin))
    for i in range(10):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        for own, other in zip(trainable(model), trainable(twin), strict=True):
            other.grad = own.grad.clone()
        clean = torch.autograd.grad(loss_of(twin, i), trainable(twin))
        assert difference([p.grad for p in trainable(model)], list(clean)) is not None  # there was noise
        optimizer.step()
        bare.step()
    assert difference(adapters(model), adapters(twin)) is None
    assert difference(base_state(optimizer), bare.state_dict()) is None


# --- identity ------------------------------------------------------------------------------------------------------


def test_it_is_an_optimizer_of_its_own_class_and_reads_as_its_base(wrap):
    model = lora_mlp()
    base = adamw(model)
    optimizer = wrap(base, model)
    assert isinstance(optimizer, Optimizer) and isinstance(optimizer, OptimizerWrapper)
    assert optimizer.__class__ is type(optimizer) and isinstance(optimizer.base_optimizer, Optimizer)
    assert str(optimizer) == str(base)
    assert repr(optimizer) == repr(base) and "AdamW" in repr(optimizer)


def test_groups_state_and_defaults_are_the_bases_own_objects_also_after_loading(wrap):
    model = lora_mlp()
    base = adamw(model)
    optimizer = wrap(base, model)
    train(model, optimizer, range(2))

    def shared():
        same = optimizer.param_groups is base.param_groups and optimizer.state is base.state
        return same and optimizer.defaults is base.defaults

    assert shared() and len(base.state) == 4
    old_groups, old_state = base.param_groups, base.state
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert base.state is not old_state and base.param_groups is not old_groups  # torch replaces them
    assert shared()
    base.load_state_dict(base_state(optimizer))
    assert shared()
    optimizer.param_groups = list(base.param_groups)
    optimizer.state = dict(base.state)
    optimizer.defaults = dict(base.defaults)
    assert shared()


def test_attributes_it_does_not_have_are_the_bases(wrap):
    model = lora_mlp()
    base = adamw(model)
    base.favourite = 42
    optimizer = wrap(base, model)
    assert optimizer.favourite == 42
    assert not hasattr(optimizer, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


@pytest.mark.parametrize("wrong", [torch.optim.AdamW, None, lambda: None, "AdamW"])
def test_something_that_is_no_built_optimizer_is_refused(wrong):
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer instance, got"):
        OptimizerWrapper(wrong)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer instance, got"):
        GGPOOptimizer(wrong, lora_mlp())


def test_add_param_group_reaches_the_base(wrap):
    model = lora_mlp()
    first, *rest = trainable(model)
    base = torch.optim.SGD([{"params": [first], "lr": 0.1}])
    optimizer = wrap(base, model)
    optimizer.add_param_group({"params": rest, "lr": 0.2})
    assert [group["lr"] for group in base.param_groups] == [0.1, 0.2]
    before = [p.detach().clone() for p in rest]
    train(model, optimizer, range(1))
    assert all(not torch.equal(p, q) for p, q in zip(rest, before, strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(wrap, set_to_none):
    model = lora_mlp()
    optimizer = wrap(adamw(model), model)
    loss_of(model, 0).backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable(model))
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in trainable(model):
        assert param.grad is None if set_to_none else torch.equal(param.grad, torch.zeros_like(param))


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned(wrap):
    losses = {}
    for closed in (False, True):
        model = lora_mlp()
        optimizer = wrap(adamw(model), model)
        calls, values = [], []

        def loss(model=model, calls=calls):
            calls.append(torch.is_grad_enabled())
            return loss_of(model, len(calls))

        closure = closure_of(optimizer, loss)
        for _ in range(4):
            if closed:
                with torch.no_grad():
                    values.append(optimizer.step(closure).item())
            else:
                values.append(closure().item())
                assert optimizer.step() is None
        assert calls == [True] * 4
        losses[closed] = values, adapters(model)
    assert difference(losses[False], losses[True]) is None


def test_the_method_sees_every_evaluation_of_a_closure():
    model, evaluations = lora_mlp(), []
    optimizer = Plain(torch.optim.LBFGS(trainable(model), max_iter=3))
    optimizer.step(closure_of(optimizer, lambda: evaluations.append(1) or loss_of(model, 0)))
    assert optimizer.calls == len(evaluations) > 1


def test_train_and_eval_reach_a_base_that_has_them(wrap):
    class Switching(torch.optim.SGD):
        calls = ()

        def train(self):
            self.calls += ("train",)

        def eval(self):
            self.calls += ("eval",)

    model = lora_mlp()
    base = Switching(trainable(model), lr=0.1)
    optimizer = wrap(base, model)
    optimizer.eval()
    optimizer.train()
    assert base.calls == ("eval", "train")


# --- hooks ---------------------------------------------------------------------------------------------------------


def test_hooks_fire_once_per_step(wrap):
    model = lora_mlp()
    base = adamw(model)
    optimizer = wrap(base, model)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt))),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt))),
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append(("global pre", opt))),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append(("global post", opt))),
    ]
    try:
        train(model, optimizer, range(1))
        assert [name for name, _ in seen] == ["global pre", "pre", "post", "global post"]
        assert all(opt.param_groups is base.param_groups for _, opt in seen)
        train(model, optimizer, range(2))
        assert len(seen) == 12
    finally:
        for handle in handles:
            handle.remove()
    train(model, optimizer, range(1))
    assert len(seen) == 12


def test_state_dict_hooks_fire_once(wrap):
    model = lora_mlp()
    optimizer = wrap(adamw(model), model)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("load post"))
    state = optimizer.state_dict()
    assert seen == ["pre", "post"]
    optimizer.load_state_dict(state)
    assert seen == ["pre", "post", "load pre", "load post"]


# --- learning rate schedulers --------------------------------------------------------------------------------------


def _two(optimizer):
    return [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, _two(o), milestones=[3]),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(_two(o)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
}


def test_all_of_torchs_schedulers_are_covered():
    classes = {
        name
        for name in lr_scheduler.__all__
        if inspect.isclass(getattr(lr_scheduler, name)) and name not in ("LRScheduler",)
    }
    assert classes == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(wrap, name):
    def rates(wrapped):
        model = lora_mlp()
        base = adamw(model)
        optimizer = wrap(base, model) if wrapped else base
        scheduler = SCHEDULERS[name](optimizer)
        found = []
        for i in range(8):
            train(model, optimizer, range(i, i + 1))
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            found.append([(group["lr"], group["betas"]) for group in base.param_groups])
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "call optimizer.step() before lr_scheduler.step()" among them
        warnings.filterwarnings("ignore", "The epoch parameter")  # older SequentialLRs pass it to their own parts
        bare, wrapped = rates(False), rates(True)
    assert bare == wrapped and len({str(rate) for rate in bare}) > 1


def test_a_scheduler_on_the_base_serves_the_wrapper(wrap):
    model = lora_mlp()
    base = adamw(model)
    scheduler = lr_scheduler.StepLR(base, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = wrap(base, model)
        train(model, optimizer, range(2), scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_scheduler_that_runs_ahead_is_still_warned_of(wrap):
    model = lora_mlp()
    scheduler = lr_scheduler.StepLR(wrap(adamw(model), model), 1)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


# --- GradScaler ----------------------------------------------------------------------------------------------------


def scaled_run(model, optimizer, scaler, factors):
    """One step for each factor of the loss; returns whether each moved the parameters."""
    moved = []
    for i, factor in enumerate(factors):
        before = adapters(model)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, i) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(difference(before, adapters(model)) is not None)
    return moved


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_infinite_gradients_and_the_method_sees_unscaled_ones(fused):
    model = lora_mlp()
    optimizer = ggpo(model, adamw(model, fused=fused), sigma=0.3, beta=10.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    noise, std = outputs(model), optimizer.row_std()
    assert scaled_run(model, optimizer, scaler, [float("inf")]) == [False]
    assert scaler.get_scale() == 2.0**9
    assert difference(noise, outputs(model)) is None and difference(std, optimizer.row_std()) is None
    assert scaled_run(model, optimizer, scaler, [1.0, 1.0, 1.0]) == [True] * 3
    assert difference(noise, outputs(model)) is not None

    plain = lora_mlp()
    reference = ggpo(plain, adamw(plain, fused=fused), sigma=0.3, beta=10.0)
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert scaled_run(plain, reference, off, [1.0, 1.0, 1.0]) == [True] * 3
    # Scales are powers of two, so that unscaling is exact.
    assert difference(adapters(plain), adapters(model)) is None
    assert difference(reference.row_std(), optimizer.row_std()) is None


def test_grad_scaler_unscale_then_clip(wrap):
    results = []
    for enabled in (False, True):
        model = lora_mlp()
        optimizer = wrap(adamw(model), model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        for i in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trainable(model), 0.1)
            scaler.step(optimizer)
            scaler.update()
        results.append((adapters(model), base_state(optimizer)))
    assert difference(*results) is None


# --- a model without PEFT ------------------------------------------------------------------------------------------


def test_the_wrapper_itself_needs_no_adapters():
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.load_state_dict(model.state_dict())
    optimizer, bare = OptimizerWrapper(torch.optim.Adam(model.parameters())), torch.optim.Adam(twin.parameters())
    for _ in range(3):
        x = torch.randn(2, 3)
        for net, opt in ((model, optimizer), (twin, bare)):
            opt.zero_grad()
            net(x).square().sum().backward()
            opt.step()
    assert difference(model.state_dict(), twin.state_dict()) is None
    assert optimizer.state_dict().keys() == {"state", "param_groups"}


# --- what else a base optimizer takes, and who derives a class from ours ---------------------------------------------


def test_further_arguments_of_step_and_zero_grad_are_the_bases(wrap):
    class Curious(torch.optim.SGD):
        seen = None

        def step(self, closure=None, *, hessian=None):
            self.seen = hessian
            return super().step(closure)

        def zero_grad(self):  # an older signature
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None

    model = lora_mlp()
    base = Curious(trainable(model), lr=0.1)
    optimizer = wrap(base, model)
    loss_of(model, 0).backward()
    optimizer.step(hessian="diagonal")
    assert base.seen == "diagonal"
    optimizer.zero_grad()
    assert all(p.grad is None for p in trainable(model))


def test_settings_of_a_method_within_are_set_there():
    model = lora_mlp()
    inner = LoRASAMOptimizer(adamw(model), model)
    optimizer = OptimizerWrapper(GGPOOptimizer(inner, model, sigma=0.1))
    optimizer.rho, optimizer.sigma = 0.2, 0.3
    assert inner.rho == optimizer.rho == 0.2 and optimizer.base_optimizer.sigma == 0.3
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.rho = -1.0
