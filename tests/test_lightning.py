"""Lightning: fits that follow one another, its learning-rate finder, and weight averaging."""

from __future__ import annotations

import pytest
import torch
from ecosystem import adapters, difference, epsilon, lora_mlp, loss_of, trained

from flatlora import BiLoRAOptimizer, GGPOOptimizer, remove_perturbation

lightning = pytest.importorskip("lightning")
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


def ggpo(model, lr):
    return GGPOOptimizer(torch.optim.AdamW(trained(model), lr=lr), model, sigma=0.2, seed=1)


def bilora(model, lr):
    return BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=lr, seed=1)


METHODS = [ggpo, bilora]


def trainer(path, **kwargs):
    return lightning.Trainer(
        default_root_dir=path, max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("make", METHODS)
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
    assert max(float(e.abs().max()) for e in epsilon(module.model).values()) > 0


@pytest.mark.parametrize("make", METHODS)
def test_the_learning_rate_finder_and_then_a_fit(make, tmp_path):
    from lightning.pytorch.tuner import Tuner

    module = Tuned(make)
    one = trainer(tmp_path, enable_checkpointing=False)
    Tuner(one).lr_find(module, num_training=6, attr_name="lr")
    one.fit(module)
    assert max(float(e.abs().max()) for e in epsilon(module.model).values()) > 0


@pytest.mark.parametrize("make", METHODS)
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


def test_averaged_weights_are_those_of_the_plain_model(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = Tuned(ggpo)
    one = trainer(tmp_path, enable_checkpointing=False, callbacks=[EMAWeightAveraging(decay=0.5)])
    one.fit(module)
    x = torch.randn(3, 32)
    module.eval()
    clean = module.model(x)
    remove_perturbation(module.model)
    assert torch.equal(clean, module.model(x))
