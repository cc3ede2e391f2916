"""LoRASAM where P(G) may have more than the 32 directions that are kept, against dense float64 references."""

import copy

import pytest
import torch
from helpers import epsilon, projection, wrapped
from models import MLP, lora_modules, peft
from torch import nn

from flatlora import GGPOOptimizer, LoRASAMOptimizer, apply_gralora
from flatlora.layers import tangent
from flatlora.layers.view import lora_layers

RHO = 0.3


def adapted(model=None, r=24, **options):
    torch.manual_seed(0)
    return peft(MLP(44, 52, 40) if model is None else model, ["up", "down"], r=r, **options)


def ill_conditioned():
    """Singular values of A and B down to a three hundredth of the largest."""
    model = adapted()
    with torch.no_grad():
        for module in lora_modules(model).values():
            for factor in (module.lora_A["default"].weight, module.lora_B["default"].weight):
                u, s, v = torch.linalg.svd(factor, full_matrices=False)
                factor.copy_(u * torch.logspace(0, -2.5, len(s), dtype=s.dtype) @ v)
    return model


def fresh():
    model = adapted()
    for module in lora_modules(model).values():
        nn.init.zeros_(module.lora_B["default"].weight)
    return model


def gralora():
    torch.manual_seed(0)
    model = apply_gralora(MLP(96, 104, 96).double(), "all-linear", r=48, k=2, alpha=6)
    for name, p in model.named_parameters():
        if "gralora_B" in name:
            nn.init.normal_(p, 0, 0.3)
    return model.train()


FORMS = {
    "lora": adapted,
    "dora": lambda: adapted(use_dora=True),
    "B = 0": fresh,
    "ill-conditioned": ill_conditioned,
    "r > min(m, n)": lambda: adapted(MLP(20, 18, 20)),
    "gralora": gralora,
}


def stepped(model, rows):
    """Takes a step that moves nothing; returns its optimizer, and each layer's P(G) and ε in float64."""
    optimizer = wrapped(LoRASAMOptimizer, model, 0.0, torch.optim.SGD, rho=RHO)
    exact = passed(model, rows)
    optimizer.step()
    return optimizer, exact, {name: value.double() for name, value in epsilon(model).items()}


def passed(model, rows):
    """Runs a batch forward and backward; returns each layer's P(G) in float64."""
    layers = list(lora_layers(model))
    dtype = next(iter(model.parameters())).dtype
    x = torch.randn(rows, layers[0].shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    twin = copy.deepcopy(model).double()
    grads = {}
    for layer in lora_layers(twin):
        note = grads.setdefault(layer.name, [])
        layer.module.register_forward_hook(lambda module, args, out, note=note: keep(note, args[0], out))
    for each, data in ((model, x.to(dtype)), (twin, x)):
        (each(data) - 0.4).square().mean().backward()
    return {layer.name: projection(layer.module, grads[layer.name][0]) for layer in lora_layers(twin)}


def keep(note, x, out):
    out.register_hook(lambda g: note.append(g.flatten(0, -2).t() @ x.detach().flatten(0, -2)))


def together(parts):
    return torch.cat([part.flatten() for part in parts.values()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
@pytest.mark.parametrize("form", FORMS)
def test_epsilon_is_exact_where_the_gradient_has_few_directions(form, dtype, tolerance):
    """Of ten rows G has rank ten, and P(G) at most twenty."""
    optimizer, exact, found = stepped(FORMS[form]().to(dtype), rows=10)
    whole, eps = together(exact), together(found)
    assert (eps - RHO * whole / whole.norm()).norm() < tolerance * RHO
    metrics = optimizer.metrics()
    assert float(metrics["projected_gradient_norm"]) == pytest.approx(whole.norm().item(), rel=tolerance)
    assert float(metrics["left_out"]) < tolerance and float(metrics["perturbation_to_rho"]) == pytest.approx(1)


@pytest.mark.parametrize("form", ["lora", "gralora"])
def test_a_compiled_graph_is_made_for_the_directions_that_are_kept(form):
    optimizer, *_ = stepped(FORMS[form](), rows=100)
    source = optimizer._source
    for (name, _), factors in source.direction.items():
        assert source.graph_kind(source.layers[name]) == tuple(factor.shape for factor in factors)


def test_the_rows_of_ggpo_go_by_the_same_directions():
    model = adapted()
    optimizer = wrapped(GGPOOptimizer, model, 0.0, torch.optim.SGD, sigma=1e-9, beta=1.0)
    exact = passed(model, rows=10)
    optimizer.step()
    for name, rows in optimizer._source.grad_sq.items():
        torch.testing.assert_close(rows, exact[name].square().sum(1), rtol=1e-6, atol=1e-12)


def test_of_many_directions_the_leading_are_kept_and_the_rest_is_told():
    optimizer, exact, found = stepped(adapted(MLP(80, 90, 80), r=48), rows=400)
    squares = {name: torch.linalg.svdvals(part).square() for name, part in exact.items()}
    best = sum(s[: tangent.LEADING].sum() for s in squares.values()) / sum(s.sum() for s in squares.values())
    whole, eps = together(exact), together(found)
    cosine = (eps @ whole) / eps.norm() / whole.norm()
    print(f"kept {cosine**2:.4f} of the square, at best {best:.4f}")
    assert best < 0.99 and 0.97 * best < cosine**2 <= best
    assert eps.norm() == pytest.approx(RHO) and all(torch.linalg.matrix_rank(part) <= 32 for part in found.values())
    metrics = optimizer.metrics()
    assert float(metrics["left_out"]) == pytest.approx((1 - cosine**2).sqrt().item(), rel=0.2)
    assert float(metrics["projected_gradient_norm"]) == pytest.approx(whole.norm().item(), rel=0.02)


def test_the_same_step_makes_the_same_epsilon_and_moves_no_random_stream():
    states, found = [], []
    for _ in range(2):
        found.append(together(stepped(adapted(), rows=100)[2]))
        states.append(torch.get_rng_state())
    assert torch.equal(*found) and torch.equal(*states)


@pytest.mark.parametrize("r", [4, 16])
def test_up_to_rank_16_nothing_is_left_out(r):
    optimizer, exact, found = stepped(adapted(r=r), rows=100)
    whole, eps = together(exact), together(found)
    assert (eps - RHO * whole / whole.norm()).norm() < 1e-6 * RHO
    assert optimizer.metrics()["left_out"] == 0


@pytest.mark.parametrize("scale", [1e-13, 1e-16])
def test_a_nearly_dead_layer_takes_no_others_perturbation(scale):
    model = adapted().float()
    with torch.no_grad():
        next(iter(lora_modules(model).values())).lora_B["default"].weight.mul_(scale)
    optimizer = LoRASAMOptimizer(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), model)
    model(torch.randn(6, 44)).square().sum().backward()
    optimizer.step()
    assert optimizer.perturbation_norm() == pytest.approx(0.05, rel=1e-3)
    assert torch.stack(list(optimizer.metrics().values())).isfinite().all()
