"""The methods that are compared: flatlora's, PEFT's, and what people do today. A method is a line of `METHODS`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import trainable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flatlora import (
    BilevelOptimizer,
    BiLoRAOptimizer,
    GGPOOptimizer,
    LoRASAMOptimizer,
    apply_gralora,
    direction_parameters,
    lora_layers,
    magnitude_parameters,
)

Batch = dict[str, Any]

# --- adapters -------------------------------------------------------------------------------------------------------


def head_names(model: nn.Module) -> list[str]:
    """The new classification head, which is trained whole; a model that generates has none."""
    return [name for name in ("classifier", "score") if hasattr(model, name)]


def add_adapter(model: nn.Module, kind: str, r: int, dropout: float = 0.0) -> nn.Module:
    """Adapters of one kind on all linear layers but the head; alpha is 2·r."""
    head = head_names(model)
    blocks = 2 if r <= 32 else 4
    if kind == "gralora":
        return apply_gralora(model, "all-linear", r=r, k=blocks, alpha=2 * r, dropout=dropout, modules_to_save=head)
    from peft import GraloraConfig, LoraConfig, get_peft_model

    common: dict[str, Any] = {
        "target_modules": "all-linear",
        "modules_to_save": head or None,
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
    }
    if kind == "peft-gralora":
        return get_peft_model(
            model, GraloraConfig(r=r, alpha=2 * r, gralora_k=blocks, gralora_dropout=dropout, **common)
        )
    return get_peft_model(
        model, LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, use_dora=kind == "dora", **common)
    )


# --- losses ---------------------------------------------------------------------------------------------------------


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits for each of the batch's labels: (texts, classes), or (texts, tokens, vocabulary) of a generated answer."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits[:, :-1] if batch["labels"].dim() == 2 else logits  # the last token of an answer predicts nothing


def mean_loss(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, the mean over texts or over the tokens of the answers."""
    logits, labels = answer_logits(model, batch), batch["labels"]
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing)


# --- optimizers: (model, learning rate, strength) -------------------------------------------------------------------

OptimizerOf = Callable[[nn.Module, float, float], Optimizer]


def adamw(model: nn.Module, lr: float, strength: float) -> Optimizer:
    return AdamW(trainable(model), lr=lr)


def decayed(model: nn.Module, lr: float, strength: float) -> Optimizer:
    return AdamW(trainable(model), lr=lr, weight_decay=strength)


def wrapped(wrap: Callable[[Optimizer, nn.Module, float], Optimizer]) -> OptimizerOf:
    """AdamW with `wrap(optimizer, model, strength)` around it."""
    return lambda model, lr, strength: wrap(adamw(model, lr, 0.0), model, strength)


def ggpo(**options: Any) -> OptimizerOf:
    return wrapped(lambda optimizer, model, sigma: GGPOOptimizer(optimizer, model, sigma=sigma, **options))


def bilora(model: nn.Module, lr: float, rho: float) -> Optimizer:
    return BiLoRAOptimizer.for_model(model, AdamW, rho=rho, lr=lr)


lorasam = wrapped(lambda optimizer, model, rho: LoRASAMOptimizer(optimizer, model, rho=rho))
risen_lorasam = wrapped(lambda optimizer, model, rise: LoRASAMOptimizer(optimizer, model, rise=rise))


def dropped_lorasam(model: nn.Module, lr: float, p: float) -> Optimizer:
    """LoRASAM under dropout of p, which is in the adapters."""
    return lorasam(model, lr, 0.05)


def noisy_lorasam(model: nn.Module, lr: float, rho: float) -> Optimizer:
    """GGPO's noise around LoRASAM: a pass is perturbed by both."""
    return GGPOOptimizer(lorasam(model, lr, rho), model, sigma=0.2, beta=0.0, noise="low_rank")


def two_pass_sam(model: nn.Module, lr: float, rho: float) -> Optimizer:
    """LoRA-SAM: the ascent is in the norm of A and B (and the head), not in that of the full weights."""
    try:
        from pytorch_optimizer import SAM
    except ImportError as reason:
        raise SystemExit("error: the method sam needs pytorch_optimizer: pip install pytorch_optimizer") from reason
    return SAM(trainable(model), AdamW, rho=rho, lr=lr, weight_decay=0.01)


