"""Lightning: its two ways of optimization, fits that follow one another, its finder, averages, files and loggers."""

from __future__ import annotations

import pytest
import torch
from helpers import adapters, difference, frozen, loss_of, perturbation
from methods import over
from models import lora_mlp, trainable
from torch import nn

from flatlora import BiLoRAOptimizer, attach_auxiliary, remove_perturbation

lightning = pytest.importorskip("lightning")
callback = pytest.importorskip("flatlora.lightning").FlatLoRACallback
pytestmark = pytest.mark.filterwarnings("ignore")


class Tuned(lightning.LightningModule):
    """An MLP under the optimizer that `make` builds, with a learning rate that Lightning may look for."""

    def __init__(self, make):
        super().__init__()
        self.model, self.make, self.lr = lora_mlp(), make, 1e-2

    def training_step(self, batch, i):
        return loss_of(self.model, i)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(list(range(4)), batch_size=1)

    def configure_optimizers(self):
        return self.make(self.model, self.lr)


def bare(model, lr):
    return torch.optim.AdamW(trainable(model), lr=lr)


def made_by(kind):
    return lambda model, lr: over(kind, model, lambda params: torch.optim.AdamW(params, lr=lr))


METHODS = {kind: made_by(kind) for kind in ("gaussian", "LoRASAM", "Bi-LoRA")}


@pytest.fixture(params=METHODS)
def make(request):
    """A function of a model and a learning rate that makes an optimizer of one method."""
    return METHODS[request.param]


def trainer(path, **kwargs):
    defaults = {"max_epochs": 1, "logger": False, "accelerator": "cpu"}
    return lightning.Trainer(
        default_root_dir=path, enable_progress_bar=False, enable_model_summary=False, **{**defaults, **kwargs}
    )


# --- the two ways of optimization ---------------------------------------------------------------------------------


class ByHand(Tuned):
    """The same under manual optimization, in steps of two batches, with its gradients clipped."""

    def __init__(self, make, algorithm):
        super().__init__(make)
        self.automatic_optimization, self.algorithm = False, algorithm

    def training_step(self, batch, i):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, i) / 2)
        if i % 2:
            self.clip_gradients(
                optimizer, gradient_clip_val=CLIP[self.algorithm], gradient_clip_algorithm=self.algorithm
            )
            optimizer.step()
            optimizer.zero_grad()


CLIP = {"norm": 0.3, "value": 0.01}


def loop(make, algorithm, precision):
    """The adapters after a plain loop."""
    module = Tuned(make)
    optimizer = make(module.model, module.lr)
    for i in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.training_step(None, i) / 2
        loss.backward()
        if i % 2:
            if algorithm == "norm":
                nn.utils.clip_grad_norm_(trainable(module.model), CLIP["norm"])
            else:
                nn.utils.clip_grad_value_(trainable(module.model), CLIP["value"])
            optimizer.step()
            optimizer.zero_grad()
    return adapters(module.model)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", CLIP)
def test_a_fit_is_the_loop_it_stands_for(make, algorithm, precision, tmp_path):
    """To the bit: accumulation, both kinds of clipping, both precisions, automatic and manual optimization."""
    expected = loop(make, algorithm, precision)
    module = Tuned(make)
    base = frozen(module.model)
    clipping = {"gradient_clip_val": CLIP[algorithm], "gradient_clip_algorithm": algorithm}
    common = {"precision": precision, "enable_checkpointing": False}
    trainer(tmp_path, accumulate_grad_batches=2, **clipping, **common).fit(module)
    assert difference(expected, adapters(module.model)) is None
    assert difference(base, frozen(module.model)) is None

    manual = ByHand(make, algorithm)
    trainer(tmp_path, **common).fit(manual)
    assert difference(expected, adapters(manual.model)) is None


# --- one fit after another ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["the same trainer", "a new trainer"])
def test_a_second_fit(make, again, tmp_path):
    module = Tuned(make)
    first = trainer(tmp_path, enable_checkpointing=False)
    first.fit(module)
    before = adapters(module.model)
    second = trainer(tmp_path, enable_checkpointing=False) if again == "a new trainer" else first
    second.fit_loop.max_epochs = 2
    second.fit(module)
    assert difference(before, adapters(module.model)) is not None
    assert perturbation(module.model) > 0


def test_the_learning_rate_finder_and_then_a_fit(make, tmp_path):
    from lightning.pytorch.tuner import Tuner

    module = Tuned(make)
    one = trainer(tmp_path, enable_checkpointing=False)
    Tuner(one).lr_find(module, num_training=6, attr_name="lr")
    one.fit(module)
    assert perturbation(module.model) > 0


