"""Outputs, gradients and memory of perturbed layers, against autograd on a dense ``W' + ε`` in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, dense, noise_of, tokens, wrapped
from models import (
    MLP,
    TWO,
    IntLinear,
    ModuleLoRA,
    Net,
    ParameterLoRA,
    fc,
    one_layer,
    peft,
    quantised_mlp,
    tiny_gpt2,
    tiny_llama,
    trainable,
)
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from flatlora import GGPOOptimizer
from flatlora.kernels.draw import Draw, draw_gaussian, draw_low_rank
from flatlora.kernels.low_rank import Added, AddedTerms, added

KINDS = ["gaussian", "low_rank"]
FEW = {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"], "r": 4, "lora_alpha": 6}


def zeros(layer):
    """What `RowNoise` knows of a layer, without any noise."""
    std = torch.zeros(layer.shape[0])
    return None, std, std, std


def ggpo(model, noise="gaussian", sigma=0.5, lr=0.0, **options):
    """Loud noise, so that nothing passes because ε is small."""
    return wrapped(GGPOOptimizer, model, lr, sigma=sigma, noise=noise, seed=3, **options)


def grads_of(output, x, params):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return torch.autograd.grad((output * weights.to(output.dtype)).sum(), [x, *params])


def expected_of(model, optimizer, x):
    """What the layer `fc` answers at W' + ε."""
    weight, bias = dense(fc(model))
    return F.linear(x, weight + noise_of(optimizer)) + bias


def assert_computes(model, output, expected, x):
    """An output and its gradients by the input and by all that is trained."""
    assert_equal([output], [expected])
    assert_equal(grads_of(output, x, trainable(model)), grads_of(expected, x, trainable(model)))


def assert_equal(found, expected, tolerance=1e-10):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# --- draws --------------------------------------------------------------------------------------------------------


def test_draws_are_functions_of_their_seed():
    std = torch.rand(6).double()
    one = draw_gaussian(Draw("gaussian", std, 5), 4, None, torch.float64)
    assert torch.equal(one, draw_gaussian(Draw("gaussian", std, 5), 4, None, torch.float64))
    assert not torch.equal(one, draw_gaussian(Draw("gaussian", std, 6), 4, None, torch.float64))
    low, other = (draw_low_rank(Draw("low_rank", std, seed, 3), 4, torch.float64) for seed in (5, 6))
    assert_equal(low, draw_low_rank(Draw("low_rank", std, 5, 3), 4, torch.float64), 0)
    assert low[0].shape == (6, 3) and low[1].shape == (3, 4) and not torch.equal(low[1], other[1])


def test_rows_without_noise_keep_their_weight():
    std = torch.tensor([0.0, 0.1], dtype=torch.float64)
    weight = torch.randn(2, 300, dtype=torch.float64)
    both = draw_gaussian(Draw("gaussian", std, 1), 300, weight, torch.float64)
    assert torch.equal(both[0], weight[0]) and not torch.equal(both[1], weight[1])


# --- outputs and gradients equal the dense reference --------------------------------------------------------------


def opaque_peft():
    model = peft(Net(IntLinear(10, 7)), ["fc"], None)
    return model.double()


def trainable_base():
    model = one_layer()
    fc(model).base_layer.weight.requires_grad_(True)
    return model


