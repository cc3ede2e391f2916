"""Every method of the library as its users start it, one line each, for the tests that all of them must pass.

A new method joins `METHODS` and with it every test in `tests/every_method`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from helpers import RANKS, adamw, tokens
from models import AUXILIARY, llama, quantise, trained
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.optim import Optimizer

import flatlora

# A base optimizer's class, with its learning rate and so on: makes one of parameters or of parameter groups.
Base = Callable[[Any], Optimizer]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of training that a user chooses.

    Attributes:
        name: as test names show it.
        adapt: puts adapters into a plain model, given the model and ``r`` and ``dropout`` by keyword.
        build: makes the optimizer of the model, over base optimizers that the given `Base` makes.
        before_wrapping: what has to be done to the model before DDP or FSDP wrap it.
        perturbs: whether passes that train see other weights than passes that do not.
        sharded: whether FSDP2 may shard its model.
    """

    name: str
    adapt: Callable[..., nn.Module]
    build: Callable[[nn.Module, Base, int], Optimizer]
    before_wrapping: Callable[[nn.Module, int], Any] = lambda model, seed: None
    perturbs: bool = True
    sharded: bool = True

    def start(
        self, model: nn.Module, base: Base, seed: int = 7, wrap: Callable[[nn.Module], Any] = lambda model: None
    ) -> Optimizer:
        """The optimizer of an adapted model, which DDP or FSDP may `wrap` in between."""
        self.before_wrapping(model, seed)
        wrap(model)
        return self.build(model, base, seed)


# --- adapters -----------------------------------------------------------------------------------------------------


def lora(model: nn.Module, *, r: int, dropout: float, dora: bool = False) -> nn.Module:
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", lora_dropout=dropout, use_dora=dora)
    config.task_type = "CAUSAL_LM"
    return get_peft_model(model, config)


def dora(model: nn.Module, *, r: int, dropout: float) -> nn.Module:
    return lora(model, r=r, dropout=dropout, dora=True)


def gralora(model: nn.Module, *, r: int, dropout: float) -> nn.Module:
    return flatlora.apply_gralora(model, "all-linear", r=r, k=2, alpha=2 * r, dropout=dropout)


# --- optimizers ---------------------------------------------------------------------------------------------------


def plain(model: nn.Module, base: Base, seed: int = 0) -> Optimizer:
    return base(trained(model))


def ggpo(**kwargs: Any) -> Callable[[nn.Module, Base, int], Optimizer]:
    options = {"sigma": 0.3, "beta": 1.0, **kwargs}
    return lambda model, base, seed: flatlora.GGPOOptimizer(base(trained(model)), model, seed=seed, **options)


def lorasam(model: nn.Module, base: Base, seed: int, **options: Any) -> Optimizer:
    return flatlora.LoRASAMOptimizer(base(trained(model)), model, **options)


def attach_auxiliary(model: nn.Module, seed: int) -> None:
    flatlora.attach_auxiliary(model, r=4, seed=seed)


def bilora(model: nn.Module, base: Base, seed: int) -> Optimizer:
    ascending = [p for name, p in model.named_parameters() if AUXILIARY in name]
    groups = [{"params": trained(model)}, {"params": ascending, "ascent": True, "weight_decay": 0.0}]
    return flatlora.BiLoRAOptimizer(base(groups), model, rho=0.5)


def bidora(model: nn.Module, base: Base, seed: int) -> Optimizer:
    """Fed by the user's loop; its validation batches are of another part of the data."""
    levels = [base(of(model, "default")) for of in (flatlora.direction_parameters, flatlora.magnitude_parameters)]
    validation = [batch(500 + i) for i in range(3)]
    return flatlora.BilevelOptimizer(*levels, model, None, validation, adapter="default", unroll_steps=2)


METHODS = [
    Method("GGPO gaussian", lora, ggpo()),
    Method("GGPO low_rank", lora, ggpo(noise="low_rank", noise_rank=4)),
    Method("LoRASAM", lora, lorasam),
    Method("Bi-LoRA", lora, bilora, before_wrapping=attach_auxiliary),
    Method("BiDoRA", dora, bidora, perturbs=False, sharded=False),
    Method("GraLoRA", gralora, plain, perturbs=False),
    Method("GraLoRA under GGPO", gralora, ggpo()),
]
PERTURBING = [method for method in METHODS if method.perturbs]
OF_PEFT = [method for method in METHODS if method.adapt is not gralora]
KEEPS_STATE = [method for method in METHODS if method.build is not plain]


def every_method(*but: str, among: list[Method] = METHODS, xfail: dict[str, str] | None = None) -> pytest.MarkDecorator:
    """Runs a test with each method as `method`; `xfail` names those that fail today, and why."""
    reasons = xfail or {}
    params = []
    for method in among:
        marks = [pytest.mark.xfail(strict=True, reason=reasons[method.name])] if method.name in reasons else []
        if method.name not in but:
            params.append(pytest.param(method, id=method.name, marks=marks))
    return pytest.mark.parametrize("method", params)


