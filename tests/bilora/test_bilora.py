"""Bi-LoRA against dense references, torch's own `maximize`, and everything around it that must not notice."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import closure_of
from models import MLP, peft, trained
from peft import LoraConfig
from processes import on_ranks
from torch import nn

from flatlora import BiLoRAOptimizer, LoRASAMOptimizer, attach_auxiliary, detach_auxiliary, lora_layers

bnb = pytest.importorskip("bitsandbytes")
SIZES = (12, 16, 8)


def lora_net(dtype=torch.float64, seed=0, sizes=SIZES, **config):
    torch.manual_seed(seed)
    return peft(MLP(*sizes, bias=True), ["up", "down"], dtype, **{"r": 3, **config})


def climbing(model, cls=torch.optim.SGD, **options):
    """Bi-LoRA over all that the model trains, with auxiliaries from a seed."""
    return BiLoRAOptimizer.for_model(model, cls, **{"lr": 0.1, "seed": 0, **options})


def groups(model, aux):
    return [{"params": trained(model)}, {"params": aux, "ascent": True, "weight_decay": 0.0}]


def held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def grads(optimizer):
    return [p.grad.clone() for p in held(optimizer)]


def data(steps=1, sizes=SIZES, rows=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(rows, sizes[0], generator=generator, dtype=dtype)
        yield x, torch.randn(rows, sizes[-1], generator=generator, dtype=dtype)


def train(model, optimizer, batches):
    for x, y in batches:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- the method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "lr"), [(torch.optim.SGD, 0.3), (torch.optim.Adam, 0.02)])
def test_thirty_steps_equal_a_dense_reference(cls, lr):
    """The reference forms W0 + s1·B1·A1 + s2·B2·A2, lets torch's `maximize` ascend and clips with formed products."""
    rho = 0.2
    model = lora_net()
    aux = attach_auxiliary(model, r=2, alpha=3, seed=1)
    assert [tuple(p.shape) for p in aux] == [(2, 12), (16, 2), (2, 16), (8, 2)]
    assert not any(p.any() for p in aux[1::2])
    layers = lora_layers(model)
    frozen = [(layer.base.module.weight.clone(), layer.base.module.bias.clone()) for layer in layers]
    ours = [p for layer in layers for p in (layer.adapters()[0].A, layer.adapters()[0].B)]
    first, second = ([p.detach().clone().requires_grad_() for p in side] for side in (ours, aux))
    descent, ascent = cls(first, lr=lr), cls(second, lr=lr, maximize=True)
    optimizer = BiLoRAOptimizer(cls(groups(model, aux), lr=lr), model, rho=rho)

    clipped = 0
    for x, y in data(30):
        train(model, optimizer, [(x, y)])
        h = x
        for i, (w, b) in enumerate(frozen):
            (a1, b1), (a2, b2) = first[2 * i : 2 * i + 2], second[2 * i : 2 * i + 2]
            h = F.linear(F.silu(h) if i else h, w + 2.0 * b1 @ a1 + 1.5 * b2 @ a2, b)
        F.mse_loss(h, y).backward()
        for reference in (descent, ascent):
            reference.step()
            reference.zero_grad()
        with torch.no_grad():
            c = torch.cat([(1.5 * b2 @ a2).flatten() for a2, b2 in zip(second[::2], second[1::2], strict=True)]).norm()
            if c > rho:
                clipped += 1
                for p in second:
                    p.mul_((rho / c).sqrt())
    assert clipped > 5
    for mine, theirs in zip([*ours, *aux], [*first, *second], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_a_small_step_of_the_auxiliary_climbs():
    """The paper's Proposition 2: before clipping, ⟨G, Δ(B2·A2)⟩ ≥ 0 for a small SGD step."""
    for seed in range(10):
        model = lora_net(seed=seed)
        aux = attach_auxiliary(model, r=2, seed=seed)
        with torch.no_grad():
            for p in aux:
                p.normal_(std=0.1)
        optimizer = BiLoRAOptimizer(torch.optim.SGD(groups(model, aux), lr=1e-4), model, rho=1e9)
        inputs, outputs = [], []
        for layer in lora_layers(model):
            layer.module.register_forward_hook(
                lambda _m, args, out, i=inputs, o=outputs: (
                    (i.append(args[0].detach()), out.retain_grad(), o.append(out))[3:] or None
                )
            )
        before = [b.detach() @ a.detach() for a, b in zip(aux[::2], aux[1::2], strict=True)]
        x, y = next(data())
        F.mse_loss(model(x), y).backward()
        full = [out.grad.t() @ x for out, x in zip(outputs, inputs, strict=True)]
        optimizer.step()
        after = [b.detach() @ a.detach() for a, b in zip(aux[::2], aux[1::2], strict=True)]
        assert sum(float((g * (new - old)).sum()) for g, new, old in zip(full, after, before, strict=True)) > 0


def test_the_norm_never_exceeds_rho_and_the_clip_is_global():
    model = lora_net(torch.float32)
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.Adam, lr=0.05, rho=0.1, r=2, seed=0)
    aux = optimizer.param_groups[1]["params"]
    norms = []
    for batch in data(40, dtype=torch.float32):
        train(model, optimizer, [batch])
        products = [2.0 * b.detach().double() @ a.detach().double() for a, b in zip(aux[::2], aux[1::2], strict=True)]
        norms.append(float(torch.cat([product.flatten() for product in products]).norm()))
        assert optimizer.perturbation_norm() == pytest.approx(norms[-1], rel=1e-9)
    assert max(norms) <= 0.1
    assert max(norms) > 0.0999

    with torch.no_grad():  # one layer far above ρ, the other far below: both shrink by the same factor
        for p, value in zip(aux, (3.0, 3.0, 1e-3, 1e-3), strict=True):
            p.fill_(value)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, data(dtype=torch.float32))
    assert float(aux[2].detach().mean()) / 1e-3 == pytest.approx(float(aux[0].detach().mean()) / 3.0, rel=1e-5)
    assert float(aux[2].detach().mean()) < 1e-4
    assert optimizer.perturbation_norm() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0**8])
