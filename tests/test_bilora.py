"""Bi-LoRA against dense references, torch's own `maximize`, and everything around it that must not notice."""

from __future__ import annotations

import copy
import os
import pickle
import socket

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import leave_together
from models import quantise
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from flatlora import (
    BiLoRAOptimizer,
    GGPOOptimizer,
    LoRASAMOptimizer,
    attach_auxiliary,
    detach_auxiliary,
    lora_layers,
    noise_rise,
    worst_case_rise,
)

bnb = pytest.importorskip("bitsandbytes")
SIZES = (12, 16, 8)


class Net(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.up = nn.Linear(sizes[0], sizes[1])
        self.down = nn.Linear(sizes[1], sizes[2])

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def lora_net(dtype=torch.float64, seed=0, sizes=SIZES, base="float", **config):
    torch.manual_seed(seed)
    net = Net(sizes).to(dtype)
    if base != "float":
        quantise(net, base)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["up", "down"], **config}
    model = get_peft_model(net, LoraConfig(**config), autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return model.train()


def primary(model):
    return [p for name, p in model.named_parameters() if "lora_" in name and "ascent_branches" not in name]


def groups(model, aux):
    return [{"params": primary(model)}, {"params": aux, "ascent": True, "weight_decay": 0.0}]


def held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


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
            h = F.linear(torch.tanh(h) if i else h, w + 2.0 * b1 @ a1 + 1.5 * b2 @ a2, b)
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


def test_below_rho_nothing_is_scaled():
    model = lora_net()
    twin = copy.deepcopy(model)
    aux, twin_aux = attach_auxiliary(model, r=2, seed=0), attach_auxiliary(twin, r=2, seed=0)
    train(model, BiLoRAOptimizer(torch.optim.SGD(groups(model, aux), lr=1e-3), model, rho=1e6), data(4))
    bare = torch.optim.SGD([{"params": primary(twin)}, {"params": twin_aux, "maximize": True}], lr=1e-3)
    train(twin, bare, data(4))
    assert_equal([*primary(model), *aux], [*primary(twin), *twin_aux])


@pytest.mark.parametrize("scale", [1.0, 2.0**8])
def test_a_scaled_gradient_survives_float16_autocast(scale):
    """Computed in float16 it is 2⁻²⁰ of its size only once it is in its parameter's float32."""
    model = lora_net(torch.float32)
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, seed=0)
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


def test_gradients_keep_their_sign_for_whoever_reads_them_after_the_step():
    model = lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, seed=0)
    x, y = next(data())
    F.mse_loss(model(x), y).backward()
    before = [p.grad.clone() for p in held(optimizer)]
    optimizer.step()
    assert_equal([p.grad for p in held(optimizer)], before)


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
    bare = cls([{"params": primary(twin)}, {"params": twin_aux, "weight_decay": 0.0}], lr=1e-3)
    batches = list(data(3, sizes, dtype=torch.float32))
    train(model, optimizer, batches)
    for x, y in batches:
        F.mse_loss(twin(x), y).backward()
        for p in twin_aux:
            p.grad.neg_()
        bare.step()
        bare.zero_grad()
    assert_equal([*primary(model), *aux], [*primary(twin), *twin_aux])


def test_accumulation_equals_the_whole_batch():
    results = []
    for parts in (1, 4):
        model = lora_net()
        optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, seed=0)
        for x, y in data(5, rows=8):
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.mse_loss(model(xs), ys) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(held(optimizer))
    for whole, accumulated in zip(*results, strict=True):
        torch.testing.assert_close(whole, accumulated, rtol=0, atol=1e-10)


def test_gradient_norm_and_clipping_are_those_of_the_primary_alone():
    model = lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=1e-2, seed=0)
    x, y = next(data())
    F.mse_loss(model(x), y).backward()
    down = len(primary(model))
    grads = [p.grad.clone() for p in held(optimizer)]
    ours = float(torch.cat([grad.flatten() for grad in grads[:down]]).norm())
    assert float(torch.cat([grad.flatten() for grad in grads[down:]]).norm()) * 2**20 > 0.1 * ours
    before = [p.detach().clone() for p in held(optimizer)]
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], ours / 4)
    assert float(norm) == pytest.approx(ours, rel=1e-9)
    optimizer.step()
    for i, (p, old, grad) in enumerate(zip(held(optimizer), before, grads, strict=True)):
        lr = -1e-2 if i < down else 1e-2 * 2**20  # which the auxiliary's gradients are scaled by
        torch.testing.assert_close(p.detach(), old + lr * grad / 4, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_gradient_vanishes_in_half_precision(dtype):
    """An auxiliary's gradients of 1e-4 and less are there at the step, whatever the type of its factors."""
    model = lora_net(torch.float32).to(dtype)
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.0, seed=0)
    x, y = next(data(dtype=dtype))
    (F.mse_loss(model(x), y) * 1e-3).backward()
    seen = []
    optimizer.base_optimizer.register_step_pre_hook(
        lambda base, *_: seen.extend(p.grad.clone() for p in base.param_groups[-1]["params"])
    )
    optimizer.step()
    B = [grad for grad in seen if grad.shape[1] == 8]
    assert all(float((grad == 0).float().mean()) < 0.2 for grad in B)


