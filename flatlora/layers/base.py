"""The frozen weight of a linear layer: one class for each way of storing it."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..kernels.low_rank import autocasts

_BLOCK = 1 << 22  # elements of a base weight that are upcast at a time
_CPU_BLOCK = 1 << 18  # on a CPU, in whose cache they stay
OFFLOADED = (
    "Accelerate keeps its weights off the model between passes (cpu_offload, disk_offload, or a device_map that does), "
    "where they can't be read and adapters get no gradient; give the model a device, or quantise it"
)
_OWN = (nn.Parameter, Tensor)
_STORING = ("torch.distributed.", "torch._", "bitsandbytes.")  # modules whose tensor classes store their values
_UNITS = 128  # unit vectors that an opaque layer is applied to at a time
# torch multiplies bfloat16 into a float32 result on NVIDIA GPUs alone, from version 2.8 on.
_MIXES = torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")
_float64 = {"cpu": True, "cuda": True, "meta": True, "mps": False}  # other kinds of device are tried once


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype for small sums and r×r algebra: float64 where the device has it, else float32."""
    return torch.float64 if _has_float64(device.type) else torch.float32


@torch.compiler.assume_constant_result
def _has_float64(kind: str) -> bool:
    if kind not in _float64:
        try:
            torch.ones(1, dtype=torch.float64, device=kind).add_(1)  # some devices allocate float64 and have no kernels
            _float64[kind] = True
        except (RuntimeError, TypeError):
            _float64[kind] = False
    return _float64[kind]


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (FSDP2, tensor parallel); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def corner(tensor: Tensor) -> bytes | None:
    """The bits of a CPU tensor's first element, which show writes through `.data`; None for other tensors.

    Autograd does not count these writes. No operator is launched.
    """
    if tensor.device.type != "cpu" or not tensor.numel() or hasattr(tensor, "full_tensor"):
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a fake tensor, or one wrapped by torch.func
        return None
    return ctypes.string_at(address, tensor.itemsize) if address else None


