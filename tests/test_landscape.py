"""landscape against closed forms and the other measures; its pictures are read back from the figure."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import dense, lm_loss, tokens
from models import one_layer, tiny_llama

from flatlora import (
    Landscape,
    hessian_top_eigenvalue,
    landscape,
    noise_rise,
    plot_landscape,
    weight_noise,
    worst_case_rise,
)


def quadratic():
    """A layer, a batch, and the matrix W' with its gradient G of ``½‖xW'ᵀ + b − y‖²``."""
    torch.manual_seed(0)
    model = one_layer(10, 7)
    x, y = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 10, dtype=torch.float64)
    weight, bias = (part.detach() for part in dense(model.base_model.model.fc))
    return model, (x, y), weight, (F.linear(x, weight, bias) - y).t() @ x


def loss_fn(model, batch):
    x, target = batch
    return 0.5 * (model(x) - target).square().sum()


def test_worst_line_is_a_parabola_along_the_gradient():
    model, batch, weight, grad = quadratic()
    found = landscape(model, loss_fn, [batch], directions=["worst"], reach=0.1, points=5)
    assert found.at == pytest.approx([-0.1, -0.05, 0, 0.05, 0.1]) and list(found.lines) == ["worst"]
    step = weight.norm() * grad / grad.norm()
    curvature = 0.5 * (batch[0] @ step.t()).square().sum()
    expected = [float(loss_fn(model, batch).detach() + t * (grad * step).sum() + t**2 * curvature) for t in found.at]
    assert found.lines["worst"] == pytest.approx(expected)
    rise = worst_case_rise(model, loss_fn, [batch], rho=0.1 * float(weight.norm()))
    assert found.lines["worst"][-1] - found.lines["worst"][2] == pytest.approx(rise)


def test_random_line_is_the_noise_of_weight_noise():
    model, batch, *_ = quadratic()
    found = landscape(model, loss_fn, [batch], directions=["random"], reach=0.1, points=3, seed=5)
    _, middle, above = found.lines["random"]
    with weight_noise(model.eval(), 0.1, seed=5):
        assert above == pytest.approx(float(loss_fn(model, batch)))
    assert middle == pytest.approx(float(loss_fn(model, batch)))
    curvatures = []  # of ±ε: the terms of odd order cancel
    for seed in range(16):
        line = landscape(model, loss_fn, [batch], directions=["random"], reach=0.1, points=3, seed=seed).lines["random"]
        curvatures.append((line[0] + line[2]) / 2 - line[1])
    rise = noise_rise(model, loss_fn, [batch], sigma=0.1, draws=200).rise
    assert min(curvatures) > 0 and sum(curvatures) / 16 == pytest.approx(rise, rel=0.5)


def test_plane_holds_the_lines_and_their_sums():
    model, batch, *_ = quadratic()
    apart = landscape(model, loss_fn, [batch], reach=0.1, points=3)
    found = landscape(model, loss_fn, [batch], plane=True, reach=0.1, points=3)
    for name in ("random", "worst"):
        assert found.lines[name] == pytest.approx(apart.lines[name])
    assert [row[1] for row in found.plane] == found.lines["random"] and found.plane[1] == found.lines["worst"]
    # A quadratic's mixed term changes its sign with one of the two.
    plane = torch.tensor(found.plane, dtype=torch.float64)
    centred = plane - plane[:, 1:2] - plane[1:2] + plane[1, 1]
    torch.testing.assert_close(centred[0, 0], -centred[0, 2], rtol=1e-4, atol=0)
    torch.testing.assert_close(centred[0, 0], centred[2, 2], rtol=1e-4, atol=0)


MEASURES = [noise_rise, worst_case_rise, landscape, hessian_top_eigenvalue]


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_model_is_as_it_was_after_an_exception(measure, quant):
    """A part of it in eval mode; all of it is, while it is measured."""
    model, modes = tiny_llama(quant=quant, dropout=0.1), []
    model.base_model.model.model.layers[0].mlp.eval()
    before = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    stream = torch.get_rng_state()

    def crash_later(model, ids):
        modes.append(any(module.training for module in model.modules()))
        if len(modes) == 3:
            raise KeyError("crash")
        return lm_loss(model, ids)

    with pytest.raises(KeyError, match="crash"):
        measure(model, crash_later, [tokens(0), tokens(1)])
    measure(model, lm_loss, [tokens(0)])
    assert not any(modes) and before == [module.training for module in model.modules()]
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("measure", MEASURES)
def test_progress_bars(measure, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    model, batch, *_ = quadratic()
    found = measure(model, loss_fn, [batch])
    assert capsys.readouterr().err == ""
    assert measure(model, loss_fn, [batch], progress=True) == found
    assert measure.__name__ in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        measure(model, loss_fn, [batch], progress=True)
    assert model.training


@pytest.mark.parametrize(
    "wrong",
    [
        {"directions": []},
        {"directions": ["up"]},
        {"directions": ["worst", "worst"]},
        {"directions": ["worst"], "plane": True},
        {"points": 4},
        {"points": 1},
        {"reach": 0.0},
        {"batches": []},
    ],
    ids=str,
)
def test_wrong_calls(wrong):
    model, batch, *_ = quadratic()
    with pytest.raises(ValueError):
        landscape(model, loss_fn, **{"batches": [batch], **wrong})
    assert model.training and "forward" not in model.base_model.model.fc.__dict__


# --- pictures -------------------------------------------------------------------------------------------------------

AT = [-0.1, 0.0, 0.1]


def test_lines_of_several_models_are_in_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    one = Landscape(AT, {"random": [3.0, 1.0, 2.0], "worst": [0.5, 1.0, 4.0]})
    other = Landscape(AT, {"random": [2.0, 1.5, 2.0], "worst": [1.0, 1.5, 9.0]})
    figure = plot_landscape({"one": one, "other": other}, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").stat().st_size > 1000
    for axes, name in zip(figure.axes, ("random", "worst"), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert set(lines) == {"one", "other"} == {text.get_text() for text in axes.get_legend().get_texts()}
        for model, found in (("one", one), ("other", other)):
            assert lines[model].get_xdata().tolist() == AT
            assert lines[model].get_ydata().tolist() == found.lines[name]
        assert axes.get_xlabel().startswith(f"{name} direction")


def test_contours_of_a_plane_are_in_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    at = [i / 20 for i in range(-10, 11)]
    plane = [[x**2 + 4 * y**2 for y in at] for x in at]
    found = Landscape(at, {"random": [x**2 for x in at], "worst": [4 * y**2 for y in at]}, plane)
    (axes,) = plot_landscape({"a model": found}, tmp_path / "plane.png").axes
    (contours,) = axes.collections
    assert (contours.levels[0], contours.levels[-1]) == pytest.approx((0, 1.25)) and axes.get_title() == "a model"
    for level, path in zip(contours.levels[3:-1], contours.get_paths()[3:-1], strict=True):
        x, y = path.vertices.T
        assert len(x) and x**2 + 4 * y**2 == pytest.approx(level, abs=0.01)


def test_pictures_that_can_not_be_drawn(tmp_path, monkeypatch):
    line, other = Landscape(AT, {"random": [1.0] * 3}), Landscape(AT, {"worst": [1.0] * 3})
    for results in ({}, {"a": line, "b": other}):
        with pytest.raises(ValueError, match="landscape"):
            plot_landscape(results, tmp_path / "none.png")
    lost = [[float("nan")] * 3] * 3
    with pytest.raises(ValueError, match="landscape 'a' has no finite loss"):
        plot_landscape({"a": Landscape(AT, {"random": lost[0], "worst": lost[0]}, lost)}, tmp_path / "none.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="flatlora\\[plot\\]"):
        plot_landscape({"a": line}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_what_is_no_dict_of_landscapes_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(TypeError, match=r"landscapes by name.*got Landscape"):
        plot_landscape(Landscape([0.0], {"random": [1.0]}), tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