def test_a_step_that_grad_scaler_skips_changes_nothing():
    model = lora_net(torch.float32)
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, seed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = next(data(dtype=torch.float32))
    for overflow in (False, True):
        before = [p.detach().clone() for p in held(optimizer)]
        scaler.scale(F.mse_loss(model(x), y)).backward()
        if overflow:
            held(optimizer)[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(torch.equal(p, old) for p, old in zip(held(optimizer), before, strict=True)) == overflow
        assert all(p.isfinite().all() for p in held(optimizer))


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
        return [loss, *torch.autograd.grad(loss, [*primary(model), *aux])]

    ours = loss_and_grads()
    detach_auxiliary(model)
    inner = model.base_model.model
    for layer, a, b in zip((inner.up, inner.down), aux[::2], aux[1::2], strict=True):
        layer.register_forward_hook(lambda _m, args, out, a=a, b=b: out + 2.0 * args[0] @ a.t() @ b.t())
    for mine, theirs in zip(ours, loss_and_grads(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("base", ["float", "bf16", "nf4", "int8"])
def test_the_base_stays_bit_identical_and_the_loss_falls(base):
    sizes = (64, 128, 64)
    dtype = torch.bfloat16 if base == "bf16" else torch.float32
    model = lora_net(dtype, sizes=sizes, base="float" if base == "bf16" else base)
    optimizer = BiLoRAOptimizer.for_model(model, bnb.optim.AdamW8bit, lr=1e-2, seed=0)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k and isinstance(v, torch.Tensor)}
    x, y = next(data(1, sizes, dtype=dtype))
    losses = []
    for _ in range(50):
        losses.append(float(F.mse_loss(model(x), y).detach()))
        train(model, optimizer, [(x, y)])
        with torch.no_grad():  # an evaluation in between
            model.eval()(x)
        model.train()
    assert losses[-1] < 0.9 * losses[0]
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in frozen.items())


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


def test_weight_noise_goes_on_top():
    model = lora_net(torch.float32)
    x, _ = next(data(dtype=torch.float32))
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, seed=0)
    clean = model(x)
    both = GGPOOptimizer(optimizer, model, sigma=0.1, seed=0)
    assert not torch.allclose(clean, model(x))
    train(model, both, data(3, dtype=torch.float32))
    state = copy.deepcopy(both.state_dict())
    assert state["flatlora"].keys() == {"GGPOOptimizer", "BiLoRAOptimizer"}
    noisy, norm = model(x), both.perturbation_norm()
    train(model, both, data(1, dtype=torch.float32))
    adapters = copy.deepcopy(state["flatlora"]["BiLoRAOptimizer"]["layers"])
    both.load_state_dict(state)
    assert both.perturbation_norm() == norm
    assert not torch.equal(model(x), noisy)  # the primary moved on
    assert_equal(held(optimizer)[-1:], [list(adapters.values())[-1]["B"]])
    both.remove()
    detach_auxiliary(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


# --- the auxiliary exists only while training ---------------------------------------------------------------------


def test_eval_saving_and_merging_never_see_it(tmp_path):
    model = lora_net(torch.float32)
    keys = list(model.state_dict())
    x, _ = next(data(dtype=torch.float32))
    rng = torch.get_rng_state()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, rho=5.0)
    assert torch.equal(rng, torch.get_rng_state())
    train(model, optimizer, data(5, dtype=torch.float32))
    trained = model(x)
    evaluated = model.eval()(x)
    assert not torch.allclose(trained, evaluated)
    saved = get_peft_model_state_dict(model)
    assert len(saved) == 4
    assert all("lora_" in key for key in saved)
    model.save_pretrained(tmp_path / "during")
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any("ascent" in key for key in merged.state_dict())
    torch.testing.assert_close(merged.train()(x), evaluated)

    detach_auxiliary(model)
    detach_auxiliary(model)
    assert torch.equal(model(x), evaluated)
    assert torch.equal(model.train()(x), evaluated)
    assert list(model.state_dict()) == keys
    assert not any("forward" in module.__dict__ for module in model.modules())
    model.save_pretrained(tmp_path / "after")
    for name in os.listdir(tmp_path / "after"):
        assert (tmp_path / "during" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_disabled_adapters_are_the_base_model():
    model = lora_net()
    x, _ = next(data())
    with model.disable_adapter():
        base = model(x)
    aux = attach_auxiliary(model, seed=0)
    with torch.no_grad():
        aux[1].fill_(1.0)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert not torch.allclose(model(x), base)


def test_it_is_registered_and_goes_with_the_model():
    model = lora_net(torch.float32)
    aux = attach_auxiliary(model, seed=0)
    assert {id(p) for p in aux} <= {id(p) for p in model.parameters()}
    model.double()
    assert all(p.dtype == torch.float64 for p in aux)
    clone, clone_aux = pickle.loads(pickle.dumps((model, aux)))
    x, _ = next(data())
    before = model(x)
    with torch.no_grad():
        for p in (*aux, *clone_aux):
            p.fill_(0.5)
    assert torch.equal(clone(x), clone.eval()(x))  # no copy of a model is perturbed
    assert not torch.allclose(model(x), before)


def test_a_sequential_model_goes_on_as_it_was():
    model = nn.Sequential(lora_net().base_model.model.up, nn.Tanh())
    x, _ = next(data())
    before = model(x)
    attach_auxiliary(model, seed=0)
    torch.testing.assert_close(model(x), before)  # B is zero at first
    detach_auxiliary(model)
    assert len(model) == 2


def test_resume_is_bit_identical_from_adapter_and_optimizer_alone(tmp_path):
    """As the Trainer does it: the adapter's own checkpoint and `optimizer.state_dict()`, in a new model."""

    def make():
        model = lora_net(torch.float32)
        return model, BiLoRAOptimizer.for_model(model, bnb.optim.AdamW8bit, lr=1e-2, rho=0.3)

    batches = list(data(6, dtype=torch.float32))
    straight, optimizer = make()
    train(straight, optimizer, batches)

    first, half = make()
    train(first, half, batches[:3])
    torch.save(half.state_dict(), tmp_path / "optimizer.pt")
    second, resumed = make()
    set_peft_model_state_dict(second, get_peft_model_state_dict(first))
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(second, resumed, batches[3:])
    assert_equal(straight.parameters(), second.parameters())
    assert optimizer.perturbation_norm() == resumed.perturbation_norm() > 0


def test_an_adapter_that_comes_later_does_not_freeze_the_auxiliary():
    """PEFT then freezes all that is not its own and makes what it is asked to train train again."""
    model = lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, rho=0.3)
    model.add_adapter("later", LoraConfig(r=2, target_modules=["up"]))
    before = [p.detach().clone() for p in optimizer.perturbation_parameters()]
    train(model, optimizer, data(2))
    moved = [not torch.equal(p, old) for p, old in zip(optimizer.perturbation_parameters(), before, strict=True)]
    assert all(moved)