def test_a_scaled_gradient_survives_float16_autocast(scale):
    """Computed in float16 it is 2⁻²⁰ of its size only once it is in its parameter's float32."""
    model = lora_net(torch.float32)
    optimizer = climbing(model)
    train(model, optimizer, data(2, dtype=torch.float32))  # no factor is zero any more
    x, y = next(data(dtype=torch.float32))
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            out = model(x)
        (F.mse_loss(out.float(), y) * scale).backward()
        found.append([p.grad.clone() for p in held(optimizer)])
        optimizer.zero_grad()
    for exact, half in zip(*found, strict=True):
        assert (half - exact).norm() <= 0.02 * exact.norm()
    assert all(exact.norm() > 0 for exact in found[0])


def test_who_maximizes_meets_an_auxiliary_that_descends():
    """Training by the loss turned around, with `maximize`, is the same training; a multiplier may climb in either."""
    ends = []
    for maximize in (False, True):
        model = lora_net()
        multiplier = {"params": [nn.Parameter(torch.ones(()))], "maximize": True}
        sides = groups(model, attach_auxiliary(model, r=2, seed=0))
        base = torch.optim.SGD([*({**side, "maximize": maximize} for side in sides), multiplier], lr=0.05)
        optimizer = BiLoRAOptimizer(base, model, rho=0.1)
        for x, y in data(4):
            (F.mse_loss(model(x), y) * (-1 if maximize else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in held(optimizer)[:-1]])
    assert_equal(*ends)


# --- any base optimizer, any loop ---------------------------------------------------------------------------------


