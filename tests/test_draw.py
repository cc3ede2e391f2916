"""Gaussian noise: its distribution, and the same noise on any number of threads."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from scipy import stats

from flatlora.kernels.draw import QUADRUPLES, Draw, draw_gaussian

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
    table = QUADRUPLES.double()
    assert table.mean(0).abs().max() < 1e-6
    assert (table.t() @ table / len(table) - torch.eye(4)).abs().max() < 1e-6
    third = torch.einsum("ki,kj,kl->ijl", table, table, table) / len(table)
    assert third.abs().max() < 1e-6
    assert (table**4).mean(0) == pytest.approx([2.9974] * 4, abs=1e-4) and table.abs().max() < 4.01
    assert len(table.unique(dim=0)) == len(table)


def test_what_a_model_sees_of_the_noise_is_normal():
    x = torch.randn(N, generator=torch.Generator().manual_seed(2)) ** 3  # a few large inputs
    seen = [draw_gaussian(Draw("gaussian", torch.ones(M), seed), N, None, torch.float32) @ x for seed in range(100)]
    seen = (torch.stack(seen) / x.norm()).flatten()  # 30,000
    assert stats.kstest(seen.numpy(), "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(seen.numpy())) < 6 * (24 / len(seen)) ** 0.5


def test_layers_of_one_row_and_of_none_are_drawn():
    wide = draw_gaussian(Draw("gaussian", torch.ones(1), 3), 100_000, None, torch.float32)
    assert wide.shape == (1, 100_000) and 0.98 < wide.std() < 1.02
    assert draw_gaussian(Draw("gaussian", torch.ones(0), 3), 5, None, torch.float32).shape == (0, 5)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_added_before_the_noise_is_rounded(dtype, weight_dtype):
    weight = None if weight_dtype is None else torch.randn(M, N).to(weight_dtype)
    noise = draw_gaussian(DRAW, N, None, torch.float32)
    expected = noise if weight is None else weight.float() + noise
    torch.testing.assert_close(draw_gaussian(DRAW, N, weight, dtype), expected.to(dtype), rtol=2**-7, atol=1e-6)
