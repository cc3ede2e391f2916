"""The laws as properties of random runs, against a dense float64 model."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from flatlora import BiLoRAOptimizer, GGPOOptimizer, attach_auxiliary, detach_auxiliary, remove_perturbation
from flatlora.bilora.auxiliary import GRAD_SCALE, auxiliaries_of
from flatlora.kernels.draw import draw_gaussian, draw_low_rank


class Chain(nn.Module):
    """Linear layers of any sizes in a row; the last one may be called twice."""

    def __init__(self, sizes, bias, shared):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=bias) for n, m in itertools.pairwise(sizes))
        self.again = nn.Linear(sizes[-1], sizes[-1], bias=bias) if shared else None

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x if self.again is None else self.again(self.again(x))


SHAPES = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 64), min_size=2, max_size=4),
        "bias": st.booleans(),
        "shared": st.booleans(),
        "r": st.integers(1, 70),
        "dropout": st.sampled_from([0.0, 0.3]),
        "adapters": st.sampled_from([("default",), ("default", "other")]),
        "seed": st.integers(0, 2**32),
    }
)
METHODS = st.sampled_from(["gaussian", "low_rank", "bilora", "both"])
# What a user may do between two looks, in any order and as often.
ACTIONS = st.lists(
    st.sampled_from(
        ["train", "eval", "step", "backward", "raise", "save", "load", "merge", "unmerge", "look", "remove", "attach"]
    ),
    max_size=12,
)


def build(shape, dtype=torch.float64):
    torch.manual_seed(shape["seed"])
    net = Chain(shape["sizes"], shape["bias"], shape["shared"]).to(dtype)
    config = {
        "r": shape["r"],
        "lora_alpha": 7,
        "lora_dropout": shape["dropout"],
        "target_modules": r"layers\.\d+|again",
    }
    model = None
    for name in shape["adapters"]:
        one = LoraConfig(**config, init_lora_weights=False)
        if model is None:
            model = get_peft_model(net, one, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, one, autocast_adapter_dtype=False)
    model.base_model.set_adapter(list(shape["adapters"]))
    return model.train()


def attach(model, method):
    params = [p for name, p in model.named_parameters() if p.requires_grad and "ascent" not in name]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    if method in ("bilora", "both"):
        aux = attach_auxiliary(model, 3, seed=5)
        with torch.no_grad():
            for p in aux:
                p.normal_(0, 0.1)
        optimizer.add_param_group({"params": aux, "ascent": True, "weight_decay": 0.0})
        optimizer = BiLoRAOptimizer(optimizer, model, rho=0.5)
    if method != "bilora":
        noise = "low_rank" if method == "low_rank" else "gaussian"
        optimizer = GGPOOptimizer(optimizer, model, sigma=0.3, beta=0.5, noise=noise, noise_rank=2, seed=11)
    return optimizer


def data(shape, i=0):
    generator = torch.Generator().manual_seed(shape["seed"] % 1000 + i)
    return torch.randn(3, shape["sizes"][0], generator=generator, dtype=torch.float64)


def chain_of(optimizer):
    while hasattr(optimizer, "base_optimizer"):
        yield optimizer
        optimizer = optimizer.base_optimizer


def dense_weights(model, optimizer):
    """``W' + ε`` of every layer in float64, from the parameters and from what the optimizers say they perturb by."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = module.get_base_layer().weight
        for adapter in module.active_adapters:
            weight = weight + module.scaling[adapter] * module.lora_B[adapter].weight @ module.lora_A[adapter].weight
        for wrapper in chain_of(optimizer):
            if isinstance(wrapper, GGPOOptimizer):
                draw, n = wrapper.current_perturbation()[name], weight.shape[1]
                if draw.kind == "gaussian":
                    weight = weight + draw_gaussian(draw, n, None, torch.float64)
                else:
                    b, a = draw_low_rank(draw, n, torch.float64)
                    weight = weight + b @ a
            else:
                auxiliary = next(a for a in model.modules() if getattr(getattr(a, "layer", None), "name", None) == name)
                weight = weight + auxiliary.scaling * auxiliary.B @ auxiliary.A
        found[name] = weight
    return found