def base_optimizers():
    import torch_optimizer

    torch_kinds = [torch.optim.AdamW, torch.optim.SGD]
    bnb_kinds = [bnb.optim.AdamW8bit, bnb.optim.Lion8bit, bnb.optim.PagedAdamW8bit]
    return [*torch_kinds, *bnb_kinds, torch_optimizer.Yogi, torch_optimizer.Lamb]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", base_optimizers(), ids=lambda cls: f"{cls.__module__.split('.')[0]}-{cls.__name__}")
def test_any_base_optimizer_descends_and_ascends(cls):
    """The primary moves as under the bare optimizer, the auxiliary as under it with its gradients turned."""
    sizes = (64, 128, 64)  # large enough for 8-bit states
    model = lora_net(torch.float32, sizes=sizes, r=32)
    twin = copy.deepcopy(model)
    aux, twin_aux = attach_auxiliary(model, r=64, seed=0), attach_auxiliary(twin, r=64, seed=0)
    optimizer = BiLoRAOptimizer(cls(groups(model, aux), lr=1e-3), model, rho=1e9)
    bare = cls([{"params": trained(twin)}, {"params": twin_aux, "weight_decay": 0.0}], lr=1e-3)
    batches = list(data(3, sizes, dtype=torch.float32))
    train(model, optimizer, batches)
    for x, y in batches:
        F.mse_loss(twin(x), y).backward()
        for p in twin_aux:
            p.grad.neg_()
        bare.step()
        bare.zero_grad()
    assert_equal([*trained(model), *aux], [*trained(twin), *twin_aux])


