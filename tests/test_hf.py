"""The Trainer's factories, the calls beside PEFT's `create_loraplus_optimizer`, and numbers in the Trainer's logs."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adapters, difference, tokens
from methods import weights
from models import WIDE, lora_mlp, tiny_llama
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
hf = pytest.importorskip("flatlora.hf")

from peft.optimizers import create_loraplus_optimizer  # noqa: E402

from flatlora import BilevelOptimizer, BiLoRAOptimizer, GGPOOptimizer, LoRASAMOptimizer  # noqa: E402
from flatlora.bilora.auxiliary import auxiliaries_of  # noqa: E402
from flatlora.metrics import read_metrics  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
needs_factories = pytest.mark.skipif(
    "is_optimizer_factory" not in vars(transformers.trainer), reason="this transformers calls no factories"
)


def rows(first, count):
    ids = [tokens(i, 1)[0] for i in range(first, first + count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(path, **kwargs):
    defaults = {
        "output_dir": str(path), "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "weight_decay": 0.1, "logging_steps": 1, "save_steps": 2, "seed": 3, "use_cpu": True,
        "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**defaults, **kwargs})


def trainer_of(model, path, arguments_=None, **kwargs):
    return transformers.Trainer(model, arguments_ or arguments(path), train_dataset=rows(0, 16), **kwargs)


def inside(trainer):
    """The optimizer that the Trainer holds, without Accelerate's wrapper."""
    return trainer.optimizer.optimizer


FACTORIES = [
    (hf.GGPOFactory, GGPOOptimizer, {"sigma": 0.2, "seed": 1}),
    (hf.BiLoRAFactory, BiLoRAOptimizer, {"rho": 0.1, "seed": 1}),
    (hf.LoRASAMFactory, LoRASAMOptimizer, {"rho": 0.1}),
]
BY_CALL = {
    GGPOOptimizer: hf.create_ggpo_optimizer,
    BiLoRAOptimizer: hf.create_bilora_optimizer,
    LoRASAMOptimizer: hf.create_lorasam_optimizer,
}


# --- factories ----------------------------------------------------------------------------------------------------


@needs_factories
@pytest.mark.parametrize(("factory", "method", "options"), FACTORIES)
def test_the_trainer_builds_the_optimizer_and_resumes_it_to_the_bit(factory, method, options, tmp_path):
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, **options}
    straight = trainer_of(tiny_llama(), tmp_path / "a", optimizer_cls_and_kwargs=(factory, kwargs))
    straight.train()
    assert type(inside(straight)) is method and kwargs == {"lr": 1e-2, "weight_decay": 0.1, **options}

    model = tiny_llama()
    built = BY_CALL[method](model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, **options)
    by_hand = trainer_of(model, tmp_path / "b", optimizers=(built, None))
    by_hand.train()
    assert difference(weights(straight.model), weights(model)) is None

    resumed = trainer_of(tiny_llama(), tmp_path / "c", optimizer_cls_and_kwargs=(factory, kwargs))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert difference(weights(straight.model), weights(resumed.model)) is None
    assert difference(inside(straight).state_dict(), inside(resumed).state_dict()) is None


@needs_factories
def test_bidora_is_built_and_reaches_both_levels(tmp_path):
    model = tiny_llama(use_dora=True)
    start = adapters(model)
    validation = torch.utils.data.DataLoader(rows(50, 4), batch_size=2)
    kwargs = {
        "lr": 1e-2,
        "magnitude_lr": 2e-2,
        "val_dataloader": validation,
        "weight_decay": 0.1,
        "difference": "forward",
    }
    trainer = trainer_of(model, tmp_path, optimizer_cls_and_kwargs=(hf.BiDoRAFactory, kwargs))
    trainer.train()
    optimizer = inside(trainer)
    assert type(optimizer) is BilevelOptimizer and optimizer.difference == "forward"
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-2, 1e-2, 2e-2]
    assert not [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, start[name])]


@needs_factories
@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit", "schedule_free_adamw", "adafactor", "rmsprop"])
def test_without_a_method_it_is_the_trainers_own_optimizer(optim, tmp_path):
    """By name, with optim_args, from the TrainingArguments alone: groups, numbers and the whole run are the same."""
    if optim == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    found = []
    for factory in (None, hf.GGPOFactory):
        torch.manual_seed(0)
        model = tiny_llama(width=WIDE if "8bit" in optim else 32)
        model.base_model.model.model.norm.weight.requires_grad_(True)  # is not decayed
        args = arguments(
            tmp_path / str(factory), optim=optim, optim_args="momentum=0.5" if optim == "rmsprop" else None,
            adam_beta2=0.95, max_steps=2, lr_scheduler_type="constant", save_strategy="no",
        )  # fmt: skip
        chosen = {} if factory is None else {"optimizer_cls_and_kwargs": (factory, {"args": args, "sigma": 0.0})}
        trainer = trainer_of(model, None, args, **chosen)
        trainer.train()
        groups = copy.deepcopy([{**group, "params": len(group["params"])} for group in inside(trainer).param_groups])
        found.append((adapters(model), groups, repr(inside(trainer))))
    assert difference(*found) is None


