"""Random streams: the global ones, held and put back, and private seeds that draw from none of them."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch


def shared_seed() -> int:
    """Torch's initial seed, read without touching the stream; rank 0's on every rank."""
    seed = [torch.initial_seed()]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seed)
    return seed[0]


class RandomStreams:
    """The states of the global random streams: torch's on the CPU and on `devices`, Python's, NumPy's."""

    def __init__(self, devices: Iterable[torch.device] = ()):
        self._cpu = torch.get_rng_state()
        others = [device for device in devices if device.type not in ("cpu", "meta")]
        self._devices = [(device, torch.get_device_module(device).get_rng_state(device)) for device in others]
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextmanager
def private_streams(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Within the context the global streams start from `seed`; they are restored afterwards."""
    devices = list(devices)
    before = RandomStreams(devices)
    try:
        torch.default_generator.manual_seed(seed)
        for device, _ in before._devices:
            module = torch.get_device_module(device)
            with module.device(device) if hasattr(module, "device") else nullcontext():  # MPS has but one
                module.manual_seed(seed)
        random.seed(seed)
        if before._numpy is not None:
            sys.modules["numpy"].random.seed(seed % 2**32)
        yield
    finally:
        before.restore()


def derived_seed(*parts: object) -> int:
    """A seed that is a function of `parts`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