def test_gradient_norm_and_clipping_are_those_of_the_primary_alone():
    model = lora_net()
    optimizer = climbing(model, lr=1e-2)
    x, y = next(data())
    F.mse_loss(model(x), y).backward()
    down = len(trained(model))
    before_clipping = grads(optimizer)
    ours = float(torch.cat([grad.flatten() for grad in before_clipping[:down]]).norm())
    assert float(torch.cat([grad.flatten() for grad in before_clipping[down:]]).norm()) * 2**20 > 0.1 * ours
    before = [p.detach().clone() for p in held(optimizer)]
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], ours / 4)
    assert float(norm) == pytest.approx(ours, rel=1e-9)
    optimizer.step()
    for i, (p, old, grad) in enumerate(zip(held(optimizer), before, before_clipping, strict=True)):
        lr = -1e-2 if i < down else 1e-2 * 2**20  # which the auxiliary's gradients are scaled by
        torch.testing.assert_close(p.detach(), old + lr * grad / 4, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_gradient_vanishes_in_half_precision(dtype):
    """An auxiliary's gradients of 1e-4 and less are there at the step, whatever the type of its factors."""
    model = lora_net(torch.float32).to(dtype)
    optimizer = climbing(model, lr=0.0)
    x, y = next(data(dtype=dtype))
    (F.mse_loss(model(x), y) * 1e-3).backward()
    seen = []
    optimizer.base_optimizer.register_step_pre_hook(
        lambda base, *_: seen.extend(p.grad.clone() for p in base.param_groups[-1]["params"])
    )
    optimizer.step()
    B = [grad for grad in seen if grad.shape[1] == 8]
    assert all(float((grad == 0).float().mean()) < 0.2 for grad in B)


# --- any layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.3}, {"lora_bias": True}],
    ids=["lora", "rslora", "dora", "dropout", "lora_bias"],
)
def test_both_branches_and_their_gradients(config):
    """The layer's own forward plus a hook that adds the auxiliary is the reference."""
    model = lora_net(**config)
    aux = attach_auxiliary(model, r=2, seed=0)
    with torch.no_grad():
        for p in aux:
            p.normal_(std=0.1)
    x, y = next(data())

    def loss_and_grads():
        torch.manual_seed(3)
        loss = F.mse_loss(model(x), y)
        return [loss, *torch.autograd.grad(loss, [*trained(model), *aux])]

    ours = loss_and_grads()
    detach_auxiliary(model)
    inner = model.base_model.model
    for layer, a, b in zip((inner.up, inner.down), aux[::2], aux[1::2], strict=True):
        layer.register_forward_hook(lambda _m, args, out, a=a, b=b: out + 2.0 * args[0] @ a.t() @ b.t())
    for mine, theirs in zip(ours, loss_and_grads(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_hand_made_branches():
    """Two-branch layers of the user's own: the optimizer turns, steps and clips what the triples name."""

    class TwoBranch(nn.Module):
        def __init__(self, m, n):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(m, n), requires_grad=False)
            self.A1, self.B1 = nn.Parameter(torch.randn(2, n)), nn.Parameter(torch.zeros(m, 2))
            self.A2, self.B2 = nn.Parameter(torch.randn(2, n)), nn.Parameter(torch.zeros(m, 2))

        def forward(self, x):
            weight = self.weight + self.B1 @ self.A1
            return F.linear(x, weight + 0.5 * self.B2 @ self.A2 if self.training else weight)

    torch.manual_seed(0)
    model = nn.Sequential(TwoBranch(6, 5), nn.Tanh(), TwoBranch(4, 6))
    blocks = [model[0], model[2]]
    descending = [p for block in blocks for p in (block.A1, block.B1)]
    ascending = [p for block in blocks for p in (block.A2, block.B2)]
    base = torch.optim.SGD([{"params": descending}, {"params": ascending, "ascent": True}], lr=0.1)
    triples = [(block.A2, block.B2, 0.5) for block in blocks]
    with pytest.raises(ValueError, match=r"auxiliary\[0\].*do not multiply"):
        BiLoRAOptimizer(base, model, auxiliary=[(blocks[0].B2, blocks[0].A2, 0.5)])
    optimizer = BiLoRAOptimizer(base, model, rho=0.3, auxiliary=triples)
    train(model, optimizer, data(20, (5, 6, 4), dtype=torch.float32))
    formed = float(torch.cat([(0.5 * block.B2 @ block.A2).flatten() for block in blocks]).norm())
    assert optimizer.perturbation_norm() == pytest.approx(formed, rel=1e-5)
    assert 0.29 < formed <= 0.3


# --- the auxiliary exists only while training ---------------------------------------------------------------------


def test_it_is_registered_and_goes_with_the_model():
    model = lora_net(torch.float32)
    aux = attach_auxiliary(model, seed=0)
    assert {id(p) for p in aux} <= {id(p) for p in model.parameters()}
    model.double()
    assert all(p.dtype == torch.float64 for p in aux)


def test_a_sequential_model_goes_on_as_it_was():
    model = nn.Sequential(lora_net().base_model.model.up, nn.Tanh())
    x, _ = next(data())
    before = model(x)
    attach_auxiliary(model, seed=0)
    torch.testing.assert_close(model(x), before)  # B is zero at first
    detach_auxiliary(model)
    assert len(model) == 2


def test_an_adapter_that_comes_later_does_not_freeze_the_auxiliary():
    """PEFT then freezes all that is not its own and makes what it is asked to train train again."""
    model = lora_net()
    optimizer = climbing(model, rho=0.3)
    model.add_adapter("later", LoraConfig(r=2, target_modules=["up"]))
    before = [p.detach().clone() for p in optimizer.perturbation_parameters()]
    train(model, optimizer, data(2))
    moved = [not torch.equal(p, old) for p, old in zip(optimizer.perturbation_parameters(), before, strict=True)]
    assert all(moved)


def without_a_seed(rank, folder):
    model = lora_net()
    torch.manual_seed(100 + rank)  # ranks that were seeded apart
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, rho=0.3)
    ddp = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match="before DistributedDataParallel"):
        attach_auxiliary(ddp)
    train(ddp, optimizer, [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in data(4, rows=8)])
    return [p.detach().clone() for p in held(optimizer)]


def cases():
    return {"without a seed": without_a_seed}