@needs_factories
def test_a_class_and_options_of_ones_own_are_taken_too(tmp_path):
    kwargs = {"args": arguments(tmp_path), "optim": torch.optim.SGD, "lr": 0.5, "momentum": 0.9, "sigma": 0.1}
    trainer = trainer_of(tiny_llama(), tmp_path, optimizer_cls_and_kwargs=(hf.GGPOFactory, kwargs))
    optimizer = trainer.create_optimizer()
    assert type(optimizer.base_optimizer) is torch.optim.SGD
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.9, 0.1),
        (0.5, 0.9, 0.0),
    ]


@pytest.mark.parametrize(
    ("optim", "optim_args", "package"),
    [
        ("ademamix", None, "bitsandbytes"),
        ("ademamix", "alpha=8", "bitsandbytes"),
        ("schedule_free_adamw", None, "schedulefree"),
        ("rmsprop", "alpha=0.5", "torch"),
    ],
)
def test_bilora_options_are_not_the_base_optimizers(optim, optim_args, package, tmp_path):
    """AdEMAMix and RMSprop have an `alpha`, schedule-free AdamW an `r`, and so has the auxiliary."""
    pytest.importorskip(package)
    model, plain = tiny_llama(), tiny_llama()
    args = arguments(tmp_path, optim=optim, optim_args=optim_args)
    optimizer = hf.BiLoRAFactory()(model, args, r=4)
    assert {(one.A.shape[0], one.scaling) for one in auxiliaries_of(model)} == {(4, 2.0)}
    trainers_own = trainer_of(plain, None, args).create_optimizer()
    assert type(optimizer.base_optimizer) is type(trainers_own)
    found = [{**it.defaults, "weight_decay": None} for it in (optimizer, trainers_own)]  # which the groups have
    assert difference(*found) is None


def test_optim_args_are_not_dropped_beside_a_class():
    with pytest.raises(ValueError, match=r"optim_args='momentum=0.5' is not read where optim is a class; give SGD's"):
        hf.GGPOFactory()(lora_mlp(), optim=torch.optim.SGD, lr=0.1, optim_args="momentum=0.5")


def test_bidora_says_who_runs_the_training_batches():
    with pytest.raises(TypeError, match="takes no train_dataloader: the Trainer, or your loop"):
        hf.create_bidora_optimizer(
            lora_mlp(use_dora=True), torch.optim.SGD, lr=0.1, train_dataloader=[0], val_dataloader=[0]
        )


