"""What is known of a weight's gradient where a factor is frozen, or several layers share it."""

import pytest
import torch
from helpers import gradient_rows
from models import Net, ParameterLoRA, one_layer, peft, trainable
from torch import nn

from flatlora import GGPOOptimizer, LoRASAMOptimizer, apply_gralora, lora_layers
from flatlora.reference import projected


def gralora():
    model = apply_gralora(Net(nn.Linear(8, 12).double()), "fc", r=4, k=2)
    nn.init.normal_(model.fc.gralora_B)
    return model.train()


FORMS = {
    "lora": lambda: one_layer(),
    "conv1d": lambda: one_layer(conv1d=True),
    "dora": lambda: one_layer(use_dora=True),
    "two adapters": lambda: one_layer(adapters={"first": {}, "second": {"r": 2}}),
    "gralora": gralora,
    "own": lambda: Net(ParameterLoRA(9, 7).double()).train(),
    "turned": lambda: Net(ParameterLoRA(9, 7, transposed=True).double()).train(),
}


def factors(layer):
    """(A, B, whether each is trained) of every block of every adapter, with where it is; DoRA's row factors in B."""
    m, n = layer.shape
    for adapter in layer.adapters():
        k = adapter.k
        A, B = (f.detach().double().reshape(k, k, *f.shape[-2:]) for f in (adapter.A, adapter.B))
        if adapter.magnitude is not None:
            weight = layer.base.dense(torch.float64) + adapter.scaling * B[0, 0] @ A[0, 0]
            B = B * (adapter.magnitude.detach() / weight.norm(dim=1))[:, None]
        for i in range(k):
            for j in range(k):
                rows, columns = (slice(at * size // k, (at + 1) * size // k) for at, size in ((i, m), (j, n)))
                yield (rows, columns), A[i, j], B[i, j], adapter.A_param.requires_grad, adapter.B_param.requires_grad


def expected_projection(layer, G):
    """On {B·X + Y·A}, X only of those whose A is trained, Y only of those whose B is; with pseudo-inverses."""
    found = torch.zeros_like(G)
    parts = {}
    for (rows, columns), A, B, trains_a, trains_b in factors(layer):
        place = parts.setdefault((rows.start, columns.start), ((rows, columns), [], []))
        place[1].append(A if trains_b else torch.zeros_like(A))
        place[2].append(B if trains_a else torch.zeros_like(B))
    for at, A, B in parts.values():
        found[at] = projected(G[at], torch.cat(B, 1), torch.cat(A))
    return found


def freeze(model, which):
    for name, p in model.named_parameters():
        if any(part in name for part in which):
            p.requires_grad_(False)


FROZEN = {
    "A": ["lora_A", "gralora_A"],
    "B": ["lora_B", "gralora_B"],
    "A of one": ["lora_A.first"],
    "B of one": ["lora_B.first"],
    "A of one, B of the other": ["lora_A.first", "lora_B.second"],
    "none": [],
}
CASES = [(form, which) for form in FORMS for which in FROZEN if " " not in which or form == "two adapters"]


@pytest.mark.parametrize(("form", "which"), CASES)
def test_what_frozen_factors_leave_of_the_projection(form, which):
    """The loss is linear in the weights, whose gradient is then known whatever the layer is."""
    torch.manual_seed(0)
    model = FORMS[form]()
    freeze(model, FROZEN[which])
    (layer,) = lora_layers(model)
    m, n = layer.shape
    x, target = torch.randn(6, n, dtype=torch.float64), torch.randn(6, m, dtype=torch.float64)
    expected = expected_projection(layer, target.t() @ x)
    sam = LoRASAMOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, rho=0.3)
    ggpo = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.1, beta=1.0, update_every=1, seed=1)
    (model(x) * target).sum().backward()
    sam.step()
    ggpo.step()
    (found,) = gradient_rows(ggpo).values()
    torch.testing.assert_close(found.double(), expected.square().sum(1), rtol=1e-5, atol=1e-9)
    assert abs(float(sam.metrics()["projected_gradient_norm"]) / float(expected.norm()) - 1) < 1e-6
    (state,) = sam.method_state()["layers"].values()
    direction = state["B"] @ state["A"]
    if direction.dim() == 4:
        direction = direction.transpose(1, 2).reshape(m, n)
    torch.testing.assert_close(direction.double(), expected / expected.norm(), rtol=1e-5, atol=1e-7)


