"""The Triton kernel that draws Gaussian noise, in Triton's interpreter, which needs no GPU.

Whether functions are interpreted is decided when triton is imported, so the tests are run in a process of their own.
The interpreter cuts float32 down to bfloat16 where a GPU rounds it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from models import lora_mlp
from scipy import stats

from flatlora import GGPOOptimizer, kernels
from flatlora.kernels import draw
from flatlora.kernels.draw import Draw, draw_gaussian, use_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, as the last test sets it")

M, N = 60, 2501
STD = torch.rand(M, generator=torch.Generator().manual_seed(1)).double() + 0.5
SEED = 2**62 + 12345


@pytest.fixture
def on_cpu(monkeypatch):
    from flatlora.kernels import triton_draw

    monkeypatch.setattr(triton_draw, "_LANES", 1 << 14)  # the interpreter takes as long for few as for many
    use_triton("cpu")
    yield triton_draw
    use_triton()


def drawn(seed=SEED, m=M, n=N, weight=None, dtype=torch.float32):
    return draw_gaussian(Draw("gaussian", STD[:m], seed), n, weight, dtype)


@interpreted
def test_noise_is_standard_normal_row_by_row_and_column_by_column(on_cpu):
    unit = (drawn() / STD[:, None]).double()
    assert stats.kstest(unit.numpy().ravel(), "norm").pvalue > 1e-3
    assert abs(unit.mean()) < 4 * unit.numel() ** -0.5
    assert abs(stats.kurtosis(unit.numpy().ravel())) < 4 * (24 / unit.numel()) ** 0.5
    assert unit.abs().max() > 4
    for lines in (unit, unit.t()):
        correlations = torch.corrcoef(lines) - torch.eye(len(lines))
        assert correlations.abs().max() < 6 / lines.shape[1] ** 0.5
    for shift in (1, 2, 3, 4):  # four are made of one counter
        assert abs((unit.view(-1)[shift:] * unit.view(-1)[:-shift]).mean()) < 4 * unit.numel() ** -0.5


@interpreted
@pytest.mark.parametrize("seed", [SEED + 1, SEED - 2**32, 5, 0])
def test_seeds_have_noise_of_their_own(seed, on_cpu):
    unit, other = (drawn(one) / STD[:, None] for one in (SEED, seed))
    assert abs((unit * other).mean()) < 4 * unit.numel() ** -0.5


@interpreted
@pytest.mark.parametrize("lanes", [256, 2048])
def test_noise_depends_on_the_seed_alone(lanes, on_cpu, monkeypatch):
    noise = drawn(m=9)
    monkeypatch.setattr(on_cpu, "_LANES", lanes)
    assert torch.equal(drawn(m=9), noise)


@interpreted
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_is_added_in_float32_and_rounded_once(stored, transposed, on_cpu):
    weight = torch.randn(M, N).to(stored)
    weight = weight.t().contiguous().t() if transposed else weight
    expected = weight.double() + drawn().double()
    for dtype, most in ((torch.float32, 2**-22), (torch.float16, 2**-11), (torch.bfloat16, 2**-7)):
        found = drawn(weight=weight, dtype=dtype)
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, rtol=most, atol=1e-6)


@interpreted
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (1, 70_001), (60, 1), (7, 1023)])
def test_odd_shapes(shape, on_cpu):
    m, n = shape
    noise = drawn(m=m, n=n)
    assert noise.shape == shape and noise.isfinite().all() and (m * n < 1000 or 0.4 < noise.std() < 1.6)


@interpreted
def test_a_step_has_one_noise_and_layers_and_steps_have_their_own(on_cpu):
    model = lora_mlp(width=48)
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer = GGPOOptimizer(base, model, sigma=0.5, seed=3)
    seen = []
    for _ in range(2):
        perturbation = optimizer.current_perturbation()
        noise = {name: draw_gaussian(eps, 48, None, torch.float32) for name, eps in perturbation.items()}
        layer = next(layer for layer in optimizer._source.layers.values() if layer.name in noise)
        (adapter,) = layer.adapters()
        W = layer.base.dense(torch.float32) + adapter.scaling * adapter.B @ adapter.A + noise[layer.name]
        x, g = torch.randn(8, 48, requires_grad=True), torch.randn(8, 48)
        out = layer.module(x)
        (grad,) = torch.autograd.grad(out, x, g)
        torch.testing.assert_close(out, x @ W.t() + layer.module.base_layer.bias, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad, g @ W, rtol=1e-4, atol=1e-4)
        seen += [eps / eps.std() for eps in noise.values()]
        model(torch.randn(2, 48)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == 4
    assert all(abs((a * b).mean()) < 0.1 for i, a in enumerate(seen) for b in seen[:i])


def test_it_is_off_until_it_is_asked_for():
    assert draw._triton_on == frozenset()


def test_without_triton_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "flatlora.kernels.triton_draw", raising=False)
    monkeypatch.delattr(kernels, "triton_draw", raising=False)
    with pytest.raises(ImportError, match="pip install triton"):
        use_triton("cuda")
    assert draw._triton_on == frozenset()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the tests above")
def test_all_of_it_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed: CPU builds of torch come without it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(result.stdout[-6000:], result.stderr[-2000:])
    assert result.returncode == 0