def hooked(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks, or a `forward` of its own on the instance."""
    in_forward = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return bool(in_forward or module._backward_hooks or module._backward_pre_hooks)


def stacked_row_sq(bases: Sequence[BaseWeight]) -> Tensor:
    """``‖W0_i‖²`` (L, m) of bases of one shape on one device, in `sum_dtype`.

    A CPU widens its weights block by block, in cache. Elsewhere launches count: one for each base, two for all.
    """
    device = bases[0].device
    if device.type == "cpu":
        return torch.stack([base.row_sq() for base in bases])
    return torch.stack([base.row_norms() for base in bases]).to(sum_dtype(device)).square_()


class BaseWeight(ABC):
    """The frozen weight ``W0`` of a linear layer, of shape (m, n) = (out_features, in_features).

    `flatlora.layers.bases.base_weight` chooses the class for a layer. Call it whenever the weight is needed and do not
    keep the result: bitsandbytes quantises a weight on the first `.to()`, and torchao replaces the tensor.

    Args:
        module: the layer.
        shape: (m, n).
        transposed: whether the layer stores its weight as (n, m), as `Conv1D` does.
    """

    kind: ClassVar[Literal["float", "4bit", "8bit", "opaque"]]  # opaque: it can only be called

    def __init__(self, module: nn.Module, shape: tuple[int, int], transposed: bool):
        self.module: Any = module
        self.shape = shape
        self.transposed = transposed

    @staticmethod
    @abstractmethod
    def reads(module: nn.Module, weight: Any) -> bool:
        """Whether this class reads `module`; `weight` is the module's attribute of that name, or None."""

    @property
    @abstractmethod
    def plain(self) -> bool:
        """Whether the module's class computes ``x·W0ᵀ + bias`` and nothing else."""

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of floats in which the weight's values are held or dequantised; None where that is not known."""
        return None

    @property
    def mixes(self) -> bool:
        """Whether products with bfloat16 rows are as in float32: neither the sums nor the result are rounded."""
        return _MIXES and self.stored_dtype == torch.bfloat16 and self.device.type == "cuda"

    @property
    def trainable(self) -> bool:
        weight = getattr(self.module, "weight", None)
        return isinstance(weight, Tensor) and weight.requires_grad

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    @property
    def version(self) -> tuple[Any, ...] | None:
        """A value that changes when the weight is written to or replaced; None where that can't be known (sharded).

        A write through `.data` is noticed on a CPU, if it changes the first element. On a GPU neither it nor a new
        storage (``p.data = ...``) is noticed; ``with torch.no_grad(): p.add_(...)`` is.
        """
        tensors = list(self._tensors())
        if any(tensor.is_inference() or hasattr(tensor, "full_tensor") for tensor in tensors):
            return None
        return tuple((id(tensor), tensor._version, corner(tensor)) for tensor in tensors)

    def _tensors(self) -> Iterable[Tensor]:
        """What the weight is stored in."""
        return (self.module.weight,)

    def fault(self) -> str | None:
        """Why adapters over this weight can't be trained at present, and what to do; None if they can."""
        weight = getattr(self.module, "weight", None)
        offloaded = isinstance(weight, Tensor) and weight.is_meta and hasattr(self.module, "_hf_hook")
        return OFFLOADED if offloaded else None

    def fusable(self, x: Tensor) -> bool:
        """Whether ``x·W0ᵀ + bias`` may replace the module's forward: it is frozen, plain and without hooks."""
        return self.plain and not self.trainable and not hooked(self.module)

    def float_weight(self) -> Tensor:
        """The stored float weight as (m, n), a view where it is transposed. Only `FloatBase` has one."""
        raise TypeError(
            f"the weight of a {type(self.module).__name__} is not stored as floats ({self.kind}); read it with dense()"
        )

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """W0 (m, n) in `dtype`. It is the stored weight itself where that has this dtype, else a copy."""

    def write(self, weight: Tensor) -> None:
        """Makes `weight` (m, n) the layer's weight, stored as the old one: transposed, rounded or quantised.

        The layer gets a new parameter; other holders keep the old one. A ValueError changes nothing.
        """
        if tuple(weight.shape) != tuple(self.shape):
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} can't be written to a {type(self.module).__name__} whose "
                f"weight is {tuple(self.shape)}"
            )
        self._store(weight.detach())

    @abstractmethod
    def _store(self, weight: Tensor) -> None: ...

    def row_sq(self) -> Tensor:
        """``‖W0_i‖²``, shape (m,)."""
        return torch.cat([block.square().sum(1) for block in self._row_blocks(sum_dtype(self.device))])

    def row_norms(self) -> Tensor:
        """``‖W0_i‖``, shape (m,), summed in float32; on a GPU by one kernel, which widens half precision itself."""
        stored = self.stored_dtype
        if stored is None:
            return self.row_sq().sqrt()
        wide = stored if stored == torch.float64 else torch.float32
        return torch.linalg.vector_norm(self.dense(stored), dim=1, dtype=wide)

    def apply_rows(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        """``W0·xᵀ`` of shape (m, r) for x (r, n), or ``W0[:, columns]·xᵀ`` for as many columns. No (m, n) temporary."""
        return torch.cat([block[:, columns] @ x.t() for block in self._row_blocks(x.dtype)])

    def apply_blocks(self, x: Tensor) -> Tensor:
        """``W0_ij·X_ijᵀ`` of shape (k, k, m/k, r) for a grid of k×k blocks X_ij, shape (k, k, r, n/k)."""
        k, _, r, width = x.shape
        if k == 1:
            return self.apply_rows(x[0, 0])[None, None]
        parts = []
        for j in range(k):
            crossed = self.apply_rows(x[:, j].flatten(0, 1), slice(j * width, (j + 1) * width))
            # Block row i needs its own r of the k·r products alone.
            parts.append(crossed.reshape(k, -1, k, r).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        return torch.stack(parts, 1)

    def _row_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Consecutive blocks of rows in `dtype`, none larger than a fixed number of elements."""
        weight = self.dense(self.stored_dtype or torch.float32)
        for rows in self._row_slices():
            yield weight[rows].to(dtype)

    def _row_slices(self) -> list[slice]:
        m, n = self.shape
        rows = max(1, (_CPU_BLOCK if self.device.type == "cpu" else _BLOCK) // n)
        return [slice(i, i + rows) for i in range(0, m, rows)]

    def _padded(self, x: Tensor, columns: slice) -> Tensor:
        """x (r, n) with zeros outside of `columns`, for layers that multiply by all of W0."""
        if x.shape[1] == self.shape[1]:
            return x
        padded = x.new_zeros(x.shape[0], self.shape[1])
        padded[:, columns] = x
        return padded


class FloatBase(BaseWeight):
    """A tensor of floats: `nn.Linear`, classes derived from it, and `Conv1D`, which stores it transposed."""

    kind = "float"

    @staticmethod
    def reads(module: nn.Module, weight: Any) -> bool:
        # Not read: quantised tensors that pose as floats (torchao's subclasses), 8-bit floats, which need a scale, and
        # weights that are computed from others (parametrizations).
        return (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and weight.dtype.itemsize > 1
            and weight.dim() == 2
            and ("weight" in module._parameters or "weight" in module._buffers)
            and (type(weight) in _OWN or type(weight).__module__.startswith(_STORING))
        )

    @property
    def plain(self) -> bool:
        cls = type(self.module)
        is_conv1d = cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        return cls.forward is nn.Linear.forward or is_conv1d

    def fusable(self, x: Tensor) -> bool:
        # A float layer refuses an input of another dtype, and so must what replaces it.
        fits = x.dtype == self.module.weight.dtype or autocasts(x.device)
        return fits and super().fusable(x)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        return self.module.weight.dtype

    def float_weight(self) -> Tensor:
        return self.module.weight.t() if self.transposed else self.module.weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        return full_tensor(self.float_weight().detach()).to(dtype)

    def _store(self, weight: Tensor) -> None:
        old = self.module.weight
        if type(old) not in _OWN:
            raise ValueError(
                f"the weight of a {type(self.module).__name__} is a {type(old).__name__} and can't be written as it "
                "is; gather it if it is sharded, or move the model to its device first if it is still to be quantised"
            )
        new = weight.to(old.device, old.dtype)
        new = new.t().contiguous() if self.transposed else new
        self.module.weight = nn.Parameter(new, requires_grad=old.requires_grad)

    def apply_rows(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        if x.dtype != self.stored_dtype:
            return super().apply_rows(x, columns)
        factors = self.dense(x.dtype)[:, columns], x.t()
        return torch.mm(*factors, out_dtype=torch.float32) if self.mixes else torch.mm(*factors)


class OpaqueBase(BaseWeight):
    """A layer of which it is known only that it is affine: AWQ, GPTQ, HQQ, torchao, 8-bit floats and others.

    Its weight is its output for the unit vectors less its output for zero, the bias. The layer need not have an
    attribute `weight`, nor any parameter. If it also rounds its input, as torchao's dynamic quantisation does, what is
    read is correct up to that rounding.
    """

    kind = "opaque"
    plain = False

    @staticmethod
    def reads(module: nn.Module, weight: Any) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        found = next((tensor.device for tensor in self._tensors()), None)
        if found is None:
            raise ValueError(
                f"{type(self.module).__name__} holds no parameter and no buffer, so its device is unknown; register "
                "one of its tensors as a buffer"
            )
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([columns.to(dtype) for columns in self._columns()], 1)

    def _store(self, weight: Tensor) -> None:
        raise ValueError(
            f"the weight of a {type(self.module).__name__} can't be written, as the layer can only be called; change "
            "the float model that it was quantised from"
        )

    def row_sq(self) -> Tensor:
        total = torch.zeros(self.shape[0], dtype=sum_dtype(self.device), device=self.device)
        for columns in self._columns():
            total += columns.to(total.dtype).square().sum(1)
        return total

    def apply_rows(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        x = self._padded(x, columns)
        y = self.module(torch.cat([x, x.new_zeros(1, x.shape[1])]).to(self._dtype() or x.dtype))
        return (y[:-1] - y[-1:]).t().to(x.dtype)

    def _columns(self) -> Iterator[Tensor]:
        """W0 (m, n) as blocks of consecutive columns, in the layer's own dtype."""
        n, dtype = self.shape[1], self._dtype() or torch.float32
        for i in range(0, n, _UNITS):
            units = torch.zeros(min(_UNITS, n - i), n, dtype=dtype, device=self.device)
            units[:, i:].fill_diagonal_(1.0)
            yield self.apply_rows(units)

    def _dtype(self) -> torch.dtype | None:
        """The dtype that the layer computes in, if its tensors or its `compute_dtype` (HQQ) say so."""
        for tensor in self._tensors():
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
                return tensor.dtype
        said = getattr(self.module, "compute_dtype", None)
        return said if isinstance(said, torch.dtype) else None

    def _tensors(self) -> Iterable[Tensor]:
        return chain(self.module.parameters(), self.module.buffers())
