"""Inside other people's training loops: Accelerate, the Hugging Face Trainer, TRL."""

from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import adamw, adapters, base_state, difference, epsilon, frozen, ggpo, outputs, tokens
from models import lora_mlp, tiny_llama, trainable
from peft import PeftModel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import flatlora.perturbation
from flatlora import GGPOOptimizer

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]


@pytest.fixture
def draws(monkeypatch):
    """The seed of every Gaussian ε that is formed, in order."""
    seeds = []
    draw = flatlora.perturbation.products.draw_gaussian

    def recorded(what, *args):
        seeds.append(what.seed)
        return draw(what, *args)

    monkeypatch.setattr(flatlora.perturbation.products, "draw_gaussian", recorded)
    return seeds


def fill_adapters(model):
    """Makes B nonzero, so that every gradient and every row norm takes part from the first step on."""
    generator = torch.Generator().manual_seed(11)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.05, generator=generator)
    return model


# --- Accelerate ----------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield lambda: accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    reset()


def accelerated(accelerator, wrapped=True, **kwargs):
    """Everything prepared, and a function that trains for a number of batches from a given one on."""
    model = lora_mlp(dropout=0.0)
    base = adamw(model, weight_decay=0.1)
    optimizer = ggpo(model, base, **kwargs) if wrapped else base
    x, y = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    scheduler = CosineAnnealingLR(optimizer, 12)
    raw = optimizer
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    def run(batches):
        for i, (x, y) in enumerate(loader):
            if i not in batches:
                continue
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - y).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    return SimpleNamespace(model=model, raw=raw, optimizer=optimizer, scheduler=scheduler, run=run)


def test_accelerate_prepares_the_wrapper_and_keeps_it_linked(accelerator):
    acc = accelerator()
    got = accelerated(acc)
    assert got.optimizer.optimizer is got.raw and isinstance(got.raw.base_optimizer, torch.optim.AdamW)
    assert got.optimizer.param_groups is got.raw.base_optimizer.param_groups
    assert {id(p) for p in trainable(got.model)} == {id(p) for p in got.raw.param_groups[0]["params"]}
    before = adapters(got.model)
    got.run(range(4))
    assert difference(before, adapters(got.model)) is not None
    assert got.scheduler.get_last_lr()[0] == got.raw.base_optimizer.param_groups[0]["lr"] < 1e-2


def test_accelerate_without_noise_is_the_base_optimizer(accelerator):
    results = []
    for wrapped in (False, True):
        got = accelerated(accelerator(), wrapped, sigma=0.0)
        got.run(range(12))
        results.append((adapters(got.model), base_state(got.raw)))
    assert difference(*results) is None


def test_accelerate_accumulation_has_one_noise_per_step(accelerator, draws):
    got = accelerated(accelerator())
    got.run(range(12))
    layers, passes = 2, 2  # forward and backward each form ε
    assert len(draws) == 12 * layers * passes - 12  # the first layer's input needs no gradient
    assert len(set(draws)) == 6 * layers


def test_accelerate_save_state_and_load_state_resume_bit_identically(accelerator, tmp_path):
    straight = accelerated(accelerator())
    straight.run(range(12))

    acc = accelerator()
    first = accelerated(acc)
    first.run(range(6))
    acc.save_state(str(tmp_path))

    acc = accelerator()
    second = accelerated(acc, seed=99)
    acc.load_state(str(tmp_path))
    second.run(range(6, 12))
    assert difference(adapters(straight.model), adapters(second.model)) is None
    assert difference(straight.raw.state_dict(), second.raw.state_dict()) is None
    assert difference(outputs(straight.model), outputs(second.model)) is None


def test_the_models_mode_counts_whatever_accelerate_tells_the_optimizer(accelerator):
    got = accelerated(accelerator())
    noisy = outputs(got.model)
    got.optimizer.eval()
    got.model.eval()
    assert difference(noisy, outputs(got.model)) is not None
    got.model.train()  # the optimizer is not told, as after `Trainer.evaluate()`
    assert difference(noisy, outputs(got.model)) is None


def test_train_and_eval_reach_a_base_that_has_them():
    class Switching(torch.optim.SGD):
        mode = None

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    model = lora_mlp()
    base = Switching(trainable(model), lr=0.1)
    optimizer = GGPOOptimizer(base, model)
    optimizer.eval()
    assert base.mode == "eval"
    optimizer.train()
    assert base.mode == "train"


# --- Trainer -------------------------------------------------------------------------------------------------------


def dataset(first, count):
    return [{"input_ids": ids, "labels": ids} for ids in (tokens(i, batch=1)[0] for i in range(first, first + count))]


def trainer_of(model, optimizer, path, **kwargs):
    arguments = {
        "output_dir": str(path),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "seed": 3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **kwargs,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments),
        train_dataset=dataset(0, 16),
        eval_dataset=dataset(100, 4),
        optimizers=(optimizer, None),
    )


