"""Endless batches whose order a seed and a position determine."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from .. import checks
from ..streams import derived_seed, private_streams

logger = logging.getLogger("flatlora")


@dataclass(frozen=True, eq=False)
class Position:
    """A place in the cycle of epochs: the batch with this `index` in this `epoch` is the next one.

    A stream cannot be indexed. It is taken back to `stream_index`, where its state was `stream`, and read on from
    there; None while nothing has been read from it.
    """

    epoch: int = 0
    index: int = 0
    stream_index: int = 0
    stream: Any = None


class Batches:
    """Cycles through a dataloader. Epoch and index in it are the whole state; the global streams are not touched.

    Every batch is fetched with the global streams set from (seed, epoch, index), so whatever draws from them
    (`shuffle=True` without a generator, random augmentation, the seeds of workers) draws the same after a resume.
    Generators that the loader or its samplers own are seeded anew at each epoch, from the seed they came with and the
    epoch; samplers and datasets with a `set_epoch` are told the epoch. After an error the same batch is tried again.

    A loader is taken to a position by reading up to it. One over an `IterableDataset` is resumed in another process
    through the `state_dict` and `load_state_dict` of its own (torchdata's StatefulDataLoader) or, if it has no workers
    and so reads no further than it yields, of its dataset (Hugging Face `datasets`). With neither it works, but a
    checkpoint taken in the middle of it is refused.

    `loader` is any iterable of batches that can be iterated again and again, and `name` what error messages call it.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_iterator": None}  # a copy goes on from the position

    def __init__(self, loader: Any, name: str, seed: int):
        if not isinstance(loader, Iterable) or isinstance(loader, str | bytes):
            raise TypeError(f"{name} must be an iterable of batches, such as a DataLoader; got {type(loader).__name__}")
        if isinstance(loader, Iterator):
            raise TypeError(f"{name} is an iterator, which ends after one epoch; pass a DataLoader or a list")
        self.loader: Any = loader
        self._name, self._seed = name, seed
        if _length(loader) == 0:
            raise self._empty()
        self._generators = [(g, g.initial_seed()) for g in _generators(loader)]
        self._streams, self._stream = _is_stream(loader), _resumable_stream(loader)
        self._first: Any = None  # state of the stream before anything was read from it
        self._iterator: Iterator[Any] | None = None
        self.position = Position()

    def next(self) -> Any:
        """The next batch; goes on to the next epoch when there is none left."""
        before = self.position
        try:
            return self._next()
        except BaseException:
            self._iterator = None  # one that raised may be at its end, or one batch further
            self.restore(before)
            raise

    def restore(self, position: Position) -> None:
        """Makes the batch at `position`, which this object was at before, the next one."""
        if position is not self.position:  # or workers would start anew and skip the batches before it
            self._iterator = None
        self.position = position if position.stream is not None else replace(position, stream=self._first)

    def _next(self) -> Any:
        if self._iterator is None:
            self._open()
        at = self.position
        try:
            batch = self._fetch(at.index)
        except StopIteration:
            if at.index == 0:
                raise self._empty() from None
            self.position, self._iterator = Position(at.epoch + 1), None
            return self._next()
        self.position = replace(at, index=at.index + 1)
        return batch

    def _open(self) -> None:
        """Begins the epoch and skips the batches before the position."""
        epoch, index = self.position.epoch, self.position.index
        parts = (getattr(self.loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))
        for owner in (self.loader, *parts):
            if callable(set_epoch := getattr(owner, "set_epoch", None)):
                set_epoch(epoch)
        for generator, seed in self._generators:
            generator.manual_seed(derived_seed(seed, epoch))
        with private_streams(derived_seed(self._seed, self._name, epoch)):
            if self._stream is not None:
                self._open_stream()
            self._iterator = iter(self.loader)
        for skipped in range(self.position.stream_index, index):
            try:
                self._fetch(skipped)
            except StopIteration:
                raise self._too_short(index, skipped) from None

    def _open_stream(self) -> None:
        """Takes the stream back to where it was opened first, or notes where that is."""
        at = self.position
        if self._first is None:
            self._first = copy.deepcopy(self._stream.state_dict())
        if at.stream is not None:
            self._stream.load_state_dict(copy.deepcopy(at.stream))
        else:
            self.position = replace(at, stream_index=0, stream=copy.deepcopy(self._stream.state_dict()))

    def _fetch(self, index: int) -> Any:
        assert self._iterator is not None
        with private_streams(derived_seed(self._seed, self._name, self.position.epoch, index)):
            return next(self._iterator)

    def _empty(self) -> ValueError:
        return ValueError(
            f"{self._name} yields no batch; is its dataset empty, or smaller than batch_size with drop_last=True?"
        )

    def _too_short(self, index: int, length: int) -> ValueError:
        return ValueError(
            f"{self._name} is to go on after batch {index} of its epoch and has {length}; give it the dataset and the "
            "batch size that it had when the checkpoint was saved"
        )

    def state_dict(self) -> dict[str, Any]:
        at, stream = self.position, None
        if self._stream is not None and at.index > 0:
            if self._iterator is None and at.index != at.stream_index:
                self._open()
            stream = at.stream if self._iterator is None else copy.deepcopy(self._stream.state_dict())
        return {
            "seed": self._seed,
            "epoch": at.epoch,
            "index": at.index,
            "length": _length(self.loader),
            "generators": [seed for _, seed in self._generators],
            "stream": stream,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is incomplete, or this loader cannot be taken there. Changes nothing."""
        check_position(self._name, state)
        index, length = state["index"], _length(self.loader)
        if not self._streams and length is not None and index > length:
            raise self._too_short(index, length)
        if self._streams and index > 0 and (self._stream is None or state["stream"] is None):
            whose = "this one" if self._stream is None else "the checkpoint's"
            raise ValueError(
                f"{self._name} is a stream and the checkpoint was taken {index} batches into it, but {whose} cannot "
                "tell where it stood: it needs state_dict() and load_state_dict(), as torchdata's StatefulDataLoader "
                "has them, or a DataLoader with num_workers=0 over a dataset that has them"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes where `state` says. A ValueError of `check_state_dict` changes nothing."""
        self.check_state_dict(state)
        index, seeds = state["index"], state["generators"]
        theirs, ours = (state["length"], len(seeds)), (_length(self.loader), len(self._generators))
        if index > 0 and theirs != ours:
            logger.warning(
                "%s goes on after batch %d of an epoch of %s with %d generators; it now has %s and %d, so the batches "
                "of this epoch are others than they would have been",
                *(self._name, index, *theirs, *ours),
            )
        if len(seeds) == len(self._generators):
            self._generators = [(generator, seed) for (generator, _), seed in zip(self._generators, seeds, strict=True)]
        self._seed, self._iterator = state["seed"], None
        stream = self._first if state["stream"] is None else state["stream"]
        opened = (index, stream) if self._streams else (0, None)
        self.position = Position(state["epoch"], index, *opened)


def two_splits(train: Any, val: Any, seed: int) -> tuple[Batches | None, Batches]:
    """Batches of both levels; none of the lower's where a loop runs them. Warns if one loader is given twice."""
    if train is val is not None:
        warnings.warn(
            "the same object is both train_dataloader and val_dataloader, so magnitudes are trained on the data of the "
            "directions; split the data, for example with flatlora.split_dataset",
            stacklevel=3,
        )
    return None if train is None else Batches(train, "train_dataloader", seed), Batches(val, "val_dataloader", seed)


def check_position(name: str, state: Any) -> None:
    """ValueError unless `state` has the form of what `Batches.state_dict` gives."""
    name = f"position of {name}"
    checks.state_fields(name, state, "seed", "epoch", "index", "length", "generators", "stream")
    seeds = state["generators"]
    if not isinstance(seeds, list):
        raise ValueError(f"generators in the state_dict's {name} must be a list, got {seeds!r}")
    found = [(field, state[field]) for field in ("seed", "epoch", "index", "length")]
    for field, value in [*found, *(("a generator", seed) for seed in seeds)]:
        if value is not None or field != "length":
            checks.integer(f"{field} in the state_dict's {name}", value, 0)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # also what a DataLoader over an IterableDataset has its __len__ raise
        return None


def _generators(loader: Any) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _has_state(thing: Any) -> bool:
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))