def test_called_with_the_trainers_arguments_as_axolotl_does(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch", adam_beta2=0.95, learning_rate=0.3)
    optimizer = hf.LoRASAMFactory()(tiny_llama(), args, rho=0.2)
    assert type(optimizer.base_optimizer) is torch.optim.AdamW and optimizer.rho == 0.2
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [(0.3, (0.9, 0.95))] * 2


@needs_factories
def test_model_init_has_an_optimizer_made_for_each_model(tmp_path):
    trainer = trainer_of(
        None,
        tmp_path,
        model_init=lambda: tiny_llama(),
        optimizer_cls_and_kwargs=(hf.BiLoRAFactory, {"lr": 1e-2, "seed": 0}),
    )
    trainer.train()
    first = trainer.model
    trainer.train()
    assert trainer.model is not first and len(inside(trainer).perturbation_parameters()) > 0
    held = {id(p) for group in inside(trainer).param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({}, ValueError, 'no learning rate.*"args": args'),
        ({"lr": 1e-2, "optim": "adamw"}, ValueError, "adamw.*adamw_torch"),
        ({"lr": 1e-2, "optim": "lomo"}, (ImportError, ValueError), "LOMO|lomo"),
        ({"lr": 1e-2, "sigma": -1.0}, ValueError, "sigma must be"),
        ({"lr": 1e-2, "sigmma": 1.0}, TypeError, "sigmma"),
        ({"lr": 1e-2, "weight_decay": 0.1, "loraplus_lr_ratio": 4.0}, ValueError, "loraplus_weight_decay"),
    ],
)
def test_bad_entries_attach_nothing(kwargs, error, words):
    model = lora_mlp()
    with pytest.raises(error, match=words):
        hf.GGPOFactory()(model, **kwargs)
    assert not [module for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("factory", [hf.GGPOFactory, hf.BiLoRAFactory, hf.LoRASAMFactory, hf.BiDoRAFactory])
def test_a_trainer_that_calls_no_factories_is_refused_by_name(factory):
    groups = [{"params": list(lora_mlp().parameters())}]
    with pytest.raises(RuntimeError, match=rf"transformers .*optimizers=\({factory.create.__name__}\(model"):
        factory(groups, lr=1e-2, sigma=0.2)


# --- LoRA+ --------------------------------------------------------------------------------------------------------


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return self.fc(self.embed(ids))


@pytest.mark.parametrize("method", BY_CALL)
def test_the_four_groups_of_loraplus_are_kept(method):
    found = []
    for create in (create_loraplus_optimizer, BY_CALL[method]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["embed", "fc"], bias="lora_only")
        model = peft.get_peft_model(Embedding(), config)
        optimizer = create(
            model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1,
            loraplus_lr_embedding=1e-3, eps=1e-6,
        )  # fmt: skip
        names = {id(p): name for name, p in model.named_parameters()}
        found.append([{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups])
    theirs, ours = found
    assert ours[:4] == theirs and sum(bool(group["params"]) for group in theirs) == 4
    assert [group["lr"] for group in ours[4:]] == ([1e-2] if method is BiLoRAOptimizer else [])


# --- numbers in the logs ------------------------------------------------------------------------------------------


def names_of(optimizer):
    return {f"flatlora/{name}" for name in read_metrics(optimizer)}


@pytest.mark.parametrize("method", BY_CALL)
def test_the_trainer_logs_the_metrics_with_its_own_numbers(method, tmp_path):
    reported = []

    class Reports(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    class LogsItself(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):  # as some losses do, on the first rank alone
            self.trainer.log({"loss": 1.0})

        on_step_begin = on_substep_end

    model = tiny_llama()
    optimizer = BY_CALL[method](model, torch.optim.AdamW, lr=1e-2)
    args = arguments(tmp_path, logging_steps=2, save_strategy="no")
    trainer = trainer_of(model, None, args, optimizers=(optimizer, None), callbacks=[Reports(), LogsItself()])
    LogsItself.trainer = trainer
    calls, plain = [], optimizer.metrics
    optimizer.metrics = lambda: calls.append(trainer.state.global_step) or plain()
    hf.log_metrics(trainer)
    hf.log_metrics(trainer)
    with pytest.raises(TypeError, match=r"must be a transformers\.Trainer, got AdamW"):
        hf.log_metrics(optimizer.base_optimizer)
    trainer.train()
    assert calls == [2, 4]  # nowhere else is anything read
    trained = [log for log in reported if "learning_rate" in log]
    assert len(reported) > 5 and len(trained) == 2 and all(names_of(optimizer) <= log.keys() for log in trained)
    assert [log for log in trainer.state.log_history if names_of(optimizer) <= log.keys()] == [
        {**log, "step": step} for log, step in zip(trained, (2, 4), strict=True)
    ]
    assert not any(key.startswith("flatlora/") for key in reported[-1])  # the summary of the whole run


def test_ranks_reduce_metrics_on_the_models_device_before_the_first_step_too(monkeypatch):
    model = tiny_llama().to("meta")
    optimizer, devices = hf.create_lorasam_optimizer(model, torch.optim.AdamW, lr=1e-2), []

    def mean(numbers):
        devices.append(numbers.device.type)
        return torch.zeros(numbers.shape)

    monkeypatch.setattr("flatlora.metrics.mean_over_ranks", mean)
    assert read_metrics(optimizer, over_ranks=True).keys() == optimizer.metrics().keys() and devices == ["meta"]


def test_metrics_are_in_tensorboards_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = tiny_llama()
    optimizer = hf.create_ggpo_optimizer(model, torch.optim.AdamW, lr=1e-2, sigma=0.2)
    args = arguments(tmp_path, report_to=["tensorboard"], save_strategy="no")
    trainer = trainer_of(model, None, args, optimizers=(optimizer, None))
    hf.log_metrics(trainer)
    trainer.train()
    (file,) = (
        path for path in tmp_path.rglob("events.out*") if "flatlora" in path.read_bytes().decode(errors="ignore")
    )
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    found = events.Scalars("train/flatlora/noise_to_weight")
    assert [event.step for event in found] == [1, 2, 3, 4]
    assert all(0.19 < event.value < 0.3 for event in found)
