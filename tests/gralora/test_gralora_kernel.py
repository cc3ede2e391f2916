"""The kernel of GraLoRA's product against its plain reference, and over a graph that has gone stale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatlora import apply_gralora
from flatlora.kernels.blocks import AddBlocks, BlockOptions, add_blocks


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("moved", ["gralora_A", "gralora_B"])
@pytest.mark.parametrize("over", ["own base", "hooked base"])
def test_backward_through_parameters_that_have_moved_is_refused(autocast, moved, over):
    model = apply_gralora(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)), ["0"], r=4, k=2)
    if over == "hooked base":
        model[0].base_layer.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(torch.randn(3, 16)).float().square().sum()
    with torch.no_grad():
        getattr(model[0], moved).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", ["weight", "out", "in place"])
def test_the_kernel_is_its_reference(mode):
    k, r, m, n, how = 2, 4, 6, 8, BlockOptions(1.5, torch.float64, mode == "in place")
    x, W, bias, A, B, out = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 3, n), (m, n), (m,), (k, n // k, r), (k, r, m // k), (2, 3, m)]
    )

    def fused(x, A, B, bias, out):
        if mode == "weight":
            return AddBlocks.apply(how, x, A, B, None, W.detach(), bias)
        return AddBlocks.apply(how, x, A, B, out.clone(), None, None)

    def reference(x, A, B, bias, out):
        return add_blocks(how, x, A, B, F.linear(x, W.detach(), bias) if mode == "weight" else out)

    inputs = (x, A, B, bias, out)
    torch.testing.assert_close(fused(*inputs), reference(*inputs))
    upstream = torch.randn(2, 3, m, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(function(*inputs), inputs, upstream, allow_unused=True) for function in (fused, reference)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    used = (x, A, B, bias) if mode == "weight" else (x, A, B, out)
    assert torch.autograd.gradcheck(
        (lambda *i: fused(*i, None)) if mode == "weight" else (lambda x, A, B, out: fused(x, A, B, None, out)), used
    )