def test_two_processes_share_the_auxiliary(tmp_path):
    first, second = (found["without a seed"] for found in on_ranks(cases, tmp_path))
    assert "error" not in first, first
    model = lora_net()
    torch.manual_seed(100)
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, rho=0.3)
    train(model, optimizer, data(4, rows=8))
    assert_equal(first, second)
    for one, alone in zip(first, held(optimizer), strict=True):
        torch.testing.assert_close(one, alone.detach(), rtol=0, atol=1e-9)


# --- bad input ----------------------------------------------------------------------------------------------------


def traces(model):
    return list(model.state_dict()), [module for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: attach_auxiliary(m, r=0), "r must be an integer"),
        (lambda m: attach_auxiliary(m, alpha=-1.0), "alpha must be"),
        (lambda m: attach_auxiliary(m, adapter="other"), "unknown adapter.*default"),
        (lambda m: attach_auxiliary(MLP(*SIZES)), "no adapted linear layer"),
        (lambda m: (m.merge_adapter(), attach_auxiliary(m)), "merged adapters.*unmerge"),
        (lambda m: BiLoRAOptimizer(torch.optim.SGD(trained(m), lr=0.1), m), "no auxiliary.*attach_auxiliary"),
        (lambda m: climbing(m, rho=0.0), "rho must be a finite number > 0"),
        (lambda m: climbing(m, lr=-1.0), "Invalid learning rate"),
    ],
)
def test_bad_input_attaches_nothing(call, message):
    model = lora_net()
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert traces(model) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, a: [{"params": [*p, *a]}], "none of the 1 parameter groups ascends"),
        (lambda p, a: [{"params": p[1:]}, {"params": [*a, p[0]], "ascent": True}], "1 parameters of no auxiliary"),
        (lambda p, a: [{"params": p}, {"params": a[:2], "ascent": True}], "auxiliary of 1 layers is in no ascent"),
        (lambda p, a: [{"params": p}, {"params": a, "ascent": True, "maximize": True}], "maximize"),
        (lambda p, a: [{"params": p, "maximize": True}, {"params": a, "ascent": True}], "maximize"),
    ],
)
def test_bad_groups(make, message):
    model = lora_net()
    aux = attach_auxiliary(model, seed=0)
    with pytest.raises(ValueError, match=message):
        BiLoRAOptimizer(torch.optim.SGD(make(trained(model), aux), lr=0.1), model)


def test_twice_and_the_state_of_another_model():
    model = lora_net()
    optimizer = climbing(model)
    before = traces(model)
    with pytest.raises(ValueError, match=r"has an auxiliary already.*detach_auxiliary"):
        attach_auxiliary(model)
    assert traces(model) == before
    other = climbing(lora_net(sizes=(12, 18, 8)))
    aux = [p.detach().clone() for p in optimizer.param_groups[1]["params"]]
    with pytest.raises(ValueError, match=r"another model.*shapes"):
        optimizer.load_state_dict(other.state_dict())
    assert_equal(optimizer.param_groups[1]["params"], aux)
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer instance"):
        BiLoRAOptimizer(torch.optim.SGD, model)


# --- gradients have their own sign for everyone but the update, and what else it keeps -----------------------------


def test_gradients_keep_their_sign_for_hooks_and_after_the_step():
    model = lora_net()
    optimizer = climbing(model)
    with torch.no_grad():
        for p in optimizer.perturbation_parameters():
            p.add_(0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(grads(optimizer)))
    optimizer.register_step_post_hook(lambda *_: seen.append(grads(optimizer)))
    x, y = next(data())
    F.mse_loss(model(x), y).backward()
    expected = grads(optimizer)
    optimizer.step()
    assert len(seen) == 2
    for found in (*seen, grads(optimizer)):
        assert_equal(found, expected)


