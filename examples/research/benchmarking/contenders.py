"""Who is measured: for each name, how the model is adapted and how it is trained."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import GraloraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer

import flatlora

from .models import sharing

Args = argparse.Namespace
LR, SIGMA = 1e-4, 0.03


@dataclass(frozen=True)
class Step:
    """One training step in its two parts, each a function of the token ids (batch, tokens)."""

    gradients: Callable[[Tensor], Any]
    update: Callable[[Tensor], Any]

    def __call__(self, ids: Tensor) -> None:
        self.gradients(ids)
        self.update(ids)


# --- adapters: of equal rank and scaling on all linear layers but the head ------------------------------------------


def lora(model: nn.Module, args: Args, dora: bool = False) -> nn.Module:
    return get_peft_model(
        model, LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", use_dora=dora)
    )


def dora(model: nn.Module, args: Args) -> nn.Module:
    return lora(model, args, dora=True)


def two_adapters(model: nn.Module, args: Args) -> nn.Module:
    adapted = lora(model, args)
    adapted.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    adapted.base_model.set_adapter(["default", "second"])
    return adapted


def gralora(model: nn.Module, args: Args) -> nn.Module:
    sizes = {"r": args.r, "k": args.k, "alpha": 2 * args.r, "hybrid_r": args.hybrid_r}
    return flatlora.apply_gralora(model, "all-linear", **sizes)


def peft_gralora(model: nn.Module, args: Args) -> nn.Module:
    sizes = {"r": args.r, "gralora_k": args.k, "alpha": 2 * args.r, "hybrid_r": args.hybrid_r}
    return get_peft_model(model, GraloraConfig(target_modules="all-linear", **sizes))


# --- optimizers -----------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, args: Args) -> Optimizer:
    return torch.optim.AdamW(trained(model), lr=LR)


def ggpo(noise: Any) -> Callable[[nn.Module, Args], Optimizer]:
    return lambda model, args: flatlora.GGPOOptimizer(
        adamw(model, args), model, noise=noise, noise_rank=args.noise_rank, sigma=SIGMA
    )


def lorasam(model: nn.Module, args: Args) -> Optimizer:
    return flatlora.LoRASAMOptimizer(adamw(model, args), model)


def bilora(model: nn.Module, args: Args) -> Optimizer:
    return flatlora.BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=LR)


def lora_fa(model: nn.Module, args: Args) -> Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(model, r=args.r, lora_alpha=2 * args.r, lr=LR)


def lora_plus(model: nn.Module, args: Args) -> Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16)


def schedule_free(model: nn.Module, args: Args) -> Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise SystemExit("'schedule-free' needs: pip install schedulefree (or name other --methods)") from error
    optimizer = AdamWScheduleFree(trained(model), lr=LR)
    optimizer.train()
    return optimizer


def sam(model: nn.Module, args: Args) -> Optimizer:
    try:
        from pytorch_optimizer import SAM
    except ImportError as error:
        raise SystemExit("'two-pass SAM' needs: pip install pytorch-optimizer (or name other --methods)") from error
    return SAM(trained(model), torch.optim.AdamW, rho=0.05, lr=LR)


# --- steps ----------------------------------------------------------------------------------------------------------

Train = Callable[[nn.Module, Args], Step]


def backward(model: Callable[..., Any], ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss


def compiled(model: nn.Module, args: Args) -> Callable[..., Any]:
    return torch.compile(model) if args.compile else model


def one_pass(build: Callable[[nn.Module, Args], Optimizer]) -> Train:
    def train(model: nn.Module, args: Args) -> Step:
        optimizer, called = build(model, args), compiled(model, args)
        return Step(lambda ids: backward(called, ids), lambda ids: (optimizer.step(), optimizer.zero_grad()))

    return train


def two_passes(model: nn.Module, args: Args) -> Step:
    optimizer, called = sam(model, args), compiled(model, args)

    def update(ids: Tensor) -> None:
        optimizer.step(lambda: backward(called, ids))
        optimizer.zero_grad()

    return Step(lambda ids: backward(called, ids), update)


def bidora(difference: Any) -> Train:
    """A lower and an upper step, on as many tokens each; all of it is the optimizer's."""

    def train(model: nn.Module, args: Args) -> Step:
        lower = torch.optim.AdamW(flatlora.direction_parameters(model), lr=LR)
        upper = torch.optim.AdamW(flatlora.magnitude_parameters(model), lr=LR)
        data = [{}], [{}]  # filled by the step
        optimizer = flatlora.BilevelOptimizer(lower, upper, model, *data, difference=difference)

        def update(ids: Tensor) -> None:
            data[0][0] = data[1][0] = {"input_ids": ids, "labels": ids}
            optimizer.step()
            optimizer.zero_grad()

        return Step(lambda ids: None, update)

    return train


