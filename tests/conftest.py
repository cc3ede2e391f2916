"""Shared set-up: one thread, as the machine may be shared, and the same global random numbers for every test."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