def ddp_worker(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = lora_net()
    torch.manual_seed(100 + rank)  # ranks that were seeded apart
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, rho=0.3)
    ddp = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match="before DistributedDataParallel"):
        attach_auxiliary(ddp)
    train(ddp, optimizer, [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in data(4, rows=8)])
    results[rank] = [p.detach().clone() for p in held(optimizer)]
    leave_together()


def test_two_processes_share_the_auxiliary():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(ddp_worker, args=(port, results), nprocs=2)
        first, second = results[0], results[1]
    model = lora_net()
    torch.manual_seed(100)
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, rho=0.3)
    train(model, optimizer, data(4, rows=8))
    assert_equal(first, second)
    for one, alone in zip(first, held(optimizer), strict=True):
        torch.testing.assert_close(one, alone.detach(), rtol=0, atol=1e-9)


# --- flatness -----------------------------------------------------------------------------------------------------


def test_worst_case_rise_is_the_formed_ascent_step():
    model = lora_net()
    x, y = next(data())
    rise = worst_case_rise(model, lambda m, batch: F.mse_loss(m(batch[0]), batch[1]), [(x, y)], rho=0.5)
    weights, biases = [], []
    for layer in lora_layers(model):
        adapter, base = layer.adapters()[0], layer.base.module
        weights.append((base.weight + 2.0 * adapter.B @ adapter.A).detach().requires_grad_())
        biases.append(base.bias)

    def loss(w):
        return F.mse_loss(F.linear(torch.tanh(F.linear(x, w[0], biases[0])), w[1], biases[1]), y)

    grads = torch.autograd.grad(loss(weights), weights)
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    stepped = loss([w + 0.5 * grad / norm for w, grad in zip(weights, grads, strict=True)])
    assert rise == pytest.approx(float(stepped - loss(weights)), rel=1e-9)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