# --- the methods that perturb, with options of one's own -----------------------------------------------------------

KINDS = ["gaussian", "low_rank", "Bi-LoRA", "LoRASAM"]


def over(kind: str, model: nn.Module, base: Base, **options: Any) -> Any:
    """The optimizer of all that a model trains; "gaussian" and "low_rank" are the two noises of GGPO."""
    if kind == "Bi-LoRA":
        return flatlora.BiLoRAOptimizer.for_model(model, base, **{"rho": 0.5, "seed": 1, **options})
    if kind == "LoRASAM":
        return flatlora.LoRASAMOptimizer(base(trained(model)), model, **{"rho": 0.5, **options})
    noise = {"sigma": 0.3, "beta": 1.0, "noise": kind, "noise_rank": 3, "update_every": 1, "seed": 1}
    return flatlora.GGPOOptimizer(base(trained(model)), model, **{**noise, **options})


# --- models and batches -------------------------------------------------------------------------------------------


def adapted(
    method: Method, *, r: int = 4, dropout: float = 0.0, width: int = 32, quant: str | None = None, seed: int = 0
) -> nn.Module:
    """A one-layer Llama with the method's adapters, none of which is zero; the same for the same arguments."""
    torch.manual_seed(seed)
    model = llama(width)
    if quant is not None:
        quantise(model, quant)
    model = method.adapt(model, r=r, dropout=dropout)
    fill(model, seed)
    return model.to(models.DEVICE).train()


def fill(model: nn.Module, seed: int = 0) -> None:
    """Makes the factors that start at zero nonzero, so that every term of a method takes part from the first step."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # drawn on the CPU: over a quantised base adapters are on the device already
            p.data.copy_(nn.init.normal_(torch.empty_like(p, device="cpu"), std=0.05, generator=generator))


def batch(i: int, size: int = 2) -> dict[str, Tensor]:
    ids = tokens(i, size).to(models.DEVICE)
    return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, optimizer: Optimizer, steps: range, micro: int = 2, scheduler: Any = None) -> list[float]:
    """A user's loop, with accumulation and clipping; returns the losses."""
    losses = []
    params = trained(model)
    for i in steps:
        for j in range(micro):
            loss = model(**batch(micro * i + j)).loss / micro
            loss.backward()
            losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return losses


def train_share(
    model: nn.Module, optimizer: Optimizer, rank: int | None = None, steps: range = range(3)
) -> list[float]:
    """Trains on this rank's share of every batch, or on all of it; returns the losses."""
    losses = []
    for i in steps:
        whole = batch(i, 2 * RANKS)
        part = whole if rank is None else {key: value.chunk(RANKS)[rank] for key, value in whole.items()}
        loss = model(**part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def started(
    method: Method, base: Base = adamw, steps: int = 2, seed: int = 7, **kwargs: Any
) -> tuple[nn.Module, Optimizer]:
    """A model on its way, so that whatever perturbs it is there: an auxiliary begins at zero."""
    model = adapted(method, **kwargs)
    optimizer = method.start(model, base, seed=seed)
    torch.manual_seed(5)
    train(model, optimizer, range(steps))
    return model, optimizer


# --- what a model consists of and computes -------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What a user saves of the model."""
    if hasattr(model, "peft_config"):
        found = get_peft_model_state_dict(model)
    else:
        found = {name: p for name, p in model.named_parameters() if p.requires_grad and AUXILIARY not in name}
    return {name: value.detach().clone() for name, value in found.items()}


def load_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, saved)
    else:
        assert not model.load_state_dict(saved, strict=False).unexpected_keys


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is frozen, and everything that a quantised weight consists of."""
    found = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    found |= {name: value.clone() for name, value in model.named_buffers()}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if (quant := getattr(weight, "quant_state", None)) is not None:
            found |= {f"{name}.{key}": value.clone() for key, value in quant.as_dict(packed=True).items()}
        if hasattr(weight, "SCB"):  # moves from the weight to the layer's state in the first forward
            scale = module.state.SCB if module.state.SCB is not None else weight.SCB
            found[f"{name}.SCB"] = scale.clone()
    return found


def logits(model: nn.Module, i: int = 77) -> Tensor:
    return model(input_ids=tokens(i).to(models.DEVICE)).logits.detach().clone()


def streams() -> list[Tensor]:
    """Where torch's global random streams stand."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if models.DEVICE.type == "cuda" else [])]


def set_streams(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0].cpu())
    if models.DEVICE.type == "cuda":
        torch.cuda.set_rng_state(states[1].cpu())


def twin(model: nn.Module, method: Method, **kwargs: Any) -> nn.Module:
    """A model with the same weights that no method has touched."""
    other = adapted(method, **kwargs)
    load_weights(other, weights(model))
    return other


def values(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in nested dicts, with the keys that lead to it; dicts among them."""
    for key, value in state.items():
        yield (*path, key), value
        if isinstance(value, dict):
            yield from values(value, (*path, key))