def test_a_fit_resumes_to_the_bit(make, tmp_path):
    def fit(epochs, path, checkpoint=None):
        torch.manual_seed(3)
        module = Tuned(make)
        one = trainer(path)
        one.fit_loop.max_epochs = epochs
        one.fit(module, ckpt_path=checkpoint)
        one.save_checkpoint(path / "last.ckpt")
        return adapters(module.model)

    straight = fit(2, tmp_path / "straight")
    fit(1, tmp_path / "cut")
    assert difference(straight, fit(2, tmp_path / "resumed", tmp_path / "cut" / "last.ckpt")) is None


# --- averages, files, loggers -------------------------------------------------------------------------------------


def averaging(kind):
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    if kind == "EMA":
        return EMAWeightAveraging(decay=0.5)
    return StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)


class Attached(Tuned):
    """With an auxiliary from the start, so that it is in the copy that averages weights."""

    def __init__(self):
        super().__init__(self.around)
        primary = trainable(self.model)
        self.groups = [{"params": primary}, {"params": attach_auxiliary(self.model, seed=1), "ascent": True}]

    def around(self, model, lr):
        return BiLoRAOptimizer(torch.optim.AdamW(self.groups, lr=lr), model)


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_averaged_weights_are_those_of_the_plain_model(make, kind, tmp_path):
    module = Attached() if make is METHODS["Bi-LoRA"] else Tuned(make)
    start = adapters(module.model)
    one = trainer(tmp_path, max_epochs=3, enable_checkpointing=False, callbacks=[averaging(kind)])
    one.fit(module)
    now = adapters(module.model)
    assert not [name for name, value in start.items() if torch.equal(value, now[name]) or not value.isfinite().all()]
    x = torch.randn(3, 32)
    module.eval()
    clean = module.model(x)
    remove_perturbation(module.model)
    assert torch.equal(clean, module.model(x))


def test_a_checkpoint_loads_strictly_without_a_method_and_one_without_under_it(make, tmp_path):
    module = Tuned(make)
    one = trainer(tmp_path)
    one.fit(module)
    one.save_checkpoint(tmp_path / "method.ckpt")
    torch.load(tmp_path / "method.ckpt", weights_only=True)  # holds nothing that only this library could load
    plain = Tuned.load_from_checkpoint(tmp_path / "method.ckpt", make=bare, strict=True)
    assert difference(dict(plain.state_dict()), dict(module.state_dict())) is None

    one = trainer(tmp_path)
    one.fit(plain)
    one.save_checkpoint(tmp_path / "bare.ckpt")
    module.load_state_dict(torch.load(tmp_path / "bare.ckpt", weights_only=True)["state_dict"], strict=True)
    x = torch.randn(3, 32)
    assert torch.equal(module.eval().model(x), plain.eval().model(x))


class Kept(lightning.pytorch.loggers.logger.DummyLogger):
    """Keeps what it is sent."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def log_metrics(self, metrics, step=None):
        self.sent.append((step, dict(metrics)))


def test_the_callback_logs_the_metrics_once_every_few_steps(make, tmp_path):
    module, logger, reads = Tuned(make), Kept(), []

    def counted(model, lr):
        optimizer = make(model, lr)
        plain = optimizer.metrics
        optimizer.metrics = lambda: reads.append(1) or plain()
        return optimizer

    module.make = counted
    one = trainer(
        tmp_path, max_epochs=3, accumulate_grad_batches=2, logger=logger, log_every_n_steps=3,
        enable_checkpointing=False, callbacks=[callback()],
    )  # fmt: skip
    one.fit(module)
    ours = [(step, sent) for step, sent in logger.sent if any(key.startswith("flatlora/") for key in sent)]
    assert [step for step, _ in ours] == [3, 6] and len(reads) == 2
    expected = {f"flatlora/{name}": float(value) for name, value in one.optimizers[0].metrics().items()}
    assert ours[-1][1] == pytest.approx(expected, rel=1e-5, nan_ok=True) and expected


def test_the_callbacks_numbers_are_in_tensorboards_files(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    one = trainer(tmp_path, logger=logger, log_every_n_steps=2, enable_checkpointing=False, callbacks=[callback()])
    one.fit(Tuned(METHODS["gaussian"]))
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("flatlora/noise_to_weight")] == [2, 4]