def two_layers(share):
    """Two layers in a row, of which one factor, or both, is one parameter."""
    model = nn.Sequential(ParameterLoRA(7, 7), nn.Tanh(), ParameterLoRA(7, 7)).double().train()
    for name in share:
        setattr(model[2], name, getattr(model[0], name))
    return model


@pytest.mark.parametrize("share", ["lora_A", "lora_B"])
def test_a_shared_factor_is_as_a_frozen_one(share):
    """Its gradient is the sum of both layers', of which each layer's own can't be told."""
    torch.manual_seed(0)
    model = two_layers([share])
    leaves = [torch.zeros(7, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x, target = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    hidden = torch.tanh(model[0](x) + x @ leaves[0].t())
    loss = ((model[2](hidden) + hidden @ leaves[1].t()) * target).sum()
    expected = []
    for module, G in zip((model[0], model[2]), torch.autograd.grad(loss, leaves), strict=True):
        A, B = module.lora_A.detach(), module.lora_B.detach()
        expected.append(projected(G, 0 * B, A) if share == "lora_A" else projected(G, B, 0 * A))
    total = sum(part.square().sum() for part in expected).sqrt()
    sam = LoRASAMOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, rho=0.3)
    ggpo = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.0, beta=1.0, update_every=1, seed=1)
    ggpo.sigma = 1e-9
    (model(x) * target).sum().backward()
    sam.step()
    ggpo.step()
    for part, state, rows in zip(
        expected, sam.method_state()["layers"].values(), gradient_rows(ggpo).values(), strict=True
    ):
        torch.testing.assert_close(state["B"] @ state["A"], part / total, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(rows, part.square().sum(1), rtol=1e-5, atol=1e-9)


def test_peft_layers_that_share_a():
    model = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7))
    model = peft(model, ["0", "2"])
    first, second = (model.base_model.model[i] for i in (0, 2))
    second.lora_A["default"].weight = first.lora_A["default"].weight
    sam = LoRASAMOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, rho=0.3)
    model(torch.randn(4, 7, dtype=torch.float64)).square().sum().backward()
    sam.step()
    A = first.lora_A["default"].weight.detach()
    for state in sam.method_state()["layers"].values():
        direction = state["B"] @ state["A"]
        torch.testing.assert_close(direction @ torch.linalg.pinv(A) @ A, direction, rtol=1e-6, atol=1e-9)


def test_layers_that_share_both_factors_are_refused():
    with pytest.raises(ValueError, match=r"layer '0' shares both factors .*A with 0, 2 and B with 0, 2"):
        lora_layers(two_layers(["lora_A", "lora_B"]))


def test_a_module_in_two_places_shares_nothing():
    layer = ParameterLoRA(7, 7)
    assert len(lora_layers(nn.Sequential(layer, nn.Tanh(), layer))) == 1


def test_a_scale_that_holds_for_the_pass_alone_is_that_of_its_gradients():
    """As diffusers' cross_attention_kwargs={"scale": ...}: the layers are scaled for the forward and back after it."""
    torch.manual_seed(0)
    model = one_layer()
    (layer,) = lora_layers(model)
    x, target = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    expected = expected_projection(layer, target.t() @ x)
    sam = LoRASAMOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, rho=0.3)
    ggpo = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.1, beta=1.0, update_every=1, seed=1)
    for _ in range(2):
        layer.module.scale_layer(0.5)
        out = model(x)
        layer.module.unscale_layer(0.5)
        (out * target).sum().backward()
        sam.step()
        ggpo.step()
        (found,) = gradient_rows(ggpo).values()
        torch.testing.assert_close(found, expected.square().sum(1), rtol=1e-5, atol=1e-9)
        assert abs(float(sam.metrics()["projected_gradient_norm"]) / float(expected.norm()) - 1) < 1e-6
        sam.zero_grad()
