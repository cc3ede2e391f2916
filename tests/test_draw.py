"""Gaussian noise: its distribution, and the same noise on any number of threads."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from flatlora.kernels.draw import Draw, draw_gaussian, quadruples

M, N = 300, 700  # several chunks, the last of them smaller
STD = torch.rand(M, generator=torch.Generator().manual_seed(1)).double()
DRAW = Draw("gaussian", STD, 11)


@contextmanager
def threads_of_torch(count):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def drawn_by(count, dtype=torch.float32, weight=None):
    with threads_of_torch(count):
        return draw_gaussian(DRAW, N, weight, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_noise_does_not_depend_on_the_number_of_threads(dtype, weighted):
    weight = torch.randn(N, M).to(dtype).t() if weighted else None  # stored transposed, as Conv1D's is
    one, two, three = (drawn_by(count, dtype, weight) for count in (1, 2, 3))
    assert one.dtype == dtype and torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_standard_normal_row_by_row_and_column_by_column(dtype):
    unit = (drawn_by(2, dtype) / STD[:, None]).double()
    assert stats.kstest(unit.numpy().ravel(), "norm").pvalue > 1e-3
    for lines in (unit, unit.t()):
        correlations = torch.corrcoef(lines)  # chunks drawn alike would repeat rows
        assert (correlations - torch.eye(len(lines))).abs().max() < 6 / lines.shape[1] ** 0.5


def test_the_table_has_the_moments_of_normals():
    table = quadruples().double()
    assert (table.t() @ table / len(table) - torch.eye(4)).abs().max() < 1e-6
    for order in ("i", "ij", "ijl", "ijlm"):  # products of different elements, which independent ones have in the mean
        mean = torch.einsum(",".join(f"k{i}" for i in order) + f"->{order}", *[table] * len(order)) / len(table)
        assert mean[tuple(range(len(order)))].abs() < 1e-6
    assert (table**3).mean(0).abs().max() < 1e-5
    assert (table**4).mean(0) == pytest.approx([2.9953] * 4, abs=1e-4) and table.abs().max() < 3.85
    assert len(table.unique(dim=0)) == len(table)


@pytest.mark.parametrize("n", [4, 16, 64])
def test_sums_of_few_elements_are_normal(n):
    """What a model sees of the noise with equal inputs, the worst case of elements that are drawn together."""
    sums = draw_gaussian(Draw("gaussian", torch.ones(400_000), 5), n, None, torch.float32).sum(1) / n**0.5
    assert abs(stats.kurtosis(sums.numpy())) < 0.05  # of normals: a standard error of 0.008
    assert abs(stats.skew(sums.numpy())) < 0.02
    assert stats.kstest(sums[:20_000].numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (1, 200_001), (70_000, 1), (7, 40_000)])
def test_odd_shapes(shape):
    m, n = shape
    drawn = draw_gaussian(Draw("gaussian", torch.ones(m), 3), n, None, torch.float32)
    assert drawn.shape == shape and (m * n < 1000 or 0.98 < drawn.std() < 1.02)


def test_within_modes_that_make_other_tensors():
    with FakeTensorMode():
        fake = draw_gaussian(Draw("gaussian", torch.ones(100), 3), 80, torch.ones(100, 80), torch.float32)
    assert fake.shape == (100, 80)
    with torch.device("meta"):
        real = draw_gaussian(Draw("gaussian", torch.ones(100, device="cpu"), 3), 80, None, torch.float32)
    assert real.device.type == "cpu" and real.isfinite().all()


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_and_its_noise_are_rounded_once(dtype, weight_dtype):
    weight = None if weight_dtype is None else torch.randn(M, N).to(weight_dtype)
    noise = draw_gaussian(DRAW, N, None, torch.float32).double()
    exact = noise if weight is None else weight.double() + noise
    both = draw_gaussian(DRAW, N, weight, dtype)
    assert both.dtype == dtype
    # Half an ulp, and the float32 addition before it.
    assert ((both.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-6).all()
