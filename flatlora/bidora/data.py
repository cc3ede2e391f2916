"""Endless batches whose order a seed and a position determine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from ..streams import derived_seed, private_streams

__all__ = ["Batches", "split_dataset", "to_device"]


class Batches:
    """Cycles through a dataloader. Epoch and index in it are the whole state; the global streams are not touched.

    Every batch is fetched with the global streams set from (seed, epoch, index), and put back afterwards, so whatever
    draws from them (`shuffle=True` without a generator, random augmentation, the seeds of workers) draws the same
    after a resume. Generators that the loader or its samplers own are seeded anew at each epoch, from the seed they
    came with and the epoch; samplers with a `set_epoch` are told the epoch.

    Args:
        loader: any iterable of batches that can be iterated again and again. A list has the same order every time.
        name: what error messages call it.
        seed: of the order.

    Raises:
        ValueError: it is empty.
        TypeError: it can be iterated once only, or not at all.
    """

    def __init__(self, loader: Any, name: str, seed: int):
        if not isinstance(loader, Iterable):
            raise TypeError(f"{name} must be an iterable of batches, such as a DataLoader; got {type(loader).__name__}")
        if isinstance(loader, Iterator):
            raise TypeError(
                f"{name} is an iterator, which ends after one epoch; pass a DataLoader or a list of batches"
            )
        self._name = name
        self._loader: Any = loader
        if isinstance(loader, Sized) and len(loader) == 0:
            raise self._empty()
        self._seed = seed
        self._generators = [(g, g.initial_seed()) for g in _generators(loader)]
        self._iterator: Iterator[Any] | None = None
        self.epoch = self.index = 0

    def next(self) -> Any:
        """The next batch; goes on to the next epoch when there is none left."""
        if self._iterator is None:
            self._open()
        try:
            batch = self._fetch(self.index)
        except StopIteration:
            if self.index == 0:
                raise self._empty() from None
            self.epoch, self.index = self.epoch + 1, 0
            self._iterator = None
            return self.next()
        self.index += 1
        return batch

    def _open(self) -> None:
        """Begins the epoch and skips the batches before `index`."""
        samplers = (getattr(self._loader, name, None) for name in ("sampler", "batch_sampler"))
        for owner in (self._loader, *samplers):
            if callable(getattr(owner, "set_epoch", None)):
                owner.set_epoch(self.epoch)
        for generator, seed in self._generators:
            generator.manual_seed(derived_seed(seed, self.epoch))
        with private_streams(derived_seed(self._seed, self._name, self.epoch)):
            self._iterator = iter(self._loader)
        for index in range(self.index):
            self._fetch(index)

    def _fetch(self, index: int) -> Any:
        assert self._iterator is not None
        with private_streams(derived_seed(self._seed, self._name, self.epoch, index)):
            return next(self._iterator)

    def _empty(self) -> ValueError:
        return ValueError(
            f"{self._name} yields no batch; is its dataset empty, or smaller than batch_size with drop_last=True?"
        )

    def state_dict(self) -> dict[str, Any]:
        seeds = [seed for _, seed in self._generators]
        return {"seed": self._seed, "epoch": self.epoch, "index": self.index, "generators": seeds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seed, self.epoch, self.index = state["seed"], state["epoch"], state["index"]
        if len(state["generators"]) == len(self._generators):
            pairs = zip(self._generators, state["generators"], strict=True)
            self._generators = [(generator, seed) for (generator, _), seed in pairs]
        self._iterator = None


def _generators(loader: Any) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`; mappings, lists and tuples are gone through."""
    if isinstance(batch, Tensor) or callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return type(batch)(to_device(value, device) for value in batch)  # type: ignore[call-arg]
    return batch


def split_dataset(dataset: Any, val_fraction: float = 0.2, seed: int = 0) -> tuple[Any, Any]:
    """Splits a dataset at random into (train, validation), the same way for the same seed.

    Args:
        dataset: anything with a length and an index; a Hugging Face dataset is split by its `select`.
        val_fraction: share of the validation part, rounded to whole examples; neither part is ever empty.
        seed: of the split alone; no random stream is touched.

    Returns:
        Two `torch.utils.data.Subset`, or two Hugging Face datasets, the examples in their former order.

    Raises:
        ValueError: a fraction outside (0, 1), fewer than two examples.
    """
    if not (isinstance(val_fraction, int | float) and 0 < val_fraction < 1):
        raise ValueError(f"val_fraction must be a number between 0 and 1, got {val_fraction!r}")
    if len(dataset) < 2:
        raise ValueError(f"a split needs two or more examples, the dataset has {len(dataset)}")
    count = min(max(round(val_fraction * len(dataset)), 1), len(dataset) - 1)
    order: Tensor = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    parts = order[count:].sort().values.tolist(), order[:count].sort().values.tolist()
    if callable(getattr(dataset, "select", None)):
        return dataset.select(parts[0]), dataset.select(parts[1])
    return torch.utils.data.Subset(dataset, parts[0]), torch.utils.data.Subset(dataset, parts[1])
