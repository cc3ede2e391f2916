"""hessian_top_eigenvalue against the eigenvalues of a dense Hessian."""

import pytest
import torch
import torch.nn.functional as F
from helpers import lm_loss, tokens
from models import MLP, Net, ParameterLoRA, one_layer, peft, tiny_llama, trainable
from torch.func import functional_call

from flatlora import GGPOOptimizer, hessian_top_eigenvalue


def two_layers(**config):
    torch.manual_seed(1)
    return peft(MLP(6, 5, 4), ["up", "down"], r=2, **config)


def data(i=0):
    generator = torch.Generator().manual_seed(i)
    return [torch.randn(9, size, dtype=torch.float64, generator=generator) for size in (6, 4)]


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def eigenvalues(model, loss_fn, batches):
    """All of the Hessian of the mean loss by the trained parameters, formed whole."""
    model = model.eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = [(name, p.shape, p.numel()) for name, p in named.items()]

    class AsFunction(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = values

        def __call__(self, *args, **kwargs):
            return functional_call(model, self.values, args, kwargs)

    def mean_loss(flat):
        parts = flat.split([count for *_, count in shapes])
        values = {name: part.view(shape) for (name, shape, _), part in zip(shapes, parts, strict=True)}
        return sum(loss_fn(AsFunction(values), batch) for batch in batches) / len(batches)

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(mean_loss, flat))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_is_the_largest_of_the_dense_hessian(config):
    model, batches = two_layers(**config), [data(0), data(1)]
    found = hessian_top_eigenvalue(model, loss_fn, batches, tolerance=1e-4, iterations=500)
    model.eval()
    exact = eigenvalues(model, loss_fn, batches)
    assert found.converged and found.iterations < 500 and found.residual <= 1e-4 * abs(found.value)
    assert found.value == pytest.approx(float(exact[-1]), rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_negative_eigenvalue_is_not_taken_for_the_largest(sign):
    """With B at zero there are negative eigenvalues as well; of minus the loss the negative ones are the larger."""
    model = two_layers()
    if sign == 1:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(p)
    signed = lambda model, batch: sign * loss_fn(model, batch)  # noqa: E731
    found = hessian_top_eigenvalue(model, signed, [data()], tolerance=1e-4, iterations=3000)
    exact = eigenvalues(model, signed, [data()])
    assert exact[0] < 0 < exact[-1] and (sign == 1 or -exact[0] > exact[-1])
    assert found.converged and found.value == pytest.approx(float(exact[-1]), rel=1e-6)


def test_the_residual_bounds_the_error_before_convergence():
    model = two_layers()
    found = hessian_top_eigenvalue(model, loss_fn, [data()], tolerance=0.0, iterations=3)
    exact = eigenvalues(model, loss_fn, [data()])
    assert not found.converged and found.iterations == 3
    assert float((exact - found.value).abs().min()) <= found.residual
    again = hessian_top_eigenvalue(model, loss_fn, [data()], tolerance=0.0, iterations=3)
    assert again == found != hessian_top_eigenvalue(model, loss_fn, [data()], tolerance=0.0, iterations=3, seed=1)


def test_a_loss_that_is_linear_in_the_adapters_has_no_curvature():
    model = Net(ParameterLoRA(4, 6).double())
    model.fc.lora_A.requires_grad_(False)
    found = hessian_top_eigenvalue(model, lambda model, batch: model(batch[0]).sum(), [data()])
    assert (found.value, found.residual, found.converged) == (0.0, 0.0, True)


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_a_decoder_with_attention_and_a_quantised_base(quant):
    """The quantised model's Hessian is that of the model with the weights it stands for."""
    model = tiny_llama(quant=quant)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    found = hessian_top_eigenvalue(model, lm_loss, [tokens()], tolerance=0.01, iterations=200)
    assert found.converged and found.value > 0
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    if quant == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        dense = tiny_llama()
        for name, module in model.named_modules():
            if type(module).__name__ == "Linear4bit" and hasattr(module.weight, "quant_state"):
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                dense.get_submodule(name).weight.data.copy_(weight)
        others = {name: p for name, p in model.named_parameters() if p.dtype == torch.float32}
        assert not dense.load_state_dict(others, strict=False).unexpected_keys
        same = hessian_top_eigenvalue(dense, lm_loss, [tokens()], tolerance=0.01, iterations=200)
        assert found.value == pytest.approx(same.value, rel=1e-3)


def test_an_optimizer_on_the_model_does_not_disturb_it():
    model = two_layers()
    expected = hessian_top_eigenvalue(model, loss_fn, [data()])
    optimizer = GGPOOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, sigma=0.5)
    assert hessian_top_eigenvalue(model, loss_fn, [data()]) == expected
    optimizer.remove()


def test_no_grad_around_it_does_not_matter():
    model = two_layers()
    expected = hessian_top_eigenvalue(model, loss_fn, [data()])
    with torch.no_grad():
        assert hessian_top_eigenvalue(model, loss_fn, [data()]) == expected


def test_wrong_calls():
    model = one_layer(4, 6)
    for wrong in ({"batches": []}, {"iterations": 0}, {"tolerance": -1.0}, {"adapter": "other"}):
        with pytest.raises(ValueError):
            hessian_top_eigenvalue(model, loss_fn, **{"batches": [data()], **wrong})
    with pytest.raises(ValueError, match="requires a gradient"):
        hessian_top_eigenvalue(model.requires_grad_(False), loss_fn, [data()])
    with pytest.raises(ValueError, match="no adapted linear layer"):
        hessian_top_eigenvalue(torch.nn.Linear(6, 4), F.mse_loss, [data()])
