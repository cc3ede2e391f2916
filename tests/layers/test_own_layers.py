"""LoRA layers of other libraries and of one's own: read as what they compute, left out, or refused by name."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Net
from torch import nn

from flatlora import BiLoRAOptimizer, GGPOOptimizer, LoRASAMOptimizer, lora_layers
from flatlora.reference import ggpo_std as expected_std
from flatlora.reference import projected

M, N, R = 8, 6, 2


class Own(nn.Module):
    """A linear base and two factors; what differs is given by those who derive from it."""

    def __init__(self, m=M, n=N, r=R, scaling=1.5):
        super().__init__()
        self.linear = nn.Linear(n, m).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, n)), nn.Parameter(torch.randn(m, r))
        self.scaling = scaling

    def update(self, x):
        return x @ self.lora_A.t() @ self.lora_B.t()

    def forward(self, x):
        return self.linear(x) + self.scaling * self.update(x)


class Reversed(Own):
    """The product is A·B."""

    def __init__(self, m=M, n=N, r=R):
        super().__init__(m, n, r)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(m, r)), nn.Parameter(torch.randn(r, n))

    def update(self, x):
        return x @ self.lora_B.t() @ self.lora_A.t()


class Turned(Own):
    """Both factors are stored transposed: x·A·B."""

    def __init__(self, m=M, n=N, r=R):
        super().__init__(m, n, r)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(n, r)), nn.Parameter(torch.randn(r, m))

    def update(self, x):
        return x @ self.lora_A @ self.lora_B


class FanIn(nn.Linear):
    """As loralib's Linear with fan_in_fan_out: its own base, stored as (n, m), and a train() that writes to it."""

    def __init__(self, m=M, n=N, r=R):
        super().__init__(n, m)
        self.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, n)), nn.Parameter(torch.randn(m, r))
        self.weight.data = self.weight.data.t()
        self.scaling, self.merged = 0.5, False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.scaling * (self.lora_B @ self.lora_A).t()
            self.merged = not mode
        return self

    def forward(self, x):
        out = F.linear(x, self.weight.t(), self.bias)
        return out if self.merged else out + self.scaling * (x @ self.lora_A.t() @ self.lora_B.t())


class RootAlpha(Own):
    def __init__(self, *args):
        super().__init__(*args)
        del self.scaling
        self.alpha = 3

    def forward(self, x):
        return self.linear(x) + self.alpha / self.lora_A.shape[0] ** 0.5 * self.update(x)


class WholeAlpha(RootAlpha):
    def forward(self, x):
        return self.linear(x) + self.alpha * self.update(x)


class BufferScale(Own):
    def __init__(self, *args):
        super().__init__(*args)
        del self.scaling
        self.register_buffer("scaling", torch.tensor(2.0))


class LowerCase(nn.Module):
    """As torchtune's LoRALinear."""

    def __init__(self, m=M, n=N, r=R):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n), requires_grad=False)
        self.register_parameter("bias", None)
        self.in_dim, self.out_dim, self.rank, self.alpha = n, m, r, 4
        self.dropout, self.disabled, self.merged = nn.Dropout(0.5), False, False
        self.lora_a, self.lora_b = nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False)

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return out if self.disabled else out + self.alpha / self.rank * self.lora_b(self.lora_a(self.dropout(x)))


class DownUp(nn.Module):
    def __init__(self, m=M, n=N, r=R):
        super().__init__()
        self.org_module = nn.Linear(n, m).requires_grad_(False)
        self.lora_down, self.lora_up, self.scale = nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False), 0.7

    def forward(self, x):
        return self.org_module(x) + self.lora_up(self.lora_down(x)) * self.scale


class Branch(nn.Module):
    def __init__(self, m, n, r):
        super().__init__()
        self.A, self.B, self.alpha = nn.Parameter(torch.randn(n, r)), nn.Parameter(torch.randn(r, m)), 1.5

    def forward(self, x):
        return self.alpha * (x @ self.A @ self.B)