def fresh(wrapped=True, **kwargs):
    model = fill_adapters(tiny_llama(dropout=0.1))
    base = adamw(model, weight_decay=0.1)
    return model, ggpo(model, base, **{"sigma": 0.3, **kwargs}) if wrapped else base


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of the Trainer with a checkpoint half way."""
    path = tmp_path_factory.mktemp("trainer")
    model, optimizer = fresh()
    before = frozen(model)
    trainer = trainer_of(model, optimizer, path)
    trainer.train()
    return SimpleNamespace(model=model, optimizer=optimizer, trainer=trainer, path=path, before=before)


def test_trainer_trains_under_noise_and_leaves_the_base_alone(finished, tmp_path):
    assert finished.trainer.state.global_step == 6
    assert difference(finished.before, frozen(finished.model)) is None
    model, bare = fresh(wrapped=False)
    plain = trainer_of(model, bare, tmp_path)
    plain.train()
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (finished.trainer, plain)
    ]
    assert len(losses[0]) == 6 and all(a != b for a, b in zip(*losses, strict=True))
    rates = [
        [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (finished.trainer, plain)
    ]
    assert rates[0] == rates[1] and len(set(rates[0])) > 3


def test_trainer_without_noise_is_the_base_optimizer(tmp_path):
    results = []
    for wrapped in (False, True):
        model, optimizer = fresh(wrapped, sigma=0.0)
        trainer = trainer_of(model, optimizer, tmp_path, save_strategy="no")
        trainer.train()
        log = [
            {key: value for key, value in entry.items() if not key.endswith(("runtime", "per_second"))}
            for entry in trainer.state.log_history
        ]
        results.append((adapters(model), base_state(optimizer), log))
    assert difference(*results) is None


def next_noise(run):
    run.optimizer.train()
    run.model.train()
    torch.manual_seed(0)  # for dropout
    return outputs(run.model)


def test_trainer_resumes_from_a_checkpoint_bit_identically(finished, tmp_path):
    model, optimizer = fresh(seed=1234)
    trainer = trainer_of(model, optimizer, tmp_path)
    trainer.train(resume_from_checkpoint=str(finished.path / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert difference(adapters(finished.model), adapters(model)) is None
    assert difference(finished.optimizer.state_dict(), optimizer.state_dict()) is None
    expected, found = next_noise(finished), next_noise(SimpleNamespace(model=model, optimizer=optimizer))
    assert difference(expected, found) is None
    assert difference(finished.optimizer.row_std(), optimizer.row_std()) is None


def test_trainer_evaluates_and_saves_the_model_without_noise(finished, tmp_path):
    from safetensors.torch import load_file

    last = finished.path / "checkpoint-6"
    evaluated = [entry["eval_loss"] for entry in finished.trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3
    plain = PeftModel.from_pretrained(tiny_llama().unload(), str(last))
    clean = trainer_of(plain, None, tmp_path).evaluate()["eval_loss"]
    assert evaluated[-1] == clean == finished.trainer.evaluate()["eval_loss"]

    tiny_llama().save_pretrained(tmp_path / "peft")
    saved, expected = (load_file(folder / "adapter_model.safetensors") for folder in (last, tmp_path / "peft"))
    assert {key: value.shape for key, value in saved.items()} == {key: v.shape for key, v in expected.items()}
    for name, value in adapters(finished.model).items():
        assert torch.equal(saved[name.replace(".default", "")], value)


@pytest.mark.parametrize("reentrant", [False, True])
def test_trainer_with_gradient_checkpointing_is_the_same_run(tmp_path, draws, reentrant):
    results, counts = [], []
    for checkpointing in (False, True):
        draws.clear()
        model, optimizer = fresh()
        options = {"use_reentrant": reentrant} if checkpointing else None
        trainer = trainer_of(
            model,
            optimizer,
            tmp_path,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=options,
            save_strategy="no",
            eval_strategy="no",
            max_steps=3,
        )
        trainer.train()
        results.append((adapters(model), outputs(model.eval())))
        counts.append(len(draws))
        assert len(set(draws)) == 3 * 7  # one ε per step and layer, over micro-batches and recomputation
    assert counts[1] >= counts[0] + 3 * 2 * 7  # it did recompute
    torch.testing.assert_close(results[0], results[1])


def test_trainer_takes_a_checkpoint_of_the_bare_base_with_a_warning(tmp_path, caplog):
    model, bare = fresh(wrapped=False)
    trainer_of(model, bare, tmp_path).train()
    model, optimizer = fresh()
    trainer = trainer_of(model, optimizer, tmp_path)
    with caplog.at_level(logging.WARNING, logger="flatlora"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "no GGPO part" in caplog.text
    assert trainer.state.global_step == 6


def test_remove_after_training_leaves_a_plain_peft_model(tmp_path):
    model, optimizer = fresh()
    trainer_of(model, optimizer, tmp_path, save_strategy="no", eval_strategy="no", max_steps=2).train()
    assert any(e.abs().max() > 0 for e in epsilon(plain_dropout(model)).values())
    optimizer.train()
    optimizer.remove()
    assert all(torch.equal(e, torch.zeros_like(e)) for e in epsilon(model).values())
    assert all("forward" not in module.__dict__ for name, module in model.named_modules() if name.endswith("_proj"))


def plain_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


# --- TRL -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="with a CUDA build of torch, TRL asks triton for a driver, and there is no GPU",
)
def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    texts = [" ".join(f"w{i}" for i in tokens(k, batch=1)[0].tolist()) for k in range(8)]
    model, optimizer = fresh()
    before, start = frozen(model), adapters(model)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
        trainer.train()
    assert trainer.state.global_step == 2
    assert difference(before, frozen(model)) is None and difference(start, adapters(model)) is not None
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["flatlora"].keys() == {
        "GGPOOptimizer"
    }