def sam_step(model, optimizer, loss_fn, rho):
    """The two-pass step of sharpness-aware minimisation (arXiv:2010.01412) on A and B, as LoRA-SAM takes it."""
    loss_fn(model).backward()
    params = [p for p in held(optimizer) if p.grad is not None]
    up = [p.grad * (rho / torch.cat([q.grad.flatten() for q in params]).norm()) for p in params]
    with torch.no_grad():
        torch._foreach_add_(params, up)
    optimizer.zero_grad()
    loss_fn(model).backward()
    with torch.no_grad():
        torch._foreach_sub_(params, up)
    optimizer.step()
    optimizer.zero_grad()


def test_the_loss_rise_of_lora_sam_and_bilora(capsys):
    """Fits partly wrong labels with each method and prints how sharp the minima are, per unit of training loss."""

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    table = {name: [] for name in ("LoRA", "LoRA-SAM", "Bi-LoRA")}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(64, 20, generator=generator), torch.randint(0, 4, (64,), generator=generator)
        for name, row in table.items():
            model = lora_net(torch.float32, seed, (20, 48, 4), r=8, lora_alpha=16)
            optimizer = torch.optim.AdamW(primary(model), lr=5e-3)
            if name == "Bi-LoRA":
                optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=5e-3, seed=seed)
            for _ in range(60):
                if name == "LoRA-SAM":
                    sam_step(model, optimizer, lambda m, x=x, y=y: loss_fn(m, (x, y)), rho=0.05)
                else:
                    loss_fn(model, (x, y)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            worst = worst_case_rise(model, loss_fn, [(x, y)], rho=0.3)
            norm = sum(float(layer.base.row_sq().sum()) for layer in lora_layers(model)) ** 0.5
            random = noise_rise(model, loss_fn, [(x, y)], sigma=0.3 / norm, draws=16)
            assert worst > random.rise  # no random step of that length climbs as far as the steepest one
            row.append((random.loss, worst))
    with capsys.disabled():
        print("\nmethod    training loss   rise under a worst-case step of length 0.3")
        for name, row in table.items():
            print(f"{name:9s} {sum(r[0] for r in row) / 3:13.4f}   {sum(r[1] for r in row) / 3:8.4f}")


# --- bad input ----------------------------------------------------------------------------------------------------


def traces(model):
    return list(model.state_dict()), [module for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: attach_auxiliary(m, r=0), "r must be an integer"),
        (lambda m: attach_auxiliary(m, alpha=-1.0), "alpha must be"),
        (lambda m: attach_auxiliary(m, adapter="other"), "unknown adapter.*default"),
        (lambda m: attach_auxiliary(Net(SIZES)), "no adapted linear layer"),
        (lambda m: (m.merge_adapter(), attach_auxiliary(m)), "merged adapters.*unmerge"),
        (lambda m: BiLoRAOptimizer(torch.optim.SGD(primary(m), lr=0.1), m), "no auxiliary.*attach_auxiliary"),
        (lambda m: BiLoRAOptimizer.for_model(m, torch.optim.SGD, lr=0.1, rho=0.0), "rho must be a finite number > 0"),
        (lambda m: BiLoRAOptimizer.for_model(m, torch.optim.SGD, lr=-1.0), "Invalid learning rate"),
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
        BiLoRAOptimizer(torch.optim.SGD(make(primary(model), aux), lr=0.1), model)


def test_twice_and_the_state_of_another_model():
    model = lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, seed=0)
    before = traces(model)
    with pytest.raises(ValueError, match=r"has an auxiliary already.*detach_auxiliary"):
        attach_auxiliary(model)
    assert traces(model) == before
    other = BiLoRAOptimizer.for_model(lora_net(sizes=(12, 18, 8)), torch.optim.SGD, lr=0.1, seed=1)
    aux = [p.detach().clone() for p in optimizer.param_groups[1]["params"]]
    with pytest.raises(ValueError, match=r"another model.*shapes"):
        optimizer.load_state_dict(other.state_dict())
    assert_equal(optimizer.param_groups[1]["params"], aux)
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer instance"):
        BiLoRAOptimizer(torch.optim.SGD, model)