CASES = {
    "lora": one_layer,
    "no bias": lambda: one_layer(bias=False),
    "rslora": lambda: one_layer(use_rslora=True),
    "trainable bias": lambda: one_layer(**{"bias": True}, adapters={"default": {"bias": "all"}}),
    "lora_bias": lambda: one_layer(lora_bias=True),
    "conv1d": lambda: one_layer(conv1d=True),
    "dora": lambda: one_layer(use_dora=True),
    "dora conv1d": lambda: one_layer(use_dora=True, conv1d=True),
    "two adapters": lambda: one_layer(adapters=TWO),
    "two adapters conv1d": lambda: one_layer(adapters=TWO, conv1d=True),
    "opaque base": opaque_peft,
    "trainable base": trainable_base,
    "hand-made": lambda: Net(ParameterLoRA(10, 7).double()),
    "hand-made transposed": lambda: Net(ParameterLoRA(10, 7, transposed=True).double()),
    "hand-made modules": lambda: Net(ModuleLoRA(10, 7).double()),
}


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_at_the_perturbed_weight(case, noise):
    model = CASES[case]()
    optimizer = ggpo(model, noise)
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    weight, bias = dense(fc(model))
    noise_matrix = noise_of(optimizer)
    assert noise_matrix.norm() > 0.2 * weight.norm()
    expected = F.linear(x, weight + noise_matrix) + bias
    output = model(x)
    assert_computes(model, output, expected, x)


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (4, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("case", ["lora", "two adapters", "conv1d", "hand-made"])
def test_inputs_of_every_rank(case, shape, noise):
    model = CASES[case]()
    optimizer = ggpo(model, noise)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = model(x)
    assert output.shape == (*shape[:-1], 10)
    assert_computes(model, output, expected_of(model, optimizer, x), x)


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("case", ["lora", "no bias"])
def test_strided_and_expanded_inputs(case, noise):
    model = CASES[case]()
    optimizer = ggpo(model, noise)
    for view in (lambda t: t.transpose(0, 1), lambda t: t[:, :1].expand(-1, 4, -1), lambda t: t[::2, 1:]):
        x = torch.randn(4, 5, 7, dtype=torch.float64, requires_grad=True)
        assert_computes(model, model(view(x)), expected_of(model, optimizer, view(x)), x)


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("adapters", [None, TWO], ids=["one", "two"])
def test_dropout_draws_from_the_global_stream_as_without_noise(adapters, noise):
    model = one_layer(adapters=adapters, lora_dropout=0.4)
    optimizer = ggpo(model, noise)
    layer, x = fc(model), torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(11)
    expected = layer.base_layer(x) + x @ noise_of(optimizer).t()
    for name in layer.active_adapters:
        dropped = F.dropout(x, 0.4)
        update = layer.lora_B[name].weight @ layer.lora_A[name].weight
        expected = expected + layer.scaling[name] * dropped @ update.t()
    after = torch.get_rng_state()
    torch.manual_seed(11)
    output = model(x)
    assert torch.equal(torch.get_rng_state(), after)
    assert_computes(model, output, expected, x)


@pytest.mark.parametrize("noise", KINDS)
def test_inputs_without_gradients(noise):
    model = one_layer(adapters=TWO)
    optimizer = ggpo(model, noise)
    x = torch.randn(4, 7, dtype=torch.float64)
    weight, bias = dense(fc(model))
    expected = F.linear(x, weight + noise_of(optimizer)) + bias
    found = torch.autograd.grad(model(x).sum(), trainable(model))
    assert_equal(found, torch.autograd.grad(expected.sum(), trainable(model)))
    clean = F.linear(x, weight) + bias
    for no_grad in (torch.no_grad, torch.inference_mode):
        with no_grad():
            assert_equal([model(x)], [clean])
    optimizer.remove()
    again = ggpo(model, noise, perturb_no_grad=True)
    for no_grad in (torch.no_grad, torch.inference_mode):
        with no_grad():
            assert_equal([model(x)], [F.linear(x, weight + noise_of(again)) + bias])


@pytest.mark.parametrize("noise", KINDS)
def test_a_first_forward_under_inference_mode_spoils_nothing(noise):
    model = one_layer()
    optimizer = ggpo(model, noise)
    x = torch.randn(4, 7, dtype=torch.float64)
    with torch.inference_mode():
        output = model(x)
    model(x).sum().backward()
    optimizer.step()
    assert fc(model).lora_A["default"].weight.grad is not None and output.isfinite().all()


@pytest.mark.parametrize("noise", KINDS)
def test_perturbation_follows_the_weights_as_they_train(noise):
    model = one_layer()
    optimizer = ggpo(model, noise, lr=0.05, beta=1.0)
    x = torch.randn(8, 7, dtype=torch.float64)
    before = noise_of(optimizer)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(noise_of(optimizer), before)
    assert_equal([model(x)], [expected_of(model, optimizer, x)])


def test_the_function_of_a_layer_is_its_plain_reference():
    """Of two trained terms and a given one, each with a scaling of its own; the second's gradients are made scaled."""
    torch.manual_seed(0)
    x, W, bias, *learned = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 7), (10, 7), (10,), (3, 7), (10, 3), (2, 7), (10, 2))
    )
    given = torch.randn(10, 4, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    plan = AddedTerms(torch.float64, (2.0, -0.5, 3.0), (given,), (1.0, 0.25), lambda weight: weight)
    outputs = [compute(plan, None, x, W.detach(), bias, *learned) for compute in (Added.apply, added)]
    assert_equal(*([output] for output in outputs))
    assert_equal(*(grads_of(output, x, [bias, *learned]) for output in outputs))
    first, second = (
        grads_of(added(replace(plan, grad_scale=grad_scale), None, x, W, bias, *learned), x, learned[2:])
        for grad_scale in ((1.0, 1.0), (1.0, 0.25))
    )
    assert_equal([first[0], 0.25 * first[1], 0.25 * first[2]], second)


# --- somebody listens in, or the base has a mind of its own -------------------------------------------------------


PARTS = {
    "base_layer": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "lora_dropout": lambda layer: layer.lora_dropout["default"],
}


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_parts_of_a_layer_fire(part, kind, noise):
    if kind.startswith("full") and part == "base_layer":
        pytest.skip("nothing in a frozen base has a gradient")
    model = one_layer()
    optimizer = ggpo(model, noise)
    x = torch.randn(4, 7, dtype=torch.float64)
    noise_matrix = noise_of(optimizer)  # a base that can only be applied would be called here
    calls = []
    module = PARTS[part](fc(model))
    register = getattr(module, f"register_{kind}_hook")
    register(lambda *args: calls.append(part))
    if part == "lora_dropout" and kind.startswith("full"):
        x.requires_grad_()
    weight, bias = dense(fc(model))
    output = model(x)
    output.sum().backward()
    assert calls == [part]
    assert_equal([output], [F.linear(x, weight + noise_matrix) + bias])


@pytest.mark.parametrize("noise", KINDS)
def test_a_hook_that_replaces_the_output_is_obeyed(noise):
    model = one_layer()
    optimizer = ggpo(model, noise)
    layer, x = fc(model), torch.randn(4, 7, dtype=torch.float64)
    layer.lora_B["default"].register_forward_hook(lambda module, args, output: output * 3)
    expected = layer.base_layer(x) + 3 * layer.scaling["default"] * layer.lora_B["default"].weight.matmul(
        layer.lora_A["default"].weight
    ).matmul(x.t()).t() + x @ noise_of(optimizer).t()  # fmt: skip
    assert_equal([model(x)], [expected])


@pytest.mark.parametrize("noise", KINDS)
def test_a_base_with_its_own_forward_keeps_it(noise):
    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    model = peft(Net(Doubling(7, 10)), ["fc"])
    x = torch.randn(4, 7, dtype=torch.float64)
    model.eval()
    clean = model(x)
    model.train()
    optimizer = ggpo(model, noise)
    assert_equal([model(x)], [clean + x @ noise_of(optimizer).t()])


@pytest.mark.parametrize("noise", KINDS)
def test_inputs_may_be_given_by_name(noise):
    class Named(ParameterLoRA):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    model = Net(Named(10, 7).double())
    optimizer = ggpo(model, noise)
    x = torch.randn(4, 7, dtype=torch.float64)
    expected = F.linear(x, model.fc.dense()[0] + noise_of(optimizer)) + model.fc.linear.bias
    assert_equal([model.fc(hidden_states=x)], [expected])


def test_a_call_without_input_fails_as_the_layers_own():
    model = one_layer()
    _optimizer = ggpo(model)
    with pytest.raises(TypeError, match="forward"):
        model.fc()


def test_a_forward_patched_before_is_called_and_restored():
    model = one_layer()
    layer = fc(model)
    own, calls = layer.forward, []

    def patched(x):
        calls.append(x.shape)
        return own(x)

    layer.forward = patched
    optimizer = ggpo(model)
    x = torch.randn(4, 7, dtype=torch.float64)
    assert_equal([model(x)], [expected_of(model, optimizer, x)])
    assert len(calls) == 1
    optimizer.remove()
    assert layer.forward is patched


# --- the fused path computes what PEFT computes -------------------------------------------------------------------


def run(model, ids):
    torch.manual_seed(2)
    output = model(input_ids=ids).logits
    output.float().square().mean().backward()
    grads = [p.grad.float() for p in trainable(model)]
    model.zero_grad()
    return [output.detach().float(), *grads]


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, False, 2e-5),
        (torch.bfloat16, False, 1e-1),
        (torch.float32, True, 1e-1),
        ("bf16 base", False, 1e-1),
        ("bf16 base", True, 1e-1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("build", "config"),
    [(tiny_llama, FEW), (tiny_llama, {**FEW, "dropout": 0.2}), (tiny_llama, {**FEW, "adapters": TWO}), (tiny_gpt2, {})],
    ids=["llama", "llama dropout", "llama two adapters", "gpt2"],
)
def test_without_noise_the_fused_path_equals_peft(build, config, dtype, autocast, tolerance, noise, monkeypatch):
    if dtype == "bf16 base":
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = build(None, **config)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in trainable(model)} == {torch.float32}
    else:
        model = build(dtype, **config)
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = run(model, ids)
        optimizer = ggpo(model, noise)
        calls = []
        monkeypatch.setattr(optimizer._source, "_deviations", lambda layer, _: calls.append(1) or zeros(layer))
        found = run(model, ids)
    assert calls
    assert_near(found, expected, tolerance)


