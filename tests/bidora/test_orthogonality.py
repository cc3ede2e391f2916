"""The orthogonality term and its gradient."""

from __future__ import annotations

import pytest
import torch
from problems import (
    bilevel,
    peft_net,
    relative,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora import (
    direction_parameters,
    lora_layers,
)
from flatlora.bidora.orthogonality import add_orthogonality_gradient


class Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {
            tuple(t.shape) for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor)
        }
        return out


@pytest.mark.parametrize(("n", "hidden", "m"), [(6, 8, 4), (9, 9, 12), (17, 5, 16)])
def test_orthogonality_term_and_gradient(n, hidden, m):
    model = peft_net(n=n, hidden=hidden, m=m)
    layers = lora_layers(model)
    terms = []
    for layer in layers:
        adapter = layer.all_adapters()[0]
        w = layer.base.float_weight().detach() + adapter.scaling * adapter.B @ adapter.A
        d = w / w.norm(dim=0)
        terms.append((d.t() @ d - torch.eye(w.shape[1])).norm())
    value = torch.stack(terms).mean()
    expected = torch.autograd.grad(value, direction_parameters(model))
    for p in direction_parameters(model):
        p.grad = torch.ones_like(p)
    with Shapes() as shapes:
        add_orthogonality_gradient(layers, 0.5)
    found = [(p.grad - 1) / 0.5 for p in direction_parameters(model)]
    assert relative(found, list(expected)) < 1e-9
    assert not any((cols, cols) in shapes.seen for rows, cols in (layer.shape for layer in layers) if rows < cols)


def test_orthogonality_belongs_to_the_lower_loss():
    def directions(gamma: float) -> list[Tensor]:
        model = peft_net()
        torch.manual_seed(1)
        optimizer = bilevel(model, orthogonality=gamma, lr=1.0)
        before = [p.detach().clone() for p in direction_parameters(model)]
        optimizer.step()
        return [old - p.detach() for p, old in zip(direction_parameters(model), before, strict=True)]

    model = peft_net()
    for p in direction_parameters(model):
        p.grad = torch.zeros_like(p)
    add_orthogonality_gradient(lora_layers(model), 0.3)
    added = [a - b for a, b in zip(directions(0.3), directions(0.0), strict=True)]
    assert relative(added, [p.grad for p in direction_parameters(model)]) < 1e-9