class Beside(nn.Module):
    """LinearWithLoRA: the branch is a child of its own."""

    def __init__(self, m=M, n=N, r=R):
        super().__init__()
        self.linear, self.lora = nn.Linear(n, m).requires_grad_(False), Branch(m, n, r)

    def forward(self, x):
        return self.linear(x) + self.lora(x)


def child_called(name):
    class Called(Own):
        def __init__(self, *args):
            super().__init__(*args)
            self.add_module(name, self.linear)
            del self.linear

        def forward(self, x):
            return getattr(self, name)(x) + self.scaling * self.update(x)

    return Called


class FrozenBuffer(Own):
    """LoRA-FA with A in a buffer."""

    def __init__(self, *args):
        super().__init__(*args)
        A = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", A)


class ThreeDimensions(Own):
    def forward(self, x):
        batch, tokens, width = x.shape
        return super().forward(x.reshape(-1, width)).view(batch, tokens, -1)


class Optional(Own):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


READ = {
    cls.__name__: cls
    for cls in (
        Own, Reversed, Turned, FanIn, RootAlpha, WholeAlpha, BufferScale, LowerCase, DownUp, Beside, FrozenBuffer,
        ThreeDimensions, Optional,
    )
}  # fmt: skip
READ |= {name: child_called(name) for name in ("layer", "frozen", "fc", "orig_layer", "linear_layer", "pretrained")}


def dense(module, n):
    """W' (m, n) by what the layer makes of the unit vectors, in evaluation."""
    flags = [(part, part.training) for part in module.modules()]
    for part, _ in flags:
        part.training = False
    x = torch.eye(n, dtype=next(module.parameters()).dtype)[None]
    with torch.no_grad():
        weight = (module(x) - module(torch.zeros_like(x)))[0].t().double()
    for part, mode in flags:
        part.training = mode
    return weight