@pytest.mark.parametrize("noise", KINDS)
def test_backward_under_autocast_is_that_outside(noise):
    model = one_layer().float()
    optimizer = ggpo(model, noise)
    x = torch.randn(5, 7, requires_grad=True)

    def gradients(autocast):
        loss = model(x).square().mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return grads_of(loss, x, trainable(model))

    assert_equal(gradients(True), gradients(False))
    assert optimizer.sigma > 0


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_the_base_refuses_is_refused(noise, training):
    model = one_layer().float().train(training)
    ggpo(model, noise)
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(5, 7, dtype=torch.bfloat16))


@pytest.mark.parametrize("noise", KINDS)
def test_another_adapter_between_layer_and_base_still_counts(noise):
    model = get_peft_model(MLP().double(), LoHaConfig(r=2, target_modules=["up"]), adapter_name="inner", mixed=True)
    model.add_adapter("outer", LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    model.base_model.set_adapter(["inner", "outer"])
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model.double().train()
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = model(x)
    params = [p for name, p in model.named_parameters() if "lora_" in name]
    GGPOOptimizer(torch.optim.SGD(params, 0.1), model, sigma=1e-12, noise=noise)
    torch.testing.assert_close(model(x), expected)


def fused_and_pefts(model, x, noise, monkeypatch):
    """Output and gradients with noise of size zero, and without a perturbation; the same elements are dropped."""

    def outcome():
        torch.manual_seed(5)
        output = model(x)
        return [output, *grads_of(output, x, trainable(model))]

    expected = outcome()
    optimizer = ggpo(model, noise)
    monkeypatch.setattr(optimizer._source, "_deviations", lambda layer, _: zeros(layer))
    return outcome(), expected


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_inputs_of_any_leading_shape(shape, bias, dropout, noise, monkeypatch):
    x = torch.randn(*shape, 7, dtype=torch.float64, requires_grad=True)
    assert_equal(*fused_and_pefts(one_layer(bias=bias, lora_dropout=dropout), x, noise, monkeypatch))


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("fp4", 1e-5), ("int8", 3e-2)])
@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_without_noise_quantised_layers_equal_peft(kind, tolerance, noise, dropout, monkeypatch):
    x = torch.randn(3, 5, 64, requires_grad=True)
    model = quantised_mlp(kind, lora_dropout=dropout)
    # int8 also rounds its input, where it computes itself.
    assert_near(*fused_and_pefts(model, x, noise, monkeypatch), tolerance)


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_layers_compute_at_the_perturbed_weight(kind, noise):
    model = quantised_mlp(kind)
    optimizer = ggpo(model, noise)
    layer = model.base_model.model.up
    name = next(name for name in optimizer.row_std() if name.endswith("up"))
    x = torch.randn(5, 64, requires_grad=True)
    params = [p for p in layer.parameters() if p.requires_grad]
    expected = F.linear(x.double(), dense(layer)[0] + noise_of(optimizer, name, torch.float32).double())
    output = layer(x)
    tolerance = 1e-5 if kind == "nf4" or noise == "gaussian" else 3e-2
    assert_near([output, *grads_of(output, x, params)], [expected, *grads_of(expected, x, params)], tolerance)


# --- compilation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_gives_the_eager_result(backend, noise):
    model = one_layer()
    ggpo(model, noise)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    output = model(x)
    expected = [output, *grads_of(output, x, trainable(model))]
    torch._dynamo.reset()
    output = torch.compile(model, backend=backend)(x)
    assert_equal([output, *grads_of(output, x, trainable(model))], expected, 1e-12)
