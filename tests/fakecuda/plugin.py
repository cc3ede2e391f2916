"""`pytest -p fakecuda.plugin`: tests find a CUDA device, which `device.cpp` makes. $FAKECUDA is the library.

Torch decides at its import which devices there are, so this comes before it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

assert "torch" not in sys.modules, "-p fakecuda.plugin has to come before torch is imported"
ctypes.CDLL(os.environ["FAKECUDA"])

# They ask for CUDA while they are imported, and then for more than there is here.
for name in ("torch._dynamo", "torch._inductor", "bitsandbytes", "transformers", "peft", "accelerate"):
    importlib.import_module(name)

import torch  # noqa: E402

DEFAULT = torch.Generator("cuda")  # the first is the default one


class Stream:
    """Work is done when it is asked for, so there is nothing to order."""

    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...
    def synchronize(self) -> None: ...


def nothing(*args: Any, **kwargs: Any) -> None: ...


def always(value: Any) -> Any:
    return lambda *args, **kwargs: value


STREAM = Stream()
PROPERTIES = SimpleNamespace(
    name="fake", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, warp_size=32
)
REPLACED = {
    "_initialized": True,
    "_is_in_bad_fork": always(False),
    "_lazy_init": nothing,
    "current_device": always(0),
    "current_stream": always(STREAM),
    "default_generators": (DEFAULT,),
    "default_stream": always(STREAM),
    "device_count": always(1),
    "empty_cache": nothing,
    "get_device_capability": always((9, 0)),
    "get_device_name": always("fake"),
    "get_device_properties": always(PROPERTIES),
    "get_rng_state": lambda device="cuda": DEFAULT.get_state(),
    "is_available": always(True),
    "is_bf16_supported": always(True),
    "is_current_stream_capturing": always(False),
    "is_initialized": always(True),
    "manual_seed": DEFAULT.manual_seed,
    "manual_seed_all": DEFAULT.manual_seed,
    "max_memory_allocated": always(0),
    "memory_allocated": always(0),
    "reset_peak_memory_stats": nothing,
    "set_device": nothing,
    "set_rng_state": lambda state, device="cuda": DEFAULT.set_state(state),
    "set_stream": nothing,
    "stream": always(nullcontext()),
    "Stream": Stream,
    "synchronize": nothing,
    "_exchange_device": always(0),
    "_maybe_exchange_device": always(0),
}
for name, value in REPLACED.items():
    setattr(torch.cuda, name, value)
for name in ("get_rng_state", "manual_seed", "manual_seed_all", "set_rng_state"):
    setattr(torch.cuda.random, name, REPLACED[name])


# Python can't ask for storages of the device, only for tensors.


def moved(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return torch.empty(storage.nbytes(), dtype=torch.uint8, device="cuda").untyped_storage().copy_(storage)


def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return moved(storage) if storage.device.type == "cuda" else clone_of_others(storage)


def loaded(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    return moved(storage) if location.startswith("cuda") else None


clone_of_others = torch.UntypedStorage.clone
torch.UntypedStorage.clone = clone
torch.serialization.register_package(0, always(None), loaded)