@pytest.mark.parametrize("closed", [False, True])
def test_an_exception_in_the_update_leaves_gradients_as_they_are(closed):
    """What else it leaves alone, and the next step: tests/test_faults.py."""

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            if closure is not None:
                closure()
            raise OSError("full")

    model = lora_net()
    optimizer = climbing(model, Failing)
    x, y = next(data())
    closure = closure_of(optimizer, lambda: F.mse_loss(model(x), y))
    closure()
    before = grads(optimizer)
    with pytest.raises(OSError):
        optimizer.step(closure if closed else None)
    assert_equal(grads(optimizer), before)


def test_after_detaching_the_optimizer_goes_on_with_the_trained():
    model = lora_net()
    optimizer = climbing(model, torch.optim.AdamW)
    detach_auxiliary(model)
    x, y = next(data())
    before = [p.detach().clone() for p in trained(model)]
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(trained(model), before, strict=True))


def test_metrics_say_how_far_the_perturbation_is_from_its_bound():
    model = lora_net()
    optimizer = climbing(model, lr=5.0, rho=0.01)
    assert {name: float(value) for name, value in optimizer.metrics().items()} == {
        "loss_rise": 0,
        "perturbation_to_rho": 0,
        "clipped_share": 0,
    }
    train(model, optimizer, data(3))
    assert float(optimizer.metrics()["perturbation_to_rho"]) == pytest.approx(1, rel=1e-4)
    assert float(optimizer.metrics()["clipped_share"]) == 1
    optimizer.rho = 1.0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, data(1))
    assert float(optimizer.metrics()["clipped_share"]) == 0.75


def test_metrics_of_two_methods_with_a_name_in_common():
    model = lora_net()
    optimizer = climbing(model, rho=1.0)
    both = LoRASAMOptimizer(optimizer, model, rho=0.1)
    train(model, both, data(2))
    found = {name: float(value) for name, value in both.metrics().items()}
    assert found["LoRASAMOptimizer.perturbation_to_rho"] == pytest.approx(1, rel=1e-5)
    own = {name: float(value) for name, value in optimizer.metrics().items()}
    assert own.items() <= found.items() and 0 < found["perturbation_to_rho"] < 1


def test_for_model_keeps_groups_and_gives_the_auxiliary_a_rate_of_its_own():
    model = lora_net()
    given = [{"params": trained(model)[:2], "lr": 0.3}, {"params": trained(model)[2:], "weight_decay": 0.2}]
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=0.1, params=given, auxiliary_lr=0.01, seed=0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.2, 0.0]
    with pytest.raises(ValueError, match="auxiliary_lr must be a finite number >= 0"):
        BiLoRAOptimizer.for_model(lora_net(), torch.optim.AdamW, lr=0.1, auxiliary_lr=-1.0)


def test_a_second_for_model_leaves_the_first_ones_auxiliary_out():
    model = lora_net()
    train(model, climbing(model), data(1))
    ours = {id(p) for p in trained(model)}
    optimizer = climbing(model)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == ours


def test_remove_takes_the_auxiliaries_off_and_those_of_a_successor_not():
    model = lora_net()
    names = set(dict(model.named_parameters()))
    first = climbing(model)
    train(model, first, data(1))
    second = climbing(model)
    first.remove()
    assert len(second.perturbation_parameters()) == 4
    second.remove()
    second.remove()
    assert set(dict(model.named_parameters())) == names


def test_a_state_whose_groups_do_not_ascend_is_refused():
    model = lora_net()
    optimizer = climbing(model)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("ascent", None)
    with pytest.raises(ValueError, match=r"ascend as \[False, False\], this optimizer's as \[False, True\]"):
        optimizer.load_state_dict(state)
    assert [bool(group.get("ascent")) for group in optimizer.param_groups] == [False, True]


def test_a_state_of_another_scaling_is_refused():
    state = climbing(lora_net(), alpha=4).state_dict()
    with pytest.raises(ValueError, match="scaling"):
        climbing(lora_net(), alpha=64).load_state_dict(state)


def test_a_removed_optimizer_takes_groups_as_its_base_does():
    model = lora_net()
    optimizer = climbing(model)
    optimizer.remove()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 3
