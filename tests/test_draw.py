"""Gaussian noise drawn on several threads: the same noise on any number of them, and no thread that others need."""

from __future__ import annotations

import multiprocessing
from contextlib import contextmanager

import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from flatlora.kernels.draw import Draw, draw_gaussian

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


def test_noise_is_standard_normal_row_by_row_and_chunk_by_chunk():
    unit = (drawn_by(2, torch.float64) / STD[:, None]).numpy()
    assert stats.kstest(unit.ravel(), "norm").pvalue > 1e-3
    correlations = torch.corrcoef(torch.from_numpy(unit))  # chunks with related generators would repeat rows
    assert (correlations - torch.eye(M)).abs().max() < 6 / N**0.5


def test_layers_of_one_row_and_of_none_are_drawn():
    wide = draw_gaussian(Draw("gaussian", torch.ones(1), 3), 100_000, None, torch.float32)
    assert wide.shape == (1, 100_000) and 0.98 < wide.std() < 1.02
    assert draw_gaussian(Draw("gaussian", torch.ones(0), 3), 5, None, torch.float32).shape == (0, 5)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_helping_threads_have_the_modes_of_the_one_that_draws(mode):
    expected = drawn_by(1)
    with mode():
        assert torch.equal(drawn_by(3), expected)


def draw_into(queue):
    queue.put(drawn_by(2).double().sum().item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes can't be forked here")
def test_a_forked_process_draws_with_threads_of_its_own():
    expected = drawn_by(2).double().sum().item()  # the pool has threads now, which a fork does not have
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=draw_into, args=(queue,), daemon=True)
    process.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        process.kill()
        process.join()


class Noises(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return drawn_by(2)


def test_a_dataloaders_workers_draw():
    expected = drawn_by(2)
    for batch in DataLoader(Noises(), num_workers=2, batch_size=1, timeout=60):
        assert torch.equal(batch[0], expected)