# --- gradients have their own sign for everyone but the update -----------------------------------------------------


def signs(optimizer):
    return [p.grad.clone() for group in optimizer.param_groups if group.get("ascent") for p in group["params"]]


def test_step_hooks_see_gradients_as_they_are():
    model = lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, seed=0)
    with torch.no_grad():
        for p in optimizer.perturbation_parameters():
            p.add_(0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(signs(optimizer)))
    optimizer.register_step_post_hook(lambda *_: seen.append(signs(optimizer)))
    x, y = next(data())
    F.mse_loss(model(x), y).backward()
    expected = signs(optimizer)
    optimizer.step()
    assert len(seen) == 2
    for found in (*seen, signs(optimizer)):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("closed", [False, True])
def test_an_exception_in_the_update_leaves_gradients_as_they_are(closed):
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if closure is not None:
                closure()
            if self.fails:
                self.fails = False
                raise OSError("full")
            return super().step()

    model, twin = lora_net(), lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, Failing, lr=0.1, seed=0)
    other = BiLoRAOptimizer.for_model(twin, torch.optim.SGD, lr=0.1, seed=0)
    x, y = next(data())

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    closure()
    before = signs(optimizer)
    with pytest.raises(OSError):
        optimizer.step(closure if closed else None)
    assert all(torch.equal(one, other) for one, other in zip(signs(optimizer), before, strict=True))
    optimizer.step()
    F.mse_loss(twin(x), y).backward()
    other.step()
    assert_equal(held(optimizer), held(other))


def test_after_detaching_the_optimizer_goes_on_with_the_primary():
    model = lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=0.1, seed=0)
    detach_auxiliary(model)
    x, y = next(data())
    before = [p.detach().clone() for p in primary(model)]
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(primary(model), before, strict=True))


def test_metrics_say_how_far_the_perturbation_is_from_its_bound():
    model = lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=5.0, rho=0.01, seed=0)
    assert {name: float(value) for name, value in optimizer.metrics().items()} == {
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
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, rho=1.0, seed=0)
    both = LoRASAMOptimizer(optimizer, model, rho=0.1)
    train(model, both, data(2))
    found = {name: float(value) for name, value in both.metrics().items()}
    assert found["LoRASAMOptimizer.perturbation_to_rho"] == pytest.approx(1, rel=1e-5)
    own = {name: float(value) for name, value in optimizer.metrics().items()}
    assert own.items() <= found.items() and 0 < found["perturbation_to_rho"] < 1


def test_for_model_keeps_groups_and_gives_the_auxiliary_a_rate_of_its_own():
    model = lora_net()
    given = [{"params": primary(model)[:2], "lr": 0.3}, {"params": primary(model)[2:], "weight_decay": 0.2}]
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=0.1, params=given, auxiliary_lr=0.01, seed=0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.2, 0.0]
    with pytest.raises(ValueError, match="auxiliary_lr must be a finite number >= 0"):
        BiLoRAOptimizer.for_model(lora_net(), torch.optim.AdamW, lr=0.1, auxiliary_lr=-1.0)


def test_a_second_for_model_leaves_the_first_ones_auxiliary_out():
    model = lora_net()
    train(model, BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, seed=0), data(1))
    ours = {id(p) for p in primary(model)}
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, seed=0)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == ours


def test_remove_takes_the_auxiliaries_off_and_those_of_a_successor_not():
    model = lora_net()
    names = set(dict(model.named_parameters()))
    first = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, seed=0)
    train(model, first, data(1))
    second = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, seed=0)
    first.remove()
    assert len(second.perturbation_parameters()) == 4
    second.remove()
    second.remove()
    assert set(dict(model.named_parameters())) == names


def test_a_state_whose_groups_do_not_ascend_is_refused():
    model = lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("ascent", None)
    with pytest.raises(ValueError, match=r"ascend as \[False, False\], this optimizer's as \[False, True\]"):
        optimizer.load_state_dict(state)
    assert [bool(group.get("ascent")) for group in optimizer.param_groups] == [False, True]


def test_a_state_of_another_scaling_is_refused():
    state = BiLoRAOptimizer.for_model(lora_net(), torch.optim.SGD, lr=0.1, alpha=4).state_dict()
    with pytest.raises(ValueError, match="scaling"):
        BiLoRAOptimizer.for_model(lora_net(), torch.optim.SGD, lr=0.1, alpha=64).load_state_dict(state)


def test_a_removed_optimizer_takes_groups_as_its_base_does():
    model = lora_net()
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    optimizer.remove()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 3
