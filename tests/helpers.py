"""How tests compare, train, form dense references, watch operators and start processes."""

from __future__ import annotations

import inspect
import io
import os
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from models import VOCAB, IntLinear, ParameterLoRA, trainable, trained
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import flatlora
from flatlora import GGPOOptimizer, GraLoRALinear, OptimizerWrapper, lora_layers
from flatlora.kernels.draw import draw_gaussian, draw_low_rank
from flatlora.reference import gralora_delta, projected

PACKAGE = os.path.join(os.path.dirname(flatlora.__file__), "")  # a clone of the repository has that name too

torch.set_num_threads(1)  # the models are tiny, and test runs share the machine


# --- comparing ----------------------------------------------------------------------------------------------------


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two nested structures first differ in a single bit, or None."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{path}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        if torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan()):
            return None
        return f"{path}: differ by up to {(a.double() - b.double()).abs().max():.3g}"
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))} in one alone"
        found = (difference(a[key], b[key], f"{path}/{key}") for key in a)
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{path}: {len(a)} and {len(b)} items"
        found = (difference(x, y, f"{path}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        same = type(a) is type(b) and (a == b or (a != a and b != b))
        return None if same or (callable(a) and callable(b)) else f"{path}: {a!r} and {b!r}"
    return next((where for where in found if where is not None), None)


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    """Tensors one by one, by the norm of their difference."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def primary(model: nn.Module) -> list[Tensor]:
    """The values of what is trained, the auxiliary aside."""
    return [p.detach().clone() for p in trained(model)]


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def outputs(model: nn.Module) -> dict[str, Tensor]:
    """What each adapted layer makes of the unit vectors: its whole effective weight, ε included if there is one.

    Only without dropout.
    """
    return {
        layer.name: layer.module(torch.eye(layer.shape[1], dtype=layer.all_adapters()[0].A.dtype)).detach()
        for layer in lora_layers(model)
    }


def epsilon(model: nn.Module) -> dict[str, Tensor]:
    """The ε (m, n) that each layer of a model in train mode is perturbed by at present, up to rounding."""
    assert model.training
    noisy = outputs(model)
    clean = outputs(model.eval())
    model.train()
    return {name: (noisy[name] - clean[name]).t() for name in noisy}


def perturbation(model: nn.Module) -> float:
    """The largest element of ε in any layer."""
    return max(float(e.abs().max()) for e in epsilon(model).values())


def base_state(optimizer: Optimizer) -> dict[str, Any]:
    """A frozen copy of the state without the method's own part."""
    state = optimizer.state_dict()
    return _frozen({key: state[key] for key in state if key != "flatlora"})


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return [_frozen(item) for item in value] if isinstance(value, list) else value


def through_a_file(value: Any, weights_only: bool = True) -> Any:
    """`value` as `torch.save` and `torch.load` give it back."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


# --- training -----------------------------------------------------------------------------------------------------


def adamw(of: Any, **kwargs: Any) -> torch.optim.AdamW:
    """AdamW of parameters or groups, or of all that a model trains."""
    params = trainable(of) if isinstance(of, nn.Module) else of
    return torch.optim.AdamW(params, **{"lr": 1e-2, "weight_decay": 0.1, **kwargs})


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def ggpo(model: nn.Module, base: Optimizer | None = None, **kwargs: Any) -> GGPOOptimizer:
    return GGPOOptimizer(adamw(model) if base is None else base, model, **{"seed": 7, **kwargs})


class Plain(OptimizerWrapper):
    """A method that counts its calls and keeps that one number."""

    calls = 0

    def before_step(self):
        self.calls += 1

    def method_state(self):
        return {"calls": self.calls}

    def load_method_state(self, state):
        self.calls = 0 if state is None else state["calls"]


def wrapped(
    cls: type[Optimizer], model: nn.Module, lr: float = 0.0, base: Callable[..., Optimizer] = torch.optim.SGD, **options
) -> Any:
    """A method over a base optimizer of all that the model trains, which by default moves nothing.

    GGPO's standard deviations are those of the present step.
    """
    if cls is GGPOOptimizer:
        options.setdefault("update_every", 1)
    return cls(base(trainable(model), lr=lr), model, **options)


def build(cls: type[Optimizer], params: list[nn.Parameter], **kwargs: Any) -> Optimizer:
    """An optimizer with a learning rate and with weight decay where it knows them, deprecations aside."""
    known = inspect.signature(cls).parameters
    wanted = {key: value for key, value in {"lr": 1e-2, "weight_decay": 0.1}.items() if key in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(params, **{**wanted, **kwargs})


def optimizers_of(namespace: Any) -> Iterator[type[Optimizer]]:
    """Every optimizer class that a module exports."""
    for _, value in sorted(vars(namespace).items()):
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer:
            yield value


def tokens(i: int = 0, batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(i))


def lm_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def loss_of(model: nn.Module, i: int, width: int = 32, batch: int = 4) -> Tensor:
    """Loss number `i` of an MLP: new data, and a new form of the loss, at each."""
    generator = torch.Generator().manual_seed(1000 + i)
    x, y = torch.randn(2, batch, width, generator=generator)
    return (model(x) - y).abs().pow(1 + i % 3).mean()


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, target: float | Tensor = 0.0) -> float:
    """One training step towards `target`; returns the loss."""
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def closure_of(optimizer: Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What a user hands to `step`: it zeroes gradients, computes the loss and its gradients, and returns it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def train(
    model: nn.Module, optimizer: Optimizer, steps: range, scheduler: Any = None, width: int = 32, sparse: bool = False
) -> None:
    """A user's training loop on the MLP, with a closure where the optimizer insists on one."""
    for i in steps:
        closure = closure_of(optimizer, lambda i=i: loss_of(model, i, width))
        if isinstance(getattr(optimizer, "base_optimizer", optimizer), torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            for param in trainable(model) if sparse else ():
                param.grad = param.grad.to_sparse()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


# --- dense references ---------------------------------------------------------------------------------------------


def base_weight(base):
    """W0 (m, n) in float64, from the stored bits of any base used here."""
    weight = base.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).double()
    if type(weight).__name__ == "Int8Params":
        scale = base.state.SCB if base.state.SCB is not None else weight.SCB
        return weight.data.double() * scale.double()[:, None] / 127
    if isinstance(base, IntLinear):
        return weight.double() * base.scale.double()
    return (weight.t() if isinstance(base, Conv1D) else weight).double()


def dense(module):
    """(W', bias) of a layer in float64 as a differentiable function of its parameters: W0 + Σ s·B·A, or DoRA's
    μ·(W0 + s·B·A)/‖W0 + s·B·A‖ with the norm held constant, for a single adapter with a magnitude."""
    if isinstance(module, GraLoRALinear):
        weight = module.base_layer.weight + gralora_delta(module.gralora_A, module.gralora_B, module.scaling)
        if module.gralora_A_general is not None:
            weight = weight + module.scaling * module.gralora_B_general.weight @ module.gralora_A_general.weight
        return weight, module.base_layer.bias
    if not isinstance(module, LoraLayer):
        return module.dense()
    base = module.get_base_layer()
    weight, bias = base_weight(base), getattr(base, "bias", None)
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    for name in module.active_adapters:
        if module.merged or name not in module.lora_A:
            continue
        lora_a, lora_b, s = module.lora_A[name], module.lora_B[name], module.scaling[name]
        weight = weight + s * (lora_b.weight.double() @ lora_a.weight.double())
        if name in module.lora_magnitude_vector:
            assert len(module.active_adapters) == 1
            norm = weight.detach().norm(dim=1)
            weight = (module.lora_magnitude_vector[name].weight.double() / norm)[:, None] * weight
        if lora_b.bias is not None:
            bias = bias + s * lora_b.bias.double()
    return weight, bias


@contextmanager
def computing(weights):
    """Within the context each module of `weights` computes with its (W, bias) alone."""
    before = {module: module.__dict__.get("forward") for module in weights}
    try:
        for module, weight in weights.items():
            module.forward = lambda x, weight=weight: F.linear(x, *weight)
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def tangent_factors(module):
    """B and A of the space {Σ B_k·X + Y·A_k} in which a layer's update moves W', with DoRA's row factors."""
    if isinstance(module, ParameterLoRA):
        a, b = module.lora_A.detach(), module.lora_B.detach()
        return (a.t(), b.t())[::-1] if module.stored_transposed else (b, a)
    bs, as_ = [], []
    for name in module.active_adapters:
        a, b = module.lora_A[name].weight.detach().double(), module.lora_B[name].weight.detach().double()
        if name in module.lora_magnitude_vector:
            raw = base_weight(module.get_base_layer()) + module.scaling[name] * b @ a
            b = (module.lora_magnitude_vector[name].weight.detach() / raw.norm(dim=1))[:, None] * b
        bs.append(b)
        as_.append(a)
    return torch.cat(bs, 1), torch.cat(as_)


def projection(module, grad):
    """P(G), with pseudo-inverses, on the tangent space of the layer's adapters; GraLoRA's block by block."""
    if not isinstance(module, GraLoRALinear):
        return projected(grad, *tangent_factors(module))
    A, B, k = module.gralora_A.detach(), module.gralora_B.detach(), module.k
    q, rows, columns = module.r // k, B.shape[2], A.shape[1]
    found = torch.zeros_like(grad)
    for i in range(k):
        for j in range(k):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            found[at] = projected(grad[at], B[i][j * q : (j + 1) * q].t(), A[j][:, i * q : (i + 1) * q].t())
    return found


def applied_weight(module, n):
    """The matrix that a layer really applies: its answers to the unit vectors less its answer to zero."""
    with torch.no_grad():
        like = next(p for p in module.parameters() if p.is_floating_point())
        return (module(torch.eye(n).to(like)) - module(torch.zeros(1, n).to(like))).t()


def noise_of(optimizer, name=None, dtype=torch.float64):
    """This step's dense ε (m, n) of a layer, from its seed; by default of the only layer."""
    layers = optimizer._source.layers
    name = name or next(iter(layers))
    draw, n = optimizer.current_perturbation()[name], layers[name].shape[1]
    if draw.kind == "gaussian":
        return draw_gaussian(draw, n, None, dtype)
    b, a = draw_low_rank(draw, n, dtype)
    return b @ a


def gradient_rows(optimizer):
    """What a GGPOOptimizer remembers of each layer's last gradient: its squared row norms (m,), or None."""
    return {name: layer["grad_sq"] for name, layer in optimizer.method_state()["layers"].items()}


def at_step(optimizer, step):
    """Has a GGPOOptimizer draw the noise of another step."""
    optimizer._source.step = step


def rank_correlation(x, y):
    """Spearman's: the correlation of the ranks."""
    ranks = torch.stack([x, y]).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


# --- operators ----------------------------------------------------------------------------------------------------


def tensors(*nested: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor))


class Counting(TorchDispatchMode):
    """Counts operators, views among them: each costs the host a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class OneDevice(TorchDispatchMode):
    """Notes the operators whose tensors are elsewhere than on `device`; numbers, which may come from the host, aside.

    An operator that would have the host wait for values raises by itself where `device` is ``"meta"``, which has none.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.mixed, self.count = device, set(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        found = {tensor.device.type for tensor in tensors(args, kwargs, out) if tensor.dim()}
        if found - {self.device}:
            self.mixed.add((str(func), *sorted(found)))
        return out


class HostReads(TorchDispatchMode):
    """Notes where the host waits for values: numbers read, shapes that depend on values, copies to the CPU.

    Attributes:
        count: how many there were.
        places: the files of flatlora in which they were, by their paths within it; "elsewhere" outside of it.
    """

    SHAPED = ("nonzero", "masked_select", "unique", "_unique", "equal", "is_nonzero", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.places = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        away = any(tensor.device.type != "cpu" for tensor in tensors(args, kwargs))
        copied = name in ("_to_copy", "copy_") and any(tensor.device.type == "cpu" for tensor in tensors(out))
        if away and (name.startswith(self.SHAPED) or copied):
            files = [frame.filename for frame in reversed(traceback.extract_stack())]
            ours = [file.removeprefix(PACKAGE) for file in files if file.startswith(PACKAGE)]
            self.count += 1
            self.places.add(ours[0] if ours else "elsewhere")
        return out


class Living(TorchDispatchMode):
    """Follows the storages that operators make: the bytes that are alive, and the most there were at once.

    Attributes:
        largest: elements of the largest tensor that was made, views of older ones aside.
        watched: bytes from which on a storage is large.
        outlived: operators that made a large storage which was still alive when a product after its first began.
    """

    def __init__(self, watched: float = float("inf")) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.watched = watched
        self.outlived: set[str] = set()
        self._alive: dict[int, int] = {}
        self._large: dict[int, tuple[str, int]] = {}  # who made it, and in how many products it has been since

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors(args, kwargs)}
        if "mm" in func.__name__:  # mm, addmm, bmm and baddbmm: all that has a weight's arithmetic
            self._large = {key: (maker, uses + 1) for key, (maker, uses) in self._large.items()}
            self.outlived |= {maker for maker, uses in self._large.values() if uses > 1}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in given or key in self._alive:
                continue
            self._alive[key] = size
            self.now += size
            self.largest = max(self.largest, tensor.numel())
            if size >= self.watched:
                self._large[key] = func.__name__, 0
            weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)
        self._large.pop(key, None)


# --- the two processes of a distributed test ----------------------------------------------------------------------


RANKS = 2


def full(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, gathered where they are sharded."""
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in values.items()}


def shard(model: nn.Module, *parts: nn.Module, **options: Any) -> None:
    """FSDP2 on each of the parts, a Llama's layers if there are none given, and on the whole."""
    from torch.distributed.fsdp import fully_shard

    layers = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    for module in (*(parts or layers), model):
        fully_shard(module, **options)