def bases(model: nn.Module) -> Iterator[nn.Linear]:
    """The frozen float layers under PEFT's adapters."""
    for module in model.modules():
        if isinstance(base := getattr(module, "base_layer", None), nn.Linear):
            if not base.weight.is_floating_point():
                raise SystemExit("noise in place and materialised noise need float weights; name other --methods")
            yield base


def row_std(weight: Tensor) -> Tensor:
    """The noise's standard deviation per row, (m, 1)."""
    return weight.float().norm(dim=1, keepdim=True) * (SIGMA / math.sqrt(weight.shape[1]))


def drawn(std: Tensor, weight: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(weight.device).manual_seed(seed)
    noise = torch.empty(weight.shape, device=weight.device).normal_(generator=generator)
    return noise.mul_(std).to(weight.dtype)


def noise_in_place(model: nn.Module, args: Args) -> Step:
    """``W += ε`` before the pass and ``W −= ε`` after it, from the same seeds, as Flat-LoRA's code does."""
    weights, optimizer, called = [base.weight for base in bases(model)], adamw(model, args), compiled(model, args)

    def gradients(ids: Tensor) -> None:
        stds = [row_std(weight) for weight in weights]
        for sign in (1, -1):
            with torch.no_grad():
                for seed, (weight, std) in enumerate(zip(weights, stds, strict=True)):
                    weight.add_(drawn(std, weight, seed), alpha=sign)
            if sign > 0:
                backward(called, ids)

    return Step(gradients, lambda ids: (optimizer.step(), optimizer.zero_grad()))


def noise_materialised(model: nn.Module, args: Args) -> Step:
    """``x·εᵀ`` beside every layer, with ε kept for the whole step: a second product and a copy of the weights."""
    layers, optimizer = list(bases(model)), adamw(model, args)
    noise: dict[nn.Module, Tensor] = {}
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, out: out + nn.functional.linear(inputs[0], noise[module]))
    called = compiled(model, args)

    def gradients(ids: Tensor) -> None:
        noise.update({layer: drawn(row_std(layer.weight), layer.weight, i) for i, layer in enumerate(layers)})
        backward(called, ids)

    return Step(gradients, lambda ids: (optimizer.step(), optimizer.zero_grad()))


# --- the table ------------------------------------------------------------------------------------------------------

CONTENDERS: dict[str, tuple[Callable[[nn.Module, Args], nn.Module], Train]] = {
    "PEFT LoRA": (lora, one_pass(adamw)),
    "GGPO gaussian": (lora, one_pass(ggpo("gaussian"))),
    "GGPO low_rank": (lora, one_pass(ggpo("low_rank"))),
    "Bi-LoRA": (lora, one_pass(bilora)),
    "LoRASAM": (lora, one_pass(lorasam)),
    "GraLoRA": (gralora, one_pass(adamw)),
    "GraLoRA under GGPO": (gralora, one_pass(ggpo("gaussian"))),
    "BiDoRA forward": (dora, bidora("forward")),
    "BiDoRA central": (dora, bidora("central")),
    # what a user would pick instead
    "PEFT two adapters": (two_adapters, one_pass(adamw)),
    "PEFT DoRA": (dora, one_pass(adamw)),
    "PEFT GraLoRA": (peft_gralora, one_pass(adamw)),
    "LoRA-FA": (lora, one_pass(lora_fa)),
    "LoRA+": (lora, one_pass(lora_plus)),
    "schedule-free": (lora, one_pass(schedule_free)),
    "two-pass SAM": (lora, two_passes),
    "noise in place": (lora, noise_in_place),
    "noise materialised": (lora, noise_materialised),
}


def start(name: str, base: nn.Module, args: Args) -> Step:
    """A contender's training step over the tensors of `base`, which it leaves as they are but for its rounding."""
    adapt, train = CONTENDERS[name]
    model = sharing(base)
    torch.manual_seed(0)
    adapted = adapt(model, args)
    if args.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return train(adapted.train(), args)
