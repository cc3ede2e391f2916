"""The orthogonality term and its gradient."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from problems import bilevel, peft_net, relative
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora import direction_parameters, lora_layers, reference
from flatlora.bidora import orthogonality
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


def own_gradient(layers: list, adapter: str, params: list[Tensor]) -> list[Tensor]:
    """By autograd over the plain formula."""
    adapters = [next(a for a in layer.all_adapters() if a.name == adapter) for layer in layers]
    weights = [
        layer.base.float_weight().detach() + a.scaling * a.B @ a.A for layer, a in zip(layers, adapters, strict=True)
    ]
    return list(torch.autograd.grad(reference.orthogonality(weights), params))


@pytest.mark.parametrize(("n", "hidden", "m"), [(6, 8, 4), (9, 9, 12), (17, 5, 16), (9, 9, 9), (260, 270, 260)])
def test_orthogonality_term_and_gradient(n, hidden, m):
    model = peft_net(n=n, hidden=hidden, m=m)
    layers = lora_layers(model)
    expected = own_gradient(layers, "default", direction_parameters(model))
    for p in direction_parameters(model):
        p.grad = torch.ones_like(p)
    with Shapes() as shapes:
        add_orthogonality_gradient(layers, 0.5)
    found = [(p.grad - 1) / 0.5 for p in direction_parameters(model)]
    assert relative(found, expected) < 1e-9
    square = {shape[-2:] for shape in shapes.seen if len(shape) > 1}
    assert not any((cols, cols) in square for rows, cols in (layer.shape for layer in layers) if rows < cols)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_layers_of_one_shape_are_computed_together_as_far_as_they_fit(most, monkeypatch):
    """Each through two adapters, of which one is not trained in one layer."""
    parts = lambda group, elements, device: (group[i : i + most] for i in range(0, len(group), most))  # noqa: E731
    monkeypatch.setattr(orthogonality, "chunks", parts)
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).double()
    config = LoraConfig(r=2, target_modules=[str(i) for i in range(5)], use_dora=True, init_lora_weights=False)
    model = get_peft_model(net, config)
    model.add_adapter("other", config)
    model.double()
    layers = lora_layers(model)
    for p in direction_parameters(model):
        p.requires_grad_(True).grad = torch.zeros_like(p)
    untrained = layers[1].module.lora_A["other"].weight, layers[1].module.lora_B["other"].weight
    for p in untrained:
        p.grad = None
    add_orthogonality_gradient(layers, 1.0)
    for name, these in (("default", layers), ("other", [layers[0], *layers[2:]])):
        params = [getattr(layer.module, factor)[name].weight for layer in these for factor in ("lora_A", "lora_B")]
        expected = [grad * len(these) / 9 for grad in own_gradient(these, name, params)]
        assert relative([p.grad for p in params], expected) < 1e-9
    assert all(p.grad is None for p in untrained)


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
