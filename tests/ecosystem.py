"""Small models, batches and comparisons for the tests that run the optimizers inside other libraries."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from models import llama, quantise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer

from flatlora import GGPOOptimizer, lora_layers

torch.set_num_threads(1)  # the models are tiny, and test runs share the machine

WIDE = 512  # wide enough for an adapter of rank 8 to have the 4,096 elements from which bitsandbytes uses 8 bits


def lora_mlp(*, width: int = 32, r: int = 4, dropout: float = 0.0, seed: int = 0, use_dora: bool = False) -> PeftModel:
    """Two linear layers with adapters that are not zero."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=["0", "2"],
        lora_dropout=dropout,
        init_lora_weights=False,
        use_dora=use_dora,
    )
    return get_peft_model(net, config).train()


def tiny_llama(
    *, width: int = 32, quant: str | None = None, dropout: float = 0.0, seed: int = 0, use_dora: bool = False
) -> PeftModel:
    """A one-layer Llama with adapters everywhere; `quant` is None, ``"nf4"``, ``"fp4"`` or ``"int8"``."""
    torch.manual_seed(seed)
    model = llama(width)
    if quant is not None:
        quantise(model, quant)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        lora_dropout=dropout,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, **kwargs: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained(model), **{"lr": 1e-2, **kwargs})


def ggpo(model: nn.Module, base: Optimizer | None = None, **kwargs: Any) -> GGPOOptimizer:
    return GGPOOptimizer(adamw(model) if base is None else base, model, **{"seed": 7, **kwargs})


def build(cls: type[Optimizer], params: list[nn.Parameter], **kwargs: Any) -> Optimizer:
    """An optimizer with a learning rate and with weight decay where it knows them, deprecations aside."""
    known = inspect.signature(cls).parameters
    wanted = {key: value for key, value in {"lr": 1e-2, "weight_decay": 0.1}.items() if key in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(params, **{**wanted, **kwargs})


def optimizers_of(namespace: Any) -> Iterator[type[Optimizer]]:
    """Every optimizer class that a module exports."""
    for _, value in sorted(vars(namespace).items()):
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer:
            yield value


def loss_of(model: nn.Module, i: int, width: int = 32, batch: int = 4) -> Tensor:
    """Loss number `i` of an MLP: new data, and a new form of the loss, at each."""
    generator = torch.Generator().manual_seed(1000 + i)
    x, y = torch.randn(2, batch, width, generator=generator)
    return (model(x) - y).abs().pow(1 + i % 3).mean()


def tokens(i: int, batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(i))


def train(
    model: nn.Module, optimizer: Optimizer, steps: range, scheduler: Any = None, width: int = 32, sparse: bool = False
) -> None:
    """A user's training loop on the MLP, with a closure where the optimizer insists on one."""
    for i in steps:

        def closure(i: int = i) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, i, width)
            loss.backward()
            return loss

        if isinstance(getattr(optimizer, "base_optimizer", optimizer), torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            for param in trained(model) if sparse else ():
                param.grad = param.grad.to_sparse()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


def train_tokens(model: nn.Module, optimizer: Optimizer, steps: range, scheduler: Any = None) -> list[float]:
    """A user's training loop on the Llama; returns the losses."""
    losses = []
    for i in steps:
        ids = tokens(i)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def outputs(model: nn.Module) -> dict[str, Tensor]:
    """What each adapted layer makes of the unit vectors: its whole effective weight, ε included if there is one.

    Only without dropout.
    """
    return {layer.name: layer.module(torch.eye(layer.shape[1])).detach() for layer in lora_layers(model)}


def epsilon(model: nn.Module) -> dict[str, Tensor]:
    """The ε that each layer of a model in train mode is perturbed by at present, up to rounding."""
    assert model.training
    noisy = outputs(model)
    model.eval()
    clean = outputs(model)
    model.train()
    return {name: (noisy[name] - clean[name]).t() for name in noisy}


def base_state(optimizer: Optimizer) -> dict[str, Any]:
    """A frozen copy of the state without the method's own part."""
    state = optimizer.state_dict()
    return _frozen({key: state[key] for key in state if key != "flatlora"})


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return [_frozen(item) for item in value] if isinstance(value, list) else value


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two nested structures first differ in a single bit, or None."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{path}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        if torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan()):
            return None
        return f"{path}: differ by up to {(a.double() - b.double()).abs().max():.3g}"
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))} in one alone"
        found = (difference(a[key], b[key], f"{path}/{key}") for key in a)
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{path}: {len(a)} and {len(b)} items"
        found = (difference(x, y, f"{path}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        same = a == b or (a != a and b != b)
        return None if same or (callable(a) and callable(b)) else f"{path}: {a!r} and {b!r}"
    return next((where for where in found if where is not None), None)