def ivon(model: nn.Module, lr: float, ess: float) -> Optimizer:
    """IVON for LoRA (arXiv:2411.04421). Its clipped steps are as long as AdamW's longest at the same rate."""
    try:
        from ivon import IVON
    except ImportError as reason:
        raise SystemExit("error: the method ivon needs ivon-opt: pip install ivon-opt") from reason
    precision = {"ess": ess, "hess_init": 3e-4, "weight_decay": 1e-6}
    return IVON(trainable(model), lr=lr / 1e-3, clip_radius=1e-3, rescale_lr=False, **precision)


# --- training loops: generators that yield after every epoch --------------------------------------------------------


@dataclass
class Fit:
    """What a training loop works on. `times` takes the seconds of every step."""

    model: nn.Module
    optimizer_of: OptimizerOf
    lr: float
    strength: float
    epochs: list[list[Batch]]
    smoothing: float = 0.0
    decays: bool = False
    after_step: Callable[[], None] = lambda: None
    times: list[float] = field(default_factory=list)
    scheduler: LambdaLR | None = None

    def loss(self, batch: Batch) -> Tensor:
        return mean_loss(self.model, batch, self.smoothing)

    def optimizer(self) -> Optimizer:
        return self.scheduled(self.optimizer_of(self.model, self.lr, self.strength))

    def scheduled(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer, with a learning rate that falls to zero in a straight line if the run's does."""
        if self.decays:
            steps = sum(map(len, self.epochs))
            self.scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return optimizer

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step: its time is processor time on a CPU, where other programs may run beside it."""
        cuda = next(self.model.parameters()).is_cuda
        clock = time.perf_counter if cuda else time.process_time
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        yield
        if self.scheduler is not None:
            self.scheduler.step()
        self.after_step()
        if cuda:
            torch.cuda.synchronize()
        self.times.append(clock() - start)


def ordinary(fit: Fit) -> Iterator[None]:
    """The loop that everybody has."""
    optimizer = fit.optimizer()
    for batches in fit.epochs:
        fit.model.train()
        for batch in batches:
            with fit.step():
                fit.loss(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        yield


def with_closure(fit: Fit) -> Iterator[None]:
    """The loop of a two-pass optimizer."""
    optimizer = fit.optimizer()
    for batches in fit.epochs:
        fit.model.train()
        for batch in batches:

            def closure(batch: Batch = batch) -> Tensor:
                optimizer.zero_grad()
                loss = fit.loss(batch)
                loss.backward()
                return loss

            with fit.step():
                closure()
                optimizer.step(closure)
                optimizer.zero_grad()
        yield


def one_pass_sam(ascent: Callable[[Optimizer, nn.Parameter], Tensor]) -> Callable[[Fit], Iterator[None]]:
    """Gradients at ``ρ·d/‖d‖`` off the parameters (A, B and the head), where d is what the last step knew."""

    def loop(fit: Fit) -> Iterator[None]:
        optimizer, parameters = fit.optimizer(), trainable(fit.model)
        away: list[Tensor] = []
        for batches in fit.epochs:
            fit.model.train()
            for batch in batches:
                with fit.step():
                    here = snapshot(parameters)
                    with torch.no_grad():
                        for p, offset in zip(parameters, away, strict=False):  # none before the first step
                            p.add_(offset)
                    fit.loss(batch).backward()
                    restore(parameters, here)
                    optimizer.step()
                    away = [ascent(optimizer, p) for p in parameters]
                    norm = torch.stack([d.norm() for d in away]).norm()
                    away = [d * (fit.strength / (norm + 1e-12)) for d in away]
                    optimizer.zero_grad()
            yield

    return loop


@dataclass
class Radius:
    """What a rule for LoRASAM's radius goes by; the norms are of all layers together."""

    steps: int = 0
    update: float = 0.0  # ‖s·B·A‖_F
    gradient: float = 0.0  # ‖P(G)‖_F, its running mean

    def see(self, metrics: dict[str, Tensor]) -> None:
        """Takes in a step."""
        self.steps += 1
        newest = max(0.1, 1 / self.steps)
        self.gradient += newest * (float(metrics["projected_gradient_norm"]) - self.gradient)


def update_norm(model: nn.Module) -> float:
    """``‖s·B·A‖_F`` over all layers, by ``‖B·A‖_F² = Σ (BᵀB)∘(AAᵀ)``."""
    adapters = [adapter for layer in lora_layers(model) for adapter in layer.all_adapters()]
    squares = [((a.B.mT @ a.B) * (a.A @ a.A.mT)).sum() * a.scaling**2 for a in adapters]
    return float(torch.stack(squares).detach().sum().clamp(min=0).sqrt())


Rule = Callable[[Radius, float], float]  # the next ρ, from what is known and the rule's one number


def with_radius(rule: Rule) -> Callable[[Fit], Iterator[None]]:
    """LoRASAM whose ρ follows a rule after every step; the rule's number is the run's strength."""

    def loop(fit: Fit) -> Iterator[None]:
        optimizer = LoRASAMOptimizer(adamw(fit.model, fit.lr, 0.0), fit.model, rho=0.0)
        fit.scheduled(optimizer)
        radius = Radius()
        for batches in fit.epochs:
            fit.model.train()
            for batch in batches:
                with fit.step():
                    fit.loss(batch).backward()
                    radius.update = update_norm(fit.model)
                    optimizer.step()
                    radius.see(optimizer.metrics())
                    optimizer.rho = min(rule(radius, fit.strength), 0.3)
                    optimizer.zero_grad()
            yield

    return loop


def against_the_new(fit: Fit) -> Iterator[None]:
    """LoRASAM along what the last gradient adds to the running mean of those before, as in Friendly SAM.

    That is arXiv:2403.12350 with λ = 0.9 and σ = 1, but for a mean that is one from the first step on. The base
    optimizer steps by the gradient itself.
    """
    base, parameters = adamw(fit.model, fit.lr, 0.0), trainable(fit.model)
    optimizer = fit.scheduled(LoRASAMOptimizer(base, fit.model, rho=fit.strength))
    means = [torch.zeros_like(p) for p in parameters]
    whole: list[Tensor | None] = []
    steps = 0

    def put_back(*_: Any) -> None:  # LoRASAM has read what is new by now
        for p, grad in zip(parameters, whole, strict=True):
            p.grad = grad

    base.register_step_pre_hook(put_back)
    for batches in fit.epochs:
        fit.model.train()
        for batch in batches:
            with fit.step():
                fit.loss(batch).backward()
                whole = [p.grad for p in parameters]
                steps += 1
                for p, mean in zip(parameters, means, strict=True):
                    assert p.grad is not None
                    mean.lerp_(p.grad, max(0.1, 1 / steps))
                    p.grad = p.grad - mean
                optimizer.step()
                optimizer.zero_grad()
        yield


def in_pairs(fit: Fit) -> Iterator[None]:
    """Noise ε for one half of a batch and −ε for the other, as in arXiv:2306.08553: what is odd in ε cancels."""
    optimizer: Any = fit.optimizer()
    source = optimizer._source
    for batches in fit.epochs:
        fit.model.train()
        for batch in batches:
            with fit.step():
                drawn = {layer.name: source.draw(layer) for layer in lora_layers(fit.model)}
                for side in range(min(2, len(batch["labels"]))):
                    source.fixed = {name: replace(one, std=one.std * (1 - 2 * side)) for name, one in drawn.items()}
                    half = {n: v[side::2] if isinstance(v, Tensor) else v for n, v in batch.items()}
                    (fit.loss(half) * (len(half["labels"]) / len(batch["labels"]))).backward()
                source.fixed = None
                optimizer.step()
                optimizer.zero_grad()
        yield


def last_gradient(optimizer: Optimizer, p: nn.Parameter) -> Tensor:
    """AsyncSAM's rule (arXiv:2503.11147): the gradient of the step before."""
    assert p.grad is not None
    return p.grad


def momentum(optimizer: Optimizer, p: nn.Parameter) -> Tensor:
    """Momentum-SAM's (arXiv:2401.12033): the running mean of gradients, which AdamW has."""
    return optimizer.state[p]["exp_avg"]  # type: ignore[no-any-return]


def at_samples(fit: Fit) -> Iterator[None]:
    """IVON's loop: gradients at parameters drawn from its posterior."""
    optimizer: Any = fit.optimizer()
    for batches in fit.epochs:
        fit.model.train()
        for batch in batches:
            with fit.step():
                with optimizer.sampled_params(train=True):
                    fit.loss(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        yield


def bilevel(fit: Fit) -> Iterator[None]:
    """BiDoRA: a search of half as many steps as the others make, then as many as they make; epochs are of the latter.

    It searches directions on four fifths of the batches and magnitudes on the others, at the same learning rate.
    """
    head = [p for name, p in fit.model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    directions = [*direction_parameters(fit.model), *head]
    first, steps = fit.epochs[0], len(fit.epochs[0])
    cut = max(1, steps // 5)
    fit.model.train()
    optimizer = BilevelOptimizer(
        AdamW(directions, lr=fit.lr),
        AdamW(magnitude_parameters(fit.model), lr=fit.lr),
        fit.model,
        first[cut:],
        first[:cut],
        loss_fn=mean_loss,
        difference="forward",
    )
    for _ in range(max(1, steps * len(fit.epochs) // 2)):
        with fit.step():
            optimizer.step()
    second = fit.scheduled(AdamW(directions, lr=fit.lr))
    everything = [batch for batches in fit.epochs for batch in batches]
    for _ in fit.epochs:
        fit.model.train()
        for _ in range(steps):
            with fit.step():
                optimizer.retrain(everything, 1, optimizer=second)
        yield
    optimizer.remove()


# --- what is done beside the optimizer ------------------------------------------------------------------------------


def add_embedding_noise(model: nn.Module, alpha: float) -> None:
    """NEFTune (arXiv:2310.05914): uniform noise within ``alpha / sqrt(tokens · width)`` on embeddings in training."""

    def noisy(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        bound = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-bound, bound)

    model.get_input_embeddings().register_forward_hook(noisy)  # type: ignore[operator]


NewestShare = Callable[[int], float]  # after that many steps, the share of the newest parameters in their average


def moving(decay: float, steps: int) -> NewestShare:
    """EMA: an exponential moving average that forgets faster during the first steps."""
    return lambda step: 1 - min(decay, (1 + step) / (10 + step))


def last(share: float, steps: int) -> NewestShare:
    """SWA (arXiv:1803.05407): the mean over that share of the run, its end."""
    return lambda step: 1 / max(1, step - int((1 - share) * steps))


class Average:
    """An average of the trained parameters over the steps."""

    def __init__(self, model: nn.Module, newest: NewestShare):
        self.parameters, self.newest, self.steps = trainable(model), newest, 0
        self.means = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        for mean, p in zip(self.means, self.parameters, strict=True):
            mean.lerp_(p, self.newest(self.steps))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within the context the parameters are the average."""
        held = snapshot(self.parameters)
        restore(self.parameters, self.means)
        try:
            yield
        finally:
            restore(self.parameters, held)


def snapshot(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def restore(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        label: its name in tables.
        optimizer: builds its optimizer from the model, the learning rate and the strength.
        strengths: candidates for its one number beside the learning rate; the first is the default.
        symbol: what tables call the strength.
        adapter: lora, dora, gralora or peft-gralora.
        loop: how it trains.
        trick: what the strength sets where it is not the optimizer's: dropout, smoothing or neftune.
        average: from the strength and the number of steps, the average of the parameters that is scored.
        stops_early: holds out a part of its training data and keeps the epoch that is best there.
    """

    label: str
    optimizer: OptimizerOf = adamw
    strengths: tuple[float, ...] = ()
    symbol: str = ""
    adapter: str = "lora"
    loop: Callable[[Fit], Iterator[None]] = ordinary
    trick: str = ""
    average: Callable[[float, int], NewestShare] | None = None
    stops_early: bool = False


def by_rule(label: str, symbol: str, strength: float, rule: Rule) -> Method:
    return Method(f"LoRASAM, {label}", adamw, (strength,), symbol, loop=with_radius(rule))


METHODS = {
    "lora": Method("LoRA"),
    "dora": Method("DoRA", adapter="dora"),
    "peft-gralora": Method("GraLoRA of PEFT", adapter="peft-gralora"),
    "gralora": Method("GraLoRA", adapter="gralora"),
    "flat-lora": Method("Flat-LoRA", ggpo(beta=0.0), (0.2, 0.1), "σ"),
    "ggpo": Method("GGPO gaussian", ggpo(), (0.2, 0.1), "σ"),
    "ggpo-low-rank": Method("GGPO low-rank, β = 0", ggpo(beta=0.0, noise="low_rank"), (0.2, 0.1), "σ"),
    "ggpo-pairs": Method("GGPO low-rank, β = 0, ±ε", ggpo(beta=0.0, noise="low_rank"), (0.2, 0.1), "σ", loop=in_pairs),
    "lorasam": Method("LoRASAM", lorasam, (0.05, 0.15), "ρ"),
    "lorasam-dropout": Method("LoRASAM, ρ 0.05, dropout", dropped_lorasam, (0.1,), "p", trick="dropout"),
    "lorasam-update": by_rule("ρ = κ·‖s·B·A‖", "κ", 0.02, lambda r, kappa: kappa * r.update),
    "lorasam-gradient": by_rule("ρ = κ·‖P(G)‖", "κ", 0.03, lambda r, kappa: kappa * r.gradient),
    "lorasam-open": by_rule("ρ = τ / ‖P(G)‖", "τ", 0.05, lambda r, tau: tau / r.gradient),
    "lorasam-closed": Method("LoRASAM, ρ by its rise", risen_lorasam, (0.01,), "rise"),
    "lorasam-new": Method("LoRASAM, the gradient's new part", strengths=(0.05,), symbol="ρ", loop=against_the_new),
    "bilora": Method("Bi-LoRA", bilora, (0.05, 0.1), "ρ"),
    "bidora": Method("BiDoRA", adapter="dora", loop=bilevel),
    "gralora-ggpo": Method("GGPO on GraLoRA", ggpo(beta=0.0), (0.2, 0.1), "σ", adapter="gralora"),
    "lorasam-ggpo": Method("LoRASAM in GGPO low-rank, σ 0.2", noisy_lorasam, (0.15, 0.05), "ρ"),
    "gralora-lorasam": Method("LoRASAM on GraLoRA", lorasam, (0.05, 0.15), "ρ", adapter="gralora"),
    "gralora-bilora": Method("Bi-LoRA on GraLoRA", bilora, (0.05, 0.1), "ρ", adapter="gralora"),
    "early-stopping": Method("LoRA, early stopping", stops_early=True),
    "dropout": Method("LoRA, dropout", strengths=(0.1, 0.3), symbol="p", trick="dropout"),
    "weight-decay": Method("LoRA, weight decay", decayed, (0.1, 1.0), "λ"),
    "label-smoothing": Method("LoRA, label smoothing", strengths=(0.1, 0.2), symbol="ε", trick="smoothing"),
    "neftune": Method("LoRA, NEFTune", strengths=(5.0, 15.0), symbol="α", trick="neftune"),
    "ema": Method("LoRA, EMA", strengths=(0.98, 0.95), symbol="decay", average=moving),
    "swa": Method("LoRA, SWA", strengths=(0.5, 0.25), symbol="share", average=last),
    "sam": Method("two-pass SAM over A and B", two_pass_sam, (0.05, 0.02), "ρ", loop=with_closure),
    "async-sam": Method("AsyncSAM's rule", adamw, (0.05, 0.02), "ρ", loop=one_pass_sam(last_gradient)),
    "momentum-sam": Method("Momentum-SAM", adamw, (0.05, 0.02), "ρ", loop=one_pass_sam(momentum)),
    "ivon": Method("IVON", ivon, (1e7, 1e6), "ess", loop=at_samples),
}


def fresh_model(base: nn.Module, method: Method, strength: float, r: int, seed: int) -> nn.Module:
    """A copy of the pretrained model with a new head and the method's adapters, the same for a seed."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    for name in head_names(model):
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=getattr(model.config, "initializer_range", 0.02))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    model = add_adapter(model, method.adapter, r, strength if method.trick == "dropout" else 0.0)
    if method.trick == "neftune":
        add_embedding_noise(model, strength)
    torch.manual_seed(seed)  # dropout too is the same, however many numbers the adapters drew
    return model
