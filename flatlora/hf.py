"""The methods in the Hugging Face Trainer and its relatives. Needs transformers.

The Trainer takes a factory, which it calls once it has placed the model, or a built optimizer:

    Trainer(..., optimizer_cls_and_kwargs=(GGPOFactory, {"args": args, "sigma": 0.2}))
    Trainer(..., optimizers=(create_ggpo_optimizer(model, torch.optim.AdamW, lr=2e-4), None))
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, ClassVar

import transformers
from torch import nn
from torch.optim import Optimizer
from transformers.training_args import OptimizerNames

from .bidora.optimizer import BilevelOptimizer
from .bidora.parameters import magnitude_parameters
from .bilora.optimizer import BiLoRAOptimizer
from .ggpo.optimizer import GGPOOptimizer
from .lorasam.optimizer import LoRASAMOptimizer
from .metrics import read_metrics
from .perturbation.optimizer import PerturbingOptimizer, trainable

__all__ = [
    "BiDoRAFactory",
    "BiLoRAFactory",
    "FlatLoRACallback",
    "GGPOFactory",
    "LoRASAMFactory",
    "OptimizerFactory",
    "create_bidora_optimizer",
    "create_bilora_optimizer",
    "create_ggpo_optimizer",
    "create_lorasam_optimizer",
    "log_metrics",
]


# --- by the call that PEFT's `create_loraplus_optimizer` has ------------------------------------------------------


def create_ggpo_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float | None = None,
    **kwargs: Any,
) -> GGPOOptimizer:
    """A `GGPOOptimizer` over `optimizer_cls`, with the Trainer's parameter groups or with LoRA+'s.

    Args:
        model: the model with adapters.
        optimizer_cls: class of the base optimizer.
        lr: learning rate; with LoRA+ that of the A matrices.
        weight_decay: of the parameters that the Trainer decays: neither biases nor norms.
        loraplus_lr_ratio: if given, the groups are those of PEFT's `create_loraplus_optimizer`, which takes
            `loraplus_weight_decay` in place of `weight_decay` and `loraplus_lr_embedding` too.
        kwargs: the options of `GGPOOptimizer`; all others are `optimizer_cls`'s.

    Raises:
        ValueError: as `GGPOOptimizer`; `weight_decay` with `loraplus_lr_ratio`.
        TypeError: an option that nobody knows.

    Example:
        >>> optimizer = create_ggpo_optimizer(model, torch.optim.AdamW, lr=2e-4, weight_decay=0.01, sigma=0.2)
    """
    return _create(GGPOOptimizer, model, optimizer_cls, lr, weight_decay, loraplus_lr_ratio, kwargs)


def create_bilora_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float | None = None,
    **kwargs: Any,
) -> BiLoRAOptimizer:
    """A `BiLoRAOptimizer`, and its auxiliary; arguments as `create_ggpo_optimizer`, options of `for_model`.

    Call it before DDP wraps the model. The auxiliary's group comes last, with `auxiliary_lr`, or else `lr`.
    """
    return _create(BiLoRAOptimizer, model, optimizer_cls, lr, weight_decay, loraplus_lr_ratio, kwargs)


def create_lorasam_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float | None = None,
    **kwargs: Any,
) -> LoRASAMOptimizer:
    """A `LoRASAMOptimizer`; arguments as `create_ggpo_optimizer`."""
    return _create(LoRASAMOptimizer, model, optimizer_cls, lr, weight_decay, loraplus_lr_ratio, kwargs)


def create_bidora_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    val_dataloader: Any,
    magnitude_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> BilevelOptimizer:
    """A `BilevelOptimizer` for a loop that runs the training batches itself, as the Trainer does.

    Once trained, ``optimizer.retrain(...)`` is the second phase; `trainer.optimizer.optimizer` is the optimizer.

    Args:
        model: a model with DoRA adapters.
        optimizer_cls: class of both levels' base optimizers.
        lr: of the lower level: directions, and whatever else requires a gradient.
        val_dataloader: batches of the upper level.
        magnitude_lr: of the upper level; by default `lr`.
        weight_decay: of both levels, but for biases and norms.
        kwargs: the options of `BilevelOptimizer`; all others are `optimizer_cls`'s.
    """
    if "train_dataloader" in kwargs:
        raise TypeError(
            "create_bidora_optimizer takes no train_dataloader: the Trainer, or your loop, runs the training batches. "
            "Leave it out, or build a BilevelOptimizer"
        )
    own = {name: kwargs.pop(name) for name in inspect.signature(BilevelOptimizer).parameters if name in kwargs}
    magnitudes = magnitude_parameters(model, own.get("adapter"))
    lower = optimizer_cls(_decay_groups(model, weight_decay, but=magnitudes), lr=lr, **kwargs)
    above = {"params": magnitudes, "weight_decay": weight_decay}
    upper = optimizer_cls([above], lr=lr if magnitude_lr is None else magnitude_lr, **kwargs)
    return BilevelOptimizer(lower, upper, model, None, val_dataloader, **own)


def _create(
    method: type[PerturbingOptimizer],
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    lr: float,
    weight_decay: float,
    loraplus_lr_ratio: float | None,
    kwargs: dict[str, Any],
) -> Any:
    if loraplus_lr_ratio is None:
        groups = _decay_groups(model, weight_decay)
        return method.for_model(model, optimizer_cls, params=groups, lr=lr, **kwargs)
    if weight_decay:
        raise ValueError(
            f"weight_decay={weight_decay!r} with loraplus_lr_ratio: LoRA+ has its own; pass loraplus_weight_decay"
        )
    from peft import optimizers

    def build(groups: Any, **others: Any) -> Optimizer:
        return method.for_model(model, optimizer_cls, params=groups, **others)

    build.__name__ = getattr(optimizer_cls, "__name__", "build")  # PEFT tells 8-bit optimizers by it
    loraplus: Any = optimizers.create_loraplus_optimizer
    return loraplus(model, build, lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, **kwargs)


def _decay_groups(model: nn.Module, weight_decay: float, but: Iterable[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """What is to be trained, in the Trainer's two groups, of which one may be empty."""
    trainer: Any = transformers.Trainer
    decayed = set(trainer.get_decay_parameter_names(None, model))  # without a trainer: it is not used
    names = {p: name for name, p in model.named_parameters()}
    left_out = set(but)
    params = [p for p in trainable(model) if p not in left_out]
    return [
        {"params": [p for p in params if names[p] in decayed], "weight_decay": weight_decay},
        {"params": [p for p in params if names[p] not in decayed], "weight_decay": 0.0},
    ]