def dense_output(model, weights, x):
    net = model.base_model.model
    for i, layer in enumerate(net.layers):
        x = torch.tanh(F.linear(x, weights[f"base_model.model.layers.{i}"], layer.get_base_layer().bias))
    for _ in range(2 if net.again is not None else 0):
        x = F.linear(x, weights["base_model.model.again"], net.again.get_base_layer().bias)
    return x


def frozen_bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(shape=SHAPES, method=METHODS)
def test_output_and_gradients_are_those_of_the_dense_perturbed_model(shape, method):
    shape = {**shape, "dropout": 0.0}
    model = build(shape)
    optimizer = attach(model, method)
    for i in range(2):
        params = [p for p in model.parameters() if p.requires_grad]
        x = data(shape, i)
        expected = dense_output(model, dense_weights(model, optimizer), x)
        found = model(x)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        grads = (torch.autograd.grad(out.square().sum(), params, allow_unused=True) for out in (found, expected))
        ascending = {id(p) for one in auxiliaries_of(model) for p in (one.A, one.B)}  # of scaled gradients
        for p, one, other in zip(params, *grads, strict=True):
            one = one / GRAD_SCALE if id(p) in ascending else one
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(shape=SHAPES, method=METHODS, actions=ACTIONS)
def test_whatever_is_done_the_base_the_stream_and_the_plain_model_stay(shape, method, actions):
    """A base that never moves, a global stream without our draws, and the plain model in every pass but training."""
    model = build(shape)
    optimizer = attach(model, method)
    base, merged, removed = frozen_bits(model), False, False
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    for i, action in enumerate(actions):
        if action in ("train", "eval"):
            getattr(model, action)()
        elif action == "backward" and not merged:
            model(data(shape, i)).square().sum().backward()
        elif action == "step" and not merged:
            model(data(shape, i)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        elif action == "raise":
            with pytest.raises(RuntimeError):
                model(torch.zeros(2, shape["sizes"][0] + 1, dtype=torch.float64))
        elif action == "save":
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
        elif action == "load" and not removed:
            saved.seek(0)
            optimizer.load_state_dict(torch.load(saved))
        elif action in ("merge", "unmerge") and merged == (action == "unmerge"):
            getattr(model, f"{action}_adapter")()
            merged = action == "merge"
        elif action == "look":
            optimizer.perturbation_parameters()
            with optimizer.unperturbed():
                pass
        elif action == "remove":
            remove_perturbation(model)
            removed = True
        elif action == "attach" and removed and not merged:
            optimizer, removed = attach(model, method), False
    if merged:
        model.unmerge_adapter()
    after = frozen_bits(model)
    if "merge" not in actions:  # merging rounds, and is PEFT's own doing
        assert same(base, after)
    plain = copy.deepcopy(model)
    detach_auxiliary(plain)
    x, training = data(shape), model.training
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-9)
    model.train(training)
    torch.manual_seed(3)
    model.train()(x).sum().backward()
    ours = torch.get_rng_state()
    torch.manual_seed(3)
    plain.train()(x).sum().backward()
    assert torch.equal(ours, torch.get_rng_state())
    remove_perturbation(model)
    assert set(model.state_dict()) == set(plain.state_dict())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(shape=SHAPES, method=METHODS, stop=st.integers(0, 3))
def test_a_resumed_run_is_the_uninterrupted_one(shape, method, stop):
    def go(model, optimizer, steps):
        for i in steps:
            torch.manual_seed(i)
            for micro in range(2):
                model(data(shape, 10 * i + micro)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = build(shape)
    optimizer = attach(straight, method)
    go(straight, optimizer, range(stop))
    state = io.BytesIO()
    weights = {name: p.detach().clone() for name, p in straight.named_parameters() if "lora_" in name}
    torch.save((weights, optimizer.state_dict()), state)
    state.seek(0)
    go(straight, optimizer, range(stop, 4))

    resumed = build(shape)
    second = attach(resumed, method)
    weights, state_dict = torch.load(state)
    resumed.load_state_dict(weights, strict=False)
    second.load_state_dict(state_dict)
    go(resumed, second, range(stop, 4))
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
