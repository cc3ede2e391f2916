"""Dispatch modes that see every operator of a training step: which devices it mixes, how many there are, what lives."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
            ours = [file.rpartition("/flatlora/")[2] for file in files if "/flatlora/" in file]
            self.count += 1
            self.places.add(ours[0] if ours else "elsewhere")
        return out


class Living(TorchDispatchMode):
    """Follows the storages that operators make: the bytes that are alive, and the most there were at once.

    Attributes:
        watched: bytes from which on a storage is large.
        outlived: operators that made a large storage which was still alive when a product after its first began.
    """

    def __init__(self, watched: float = float("inf")) -> None:
        super().__init__()
        self.now = self.peak = 0
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
            if size >= self.watched:
                self._large[key] = func.__name__, 0
            weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)
        self._large.pop(key, None)