# --- by the Trainer's `optimizer_cls_and_kwargs` ------------------------------------------------------------------


class OptimizerFactory:
    """Makes the optimizer of the Trainer's model: ``optimizer_cls_and_kwargs=(GGPOFactory, {...})``.

    The Trainer calls it after it has placed the model, and again when `model_init` makes a new one. The arguments are
    the dictionary's entries; others are those of the method's ``create_..._optimizer``: its options, LoRA+'s, and the
    base optimizer's.

    Args:
        args: the `TrainingArguments`. They give the learning rate, weight decay, Adam's numbers, `optim` and
            `optim_args`, unless an entry of the same name does.
        optim: the base optimizer, as in ``TrainingArguments(optim=...)``, or an optimizer class; "adamw_torch" without
            `args`.
        optim_args: "name=value,..." as in `TrainingArguments`.
        lr, weight_decay: without `args`, `lr` is needed, and `weight_decay` is 0.

    Raises:
        RuntimeError: transformers is too old to call factories.
        ValueError: no learning rate, or an `optim` that chooses its own parameters, such as LOMO or GaLore.
    """

    create: ClassVar[Callable[..., Optimizer]]

    def __init__(self, *args: Any, **kwargs: Any):
        if args or kwargs:
            raise RuntimeError(
                f"transformers {transformers.__version__} does not call {type(self).__name__} with the model. Update "
                f"it, or pass Trainer(..., optimizers=({type(self).create.__name__}(model, AdamW, lr=...), None))"
            )

    def __call__(self, model: nn.Module, args: Any = None, **kwargs: Any) -> Optimizer:
        optimizer_cls, own = _base(model, args, kwargs)
        return type(self).create(model, optimizer_cls, **own, **kwargs)