def _is_stream(loader: Any) -> bool:
    """Whether the batches can't be indexed."""
    if (dataset := getattr(loader, "dataset", None)) is None:
        return isinstance(loader, IterableDataset) or _has_state(loader)
    return isinstance(dataset, IterableDataset)


def _resumable_stream(loader: Any) -> Any:
    """The loader of a stream, or its dataset, whichever knows its position; None if neither does."""
    # Accelerate's loaders read one batch ahead of what they yield, and have the methods whether or not they work.
    if not _is_stream(loader) or not getattr(loader, "use_stateful_dataloader", True):
        return None
    if _has_state(loader):
        return loader
    # Workers read ahead, in copies of the dataset.
    dataset = getattr(loader, "dataset", None)
    return dataset if getattr(loader, "num_workers", 0) == 0 and _has_state(dataset) else None


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`; mappings, lists and tuples are gone through."""
    if callable(getattr(batch, "to", None)):
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
        seed: of the split alone, an integer >= 0; no random stream is touched.

    Returns:
        Two `torch.utils.data.Subset`, or two Hugging Face datasets, the examples in their former order.

    Raises:
        ValueError: a fraction outside (0, 1), a bad seed, fewer than two examples.
    """
    val_fraction, seed = checks.number("val_fraction", val_fraction, above=0, below=1), checks.integer("seed", seed, 0)
    if len(dataset) < 2:
        raise ValueError(f"a split needs two or more examples, the dataset has {len(dataset)}")
    count = min(max(round(val_fraction * len(dataset)), 1), len(dataset) - 1)
    # On the CPU whatever the default device, or the split would depend on it.
    generator = torch.Generator("cpu").manual_seed(seed)
    order: Tensor = torch.randperm(len(dataset), generator=generator, device="cpu")
    parts = order[count:].sort().values.tolist(), order[:count].sort().values.tolist()
    if callable(getattr(dataset, "select", None)):
        return dataset.select(parts[0]), dataset.select(parts[1])
    return torch.utils.data.Subset(dataset, parts[0]), torch.utils.data.Subset(dataset, parts[1])