@pytest.mark.parametrize("shape", [(M, N, R), (6, 6, 2), (3, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", READ)
def test_what_is_read_is_what_the_layer_computes(kind, dtype, shape):
    """Square weights and factors, too, where shapes don't tell which way round they are."""
    torch.manual_seed(1)
    model = Net(READ[kind](*shape).to(dtype)).train()
    (layer,) = lora_layers(model)
    (adapter,) = layer.adapters()
    assert layer.name == "fc" and layer.shape == shape[:2]
    update = adapter.scaling * adapter.B.double() @ adapter.A.double()
    weight = dense(model.fc, shape[1])
    torch.testing.assert_close(
        layer.base.dense(torch.float64) + update, weight, rtol=0, atol=0.15 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("kind", READ)
def test_ggpo_and_lorasam_on_what_is_read(kind):
    """The noise's rows and the direction, against what autograd says of the dense weight."""
    torch.manual_seed(2)
    module = READ[kind](6, 6, 2).double()
    model = Net(module).train()
    params = [p for p in model.parameters() if p.requires_grad]
    ggpo = GGPOOptimizer(torch.optim.SGD(params, lr=0.0), model, sigma=0.3, beta=0.0, seed=1)
    torch.testing.assert_close(ggpo.row_std()["fc"].double(), expected_std(dense(module, 6), 0.3), rtol=1e-6, atol=0)
    ggpo.remove()
    sam = LoRASAMOptimizer(torch.optim.SGD(params, lr=0.0), model, rho=0.3)
    x, target = torch.randn(5, 4, 6).double(), torch.randn(5, 4, 6).double()
    if kind == "LowerCase":
        module.dropout.p = 0.0  # whose gradient is that of what passes
    (model(x) * target).sum().backward()
    sam.step()
    G = torch.einsum("bti,btj->ij", target, x)
    (adapter,) = lora_layers(model)[0].adapters()
    A, B = adapter.A.detach(), adapter.B.detach()
    expected = G @ torch.linalg.pinv(A) @ A if kind == "FrozenBuffer" else projected(G, B, A)
    b, a = sam.method_state()["layers"]["fc"]["B"], sam.method_state()["layers"]["fc"]["A"]
    torch.testing.assert_close(b @ a, expected / expected.norm(), rtol=1e-5, atol=1e-6)


# --- refused, or left out, with what is wrong ------------------------------------------------------------------------


class OwnDoRA(Own):
    def __init__(self):
        super().__init__()
        self.magnitude = nn.Parameter(self.linear.weight.detach().norm(dim=1))

    def forward(self, x):
        weight = self.linear.weight + self.scaling * self.lora_B @ self.lora_A
        return F.linear(x, self.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True), self.linear.bias)


class Activated(Own):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Between(Own):
    def forward(self, x):
        return self.linear(x) + self.scaling * torch.relu(x @ self.lora_A.t()) @ self.lora_B.t()


class Second(Own):
    def forward(self, mask, x):
        return super().forward(x) * mask


class Pair(Own):
    def forward(self, x):
        return super().forward(x), None


class Reshaped(Own):
    def forward(self, x):
        return super().forward(x).unflatten(-1, (2, -1))


class Rescaled(Own):
    def forward(self, x):
        return self.linear(x) + 2 * self.scaling * self.update(x)


class OwnSwitch(Own):
    on = False

    def forward(self, x):
        return super().forward(x) if self.on else self.linear(x)


class Parametrized(Own):
    def __init__(self):
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self, "lora_A")


class Gate(Own):
    """Neutral at first, and trained."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))

    def update(self, x):
        return self.gate * super().update(x)


class SecondPair(Own):
    def __init__(self):
        super().__init__()
        self.lora_C, self.lora_D = nn.Parameter(torch.randn(R, N)), nn.Parameter(torch.zeros(M, R))

    def update(self, x):
        return super().update(x) + x @ self.lora_C.t() @ self.lora_D.t()


class DownBias(Own):
    def __init__(self):
        super().__init__()
        del self.lora_A, self.lora_B
        self.lora_A, self.lora_B = nn.Linear(N, R), nn.Linear(R, M, bias=False)

    def update(self, x):
        return self.lora_B(self.lora_A(x))


class NoScaleYet(Reversed):
    def __init__(self):
        super().__init__(6, 6)
        self.scaling = 0.0


REFUSED = [
    (Gate, ["'fc', a Gate", "times the product of its factors"]),
    (SecondPair, ["'fc', a SecondPair", "(W0 + s·B·A)"]),
    (DownBias, ["'fc', a DownBias", "lora_A has a bias", "bias=False"]),
    (NoScaleYet, ["'fc', a NoScaleYet", "scaling is 0", "another number"]),
    (OwnDoRA, ["'fc', a OwnDoRA", "(W0 + s·B·A)", "DoRA"]),
    (Activated, ["'fc', a Activated", "activation", "module around it"]),
    (Between, ["'fc', a Between", "between its factors"]),
    (Second, ["'fc', a Second", "input as the only argument", "missing 1 required positional argument", "first"]),
    (Pair, ["'fc', a Pair", "tuple", "(..., 8)", "alone"]),
    (Reshaped, ["'fc', a Reshaped", "(4, 2, 4)", "expected (..., 8)"]),
    (Rescaled, ["'fc', a Rescaled", "adds 3 times", "says 1.5", "`scaling`"]),
    (OwnSwitch, ["'fc', a OwnSwitch", "adds nothing", "`enabled`"]),
    (Parametrized, ["'fc', a Parametrized", "lora_A", "parametrization"]),
]


@pytest.mark.parametrize(("cls", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("method", [GGPOOptimizer, LoRASAMOptimizer, BiLoRAOptimizer.for_model])
def test_what_computes_something_else_is_refused_and_stays(method, cls, words):
    torch.manual_seed(0)
    model = Net(cls()).train()
    before = {name: (t, t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    params = [p for p in model.parameters() if p.requires_grad]
    streams = torch.get_rng_state(), random.getstate()
    with pytest.raises(ValueError) as error:
        if method == BiLoRAOptimizer.for_model:
            method(model, torch.optim.SGD, lr=0.1)
        else:
            method(torch.optim.SGD(params, lr=0.1), model)
    assert all(word in str(error.value) for word in words), error.value
    assert torch.equal(torch.get_rng_state(), streams[0]) and random.getstate() == streams[1]
    assert all(part.training for part in model.modules()) and "forward" not in model.fc.__dict__
    for name, t in model.state_dict(keep_vars=True).items():
        if "parametrizations" not in name:
            assert t is before[name][0] and torch.equal(t, before[name][1]) and t._version == before[name][2]


def test_being_asked_leaves_no_trace():
    """In the layers that a train() of their own would write to, in their modes, switches and random streams."""

    class Noisy(FanIn):
        last, calls = None, 0

        def forward(self, x):
            self.last, self.calls = x, self.calls + 1
            return super().forward(F.dropout(x, 0.5, self.training) + 0 * torch.rand(1))

    for mode in (True, False):
        model = Net(Noisy(6, 6)).train(mode)
        before = [(t, t.clone(), t._version, t.data_ptr()) for t in model.state_dict(keep_vars=True).values()]
        stream = torch.get_rng_state()
        merged = model.fc.merged
        (layer,) = lora_layers(model)
        assert torch.equal(torch.get_rng_state(), stream) and model.fc.last is None and model.fc.calls == 0
        assert model.fc.merged == merged == (not mode) and model.fc.training == mode and layer.base.transposed
        for t, (same, values, version, pointer) in zip(model.state_dict(keep_vars=True).values(), before, strict=True):
            assert t is same and torch.equal(t, values) and (t._version, t.data_ptr()) == (version, pointer)
        assert all(p.grad is None for p in model.parameters())


def test_a_layer_is_asked_once():
    calls = []

    class Counted(Own):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    model = Net(Counted())
    for _ in range(3):
        lora_layers(model)
    assert len(calls) == 1
    model.fc.lora_A, model.fc.lora_B = nn.Parameter(torch.randn(3, N)), nn.Parameter(torch.randn(M, 3))
    assert lora_layers(model)[0].adapters()[0].rank == 3 and len(calls) == 2


@pytest.mark.parametrize("off", [0, torch.tensor(False), np.bool_(False)], ids=["int", "tensor", "numpy"])
def test_a_switch_may_be_a_number_of_any_kind(off):
    class Switched(Own):
        enabled = True

        def forward(self, x):
            return super().forward(x) if self.enabled else self.linear(x)

    model = Net(Switched()).train()
    optimizer = GGPOOptimizer(torch.optim.SGD([model.fc.lora_A, model.fc.lora_B], lr=0.1), model, sigma=0.5, seed=1)
    assert optimizer.current_perturbation()["fc"] is not None
    model.fc.enabled = off
    x = torch.randn(4, N)
    assert torch.equal(model(x), model.fc.linear(x)) and optimizer.current_perturbation()["fc"] is None


def test_a_method_called_merged_says_nothing():
    class WithMethod(Own):
        def merged(self):
            return False

    assert lora_layers(Net(WithMethod()))[0].adapters()


def test_the_input_is_found_among_keywords_and_further_arguments_are_told_of(caplog):
    class Keywords(Own):
        def forward(self, x, shift=None):
            return super().forward(x) + (0 if shift is None else shift)

    model = Net(Keywords()).train()
    optimizer = GGPOOptimizer(torch.optim.SGD([model.fc.lora_A, model.fc.lora_B], lr=0.1), model, sigma=0.5, seed=1)
    x, shift = torch.randn(4, N), torch.randn(4, M)
    found = model.fc(shift=shift, x=x)
    torch.testing.assert_close(found, model.fc(x) + shift)
    assert "is called with more than its input" in caplog.text
    optimizer.remove()
    assert not torch.allclose(found, model.fc(shift=shift, x=x))


@pytest.mark.parametrize(("name", "off"), [("enabled", False), ("disable_adapters", True), ("disabled", True)])
def test_a_layer_that_says_that_it_is_off_is_left_alone(name, off):
    class Switched(Own):
        def forward(self, x):
            return self.linear(x) if getattr(self, name) is off else super().forward(x)

    module = Switched()
    setattr(module, name, off)  # at first: it is asked with its adapter on
    model = Net(module).train()
    params = [module.lora_A, module.lora_B]
    optimizer = GGPOOptimizer(torch.optim.SGD(params, lr=0.1), model, sigma=0.5, seed=1)
    x = torch.randn(4, N)
    assert getattr(module, name) is off
    assert torch.equal(model(x), module.linear(x))
    setattr(module, name, not off)
    assert not torch.allclose(model(x), module.linear(x) + module.scaling * module.update(x))
    assert optimizer.current_perturbation()["fc"] is not None
    setattr(module, name, off)
    assert torch.equal(model(x), module.linear(x)) and optimizer.current_perturbation()["fc"] is None


@pytest.mark.parametrize("kind", ["Own", "BufferScale", "LowerCase", "Beside", "FanIn"])
def test_compiled_as_one_graph(kind):
    """With the switch, too, where the layer has one."""
    outputs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Net(READ[kind](8, 8, 2)).train()
        if kind == "LowerCase":
            model.fc.dropout.p = 0.0
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = GGPOOptimizer(torch.optim.SGD(params, lr=0.01), model, sigma=0.3, seed=1)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        outputs.append([])
        for off in (False, True, False):
            if kind == "LowerCase":
                model.fc.disabled = off
            outputs[-1].append(out := run(x))
            if out.requires_grad:
                out.square().mean().backward()
                optimizer.step()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


class Merged(Own):
    """As loralib's MergedLinear and LitGPT's LoRAQKVLinear: updates of two of three parts of the outputs."""

    def __init__(self):
        super().__init__(12, 6, 4)
        self.enable_lora = [True, False, True]
        self.lora_B = nn.Parameter(torch.randn(8, 2))


def test_updates_of_parts_of_the_outputs_are_left_out_and_named(caplog):
    model = nn.ModuleDict({"qkv": Merged(), "out": Own()})
    with caplog.at_level("WARNING", "flatlora"):
        assert [layer.name for layer in lora_layers(model)] == ["out"]
    assert "qkv (several updates side by side" in caplog.text
    with pytest.raises(ValueError, match=r"no adapted linear layer .*qkv \(several updates side by side"):
        lora_layers(Net(nn.ModuleDict({"qkv": Merged()})))


def test_a_layer_without_a_linear_child_says_which_names_are_looked_for():
    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(N, M), nn.Linear(N, M)
            self.lora_A, self.lora_B, self.scaling = nn.Parameter(torch.randn(2, N)), nn.Parameter(torch.randn(M, 2)), 1

    with pytest.raises(ValueError, match=r"several linear layers .*base_layer, linear, base, original"):
        lora_layers(Net(Branched()))


def test_a_scale_that_is_a_tensor_is_read_as_it_is_at_present():
    model = Net(BufferScale()).train()
    (layer,) = lora_layers(model)
    assert layer.adapters()[0].scaling == 2.0
    model.fc.scaling.fill_(3.0)
    assert layer.adapters()[0].scaling == 3.0
    model.fc.scaling = torch.tensor(4.0)
    assert layer.adapters()[0].scaling == 4.0


def test_the_real_loralib():
    lora = pytest.importorskip("loralib")
    for shape in ((6, 8), (6, 6)):
        for turned in (False, True):
            module = lora.Linear(*shape, r=2, lora_alpha=3, fan_in_fan_out=turned)
            nn.init.normal_(module.lora_B)
            model = Net(module).train()
            (layer,) = lora_layers(model)
            (adapter,) = layer.adapters()
            weight = layer.base.dense(torch.float64) + adapter.scaling * adapter.B.double() @ adapter.A.double()
            torch.testing.assert_close(weight, dense(module, shape[0]), rtol=0, atol=1e-5)
    model = nn.ModuleDict({"fc": module, "qkv": lora.MergedLinear(6, 12, r=2, enable_lora=[True, False, True])})
    assert [layer.name for layer in lora_layers(model)] == ["fc"]