class GGPOFactory(OptimizerFactory):
    """Makes a `GGPOOptimizer`; see `OptimizerFactory`."""

    create = staticmethod(create_ggpo_optimizer)


class BiLoRAFactory(OptimizerFactory):
    """Makes a `BiLoRAOptimizer`, and its auxiliary; see `OptimizerFactory`."""

    create = staticmethod(create_bilora_optimizer)


class LoRASAMFactory(OptimizerFactory):
    """Makes a `LoRASAMOptimizer`; see `OptimizerFactory`."""

    create = staticmethod(create_lorasam_optimizer)


class BiDoRAFactory(OptimizerFactory):
    """Makes a `BilevelOptimizer`, which needs a `val_dataloader` among the entries; see `OptimizerFactory`."""

    create = staticmethod(create_bidora_optimizer)


def _base(model: nn.Module, given: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What makes the base optimizer, and its lr and weight decay; takes their entries out of `kwargs`.

    The Trainer's other choices are bound to the class, as a method's options may have the same names.
    """
    optim = kwargs.pop("optim", None)
    if given is None and "lr" not in kwargs:
        raise ValueError('there is no learning rate; add "lr": 2e-4, or "args": args for that of TrainingArguments')
    if given is None:  # not TrainingArguments(), which sets up devices and distributed state
        fields = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
        given = SimpleNamespace(**{**fields, "optim": "adamw_torch"})
    settings: Any = copy.copy(given)
    settings.learning_rate = kwargs.pop("lr", settings.learning_rate)
    settings.weight_decay = kwargs.pop("weight_decay", settings.weight_decay)
    settings.optim_args = kwargs.pop("optim_args", settings.optim_args)
    own = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if isinstance(optim, type):
        if settings.optim_args:
            raise ValueError(
                f"optim_args={settings.optim_args!r} is not read where optim is a class; give {optim.__name__}'s "
                "arguments as entries"
            )
        return optim, own
    settings.optim = OptimizerNames(optim or settings.optim)
    trainer: Any = transformers.Trainer
    optimizer_cls, chosen = trainer.get_optimizer_cls_and_kwargs(settings, model)
    is_class = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)
    if not is_class or chosen.keys() & {"params", "model", "optimizer_dict"}:
        raise ValueError(f"optim={settings.optim.value!r} chooses its own parameters; no method can be put around it")
    bound: Any = functools.partial(optimizer_cls, **{name: chosen[name] for name in chosen if name not in own})
    bound.__name__ = optimizer_cls.__name__  # by which PEFT's LoRA+ tells 8-bit optimizers
    return bound, own


class FlatLoRACallback(transformers.TrainerCallback):
    """Adds ``optimizer.metrics()`` to what the Trainer logs in training, as ``flatlora/...``.

    The numbers are read, and the device is waited for, only when the Trainer logs. They are means over all ranks, as
    its loss is. The callback must come before those that report, such as TensorBoard's: `log_metrics` puts it first.
    """

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if logs is None or not {"loss", "learning_rate"} <= logs.keys():
            return  # not the Trainer's own, which all ranks make
        numbers = {f"flatlora/{name}": value for name, value in read_metrics(optimizer, over_ranks=True).items()}
        logs.update(numbers)
        state.log_history[-1].update(numbers)  # made of the logs before callbacks see them


def log_metrics(trainer: transformers.Trainer) -> None:
    """Has `trainer` log ``optimizer.metrics()`` with its own numbers. Once more changes nothing.

    Raises:
        TypeError: `trainer` is no `Trainer`.

    Example:
        >>> trainer = Trainer(..., optimizers=(optimizer, None))
        >>> log_metrics(trainer)
        >>> trainer.train()
    """
    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    trainer.remove_callback(FlatLoRACallback)
    trainer.callback_handler.callbacks.insert(0, FlatLoRACallback())
