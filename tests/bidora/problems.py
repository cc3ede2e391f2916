"""Small two-level problems, with and without PEFT, and how their results are compared."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import numpy
import torch
import torch.nn.functional as F
from helpers import difference as difference
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flatlora import BilevelOptimizer, direction_parameters, magnitude_parameters

SGD = torch.optim.SGD


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    found, expected = (torch.cat([t.detach().flatten() for t in ts]) for ts in (found, expected))
    return float((found - expected).norm() / expected.norm())


def output(prediction: Tensor, labels: Tensor | None) -> SimpleNamespace:
    return SimpleNamespace(loss=None if labels is None else F.mse_loss(prediction, labels))


class TrueDora(nn.Module):
    """Two DoRA layers whose norm is part of the graph, (m, n) = (7, 5) and (3, 7)."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(7, 5), (3, 7)]
        self.w = [torch.randn(m, n, dtype=torch.float64) for m, n in shapes]
        self.a = nn.ParameterList([torch.randn(2, n, dtype=torch.float64) for _, n in shapes])
        self.b = nn.ParameterList([torch.randn(m, 2, dtype=torch.float64) for m, _ in shapes])
        self.mu = nn.ParameterList([w.norm(dim=1) for w in self.w])

    def forward(self, x: Tensor, labels: Tensor | None = None, parameters: list[Tensor] | None = None):
        a, b, mu = self.a, self.b, self.mu
        if parameters is not None:
            a, b, mu = parameters[:2], parameters[2:4], parameters[4:]
        for i, w in enumerate(self.w):
            v = w + b[i] @ a[i]
            x = torch.tanh(F.linear(x, v * (mu[i] / v.norm(dim=1)).unsqueeze(1)))
        return output(x, labels)


def batch(size: int = 16, n: int = 5, m: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"x": torch.randn(size, n, dtype=dtype), "labels": torch.randn(size, m, dtype=dtype)}


def generic(model: nn.Module, **kwargs) -> BilevelOptimizer:
    lower = SGD([*model.a, *model.b], lr=kwargs.pop("lr", 0.1))
    return BilevelOptimizer(lower, SGD(model.mu.parameters(), lr=0.1), model, [batch()], [batch()], **kwargs)


class Net(nn.Module):
    def __init__(self, n: int = 6, hidden: int = 8, m: int = 4):
        super().__init__()
        self.first, self.second = nn.Linear(n, hidden), nn.Linear(hidden, m)

    def forward(self, x: Tensor, labels: Tensor | None = None):
        return output(self.second(torch.tanh(self.first(x))), labels)


def peft_net(dropout: float = 0.0, dtype: torch.dtype = torch.float64, dora: bool = True, **shape: int) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=dropout,
        target_modules=["first", "second"],
        use_dora=dora,
        init_lora_weights=False,
    )
    return get_peft_model(Net(**shape).to(dtype), config).to(dtype).train()


def net_batch(size: int = 16, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return batch(size, 6, 4, dtype)


def bilevel(model: nn.Module, train=None, val=None, lower=None, lr: float = 0.1, **kwargs) -> BilevelOptimizer:
    lower = SGD(direction_parameters(model), lr=lr) if lower is None else lower
    train, val = [net_batch()] if train is None else train, [net_batch()] if val is None else val
    return BilevelOptimizer(lower, SGD(magnitude_parameters(model), lr=lr), model, train, val, **kwargs)


def levels(model: nn.Module):
    return SGD(direction_parameters(model), lr=0.1), SGD(magnitude_parameters(model), lr=0.1)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """All that a call may change, copied."""
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "model": state_of(model),
        "grads": grads,
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        "streams": [torch.get_rng_state(), random.getstate(), list(numpy.random.get_state()[1])],
        "state": copy.deepcopy(optimizer.state_dict()),
        "metrics": {name: value.clone() for name, value in optimizer.metrics().items()},
    }
