"""Where batches come from: order, positions, streams, errors, and the split."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from problems import SGD, bilevel, difference, net_batch, peft_net, state_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flatlora import BilevelOptimizer, direction_parameters, split_dataset


def test_epochs_are_reshuffled_and_every_batch_comes_once():
    seen = []
    model = peft_net()

    def loss_fn(model, rows):
        seen.append(int(rows[0]))
        return model(**good).loss

    good = net_batch()
    data = DataLoader(TensorDataset(torch.arange(8)), shuffle=True)
    optimizer = bilevel(model, data, [[-1]], loss_fn=loss_fn, xi=0.0)
    for _ in range(16):
        optimizer.step()
    order = [i for i in seen if i >= 0]
    assert sorted(order[:8]) == sorted(order[8:]) == list(range(8)) and order[:8] != order[8:]


def test_split_dataset():
    data = list(range(50))
    stream = torch.get_rng_state()
    train, val = split_dataset(data)
    assert torch.equal(stream, torch.get_rng_state())
    assert len(val) == 10 and sorted([*train, *val]) == data
    assert list(split_dataset(data)[1]) == list(val) != list(split_dataset(data, seed=1)[1])
    assert [len(part) for part in split_dataset([1, 2], 0.01)] == [1, 1]
    for fraction in (0, 1, "half", True):
        with pytest.raises(ValueError, match="val_fraction"):
            split_dataset(data, fraction)
    with pytest.raises(ValueError, match="seed must"):
        split_dataset(data, seed=True)
    with pytest.raises(ValueError, match="two or more"):
        split_dataset([1])


# --- errors of a loader -------------------------------------------------------------------------------------------


class Flaky:
    """A list of batches whose iterator is dead once it has raised, as a generator is, at the fetches in `fails`."""

    def __init__(self, batches: list, fails: set[int]):
        self.batches, self.fails, self.fetches = batches, fails, -1

    def __iter__(self):
        for item in self.batches:
            self.fetches += 1
            if self.fetches in self.fails:
                raise OSError("disk")
            yield item


def recorded(model: nn.Module, train, seen: list[int], **kwargs) -> BilevelOptimizer:
    """A problem that notes which training batches come."""

    def loss_fn(model, data):
        if data["i"].flatten()[0] >= 0 and torch.is_grad_enabled():
            seen.append(int(data["i"].flatten()[0]))
        x, labels = (data[key].flatten(0, -2).double() for key in ("x", "labels"))
        return model(x=x, labels=labels).loss

    val = [{**net_batch(2), "i": torch.tensor([-1])}]
    return bilevel(model, train, val, loss_fn=loss_fn, xi=0.0, orthogonality=0.0, **kwargs)


def numbered(size: int) -> list[dict]:
    return [{**net_batch(1), "i": torch.tensor([i])} for i in range(size)]


@pytest.mark.parametrize("fails", [{0}, {1}, {3}, {1, 3}])
def test_a_batch_that_could_not_be_read_is_tried_again(fails):
    model, seen = peft_net(), []
    optimizer = recorded(model, Flaky(numbered(3), fails), seen)
    errors = 0
    while len(seen) < 6:
        before = optimizer.state_dict()
        try:
            optimizer.step()
        except OSError:
            errors += 1
            assert difference(before, optimizer.state_dict()) is None
    assert seen == [0, 1, 2, 0, 1, 2] and errors == len(fails)
    resumed: list[int] = []
    other = recorded(peft_net(), numbered(3), resumed)
    other.load_state_dict(before)
    other.step()
    assert resumed == [2]


def test_a_step_that_fails_leaves_a_loader_open_that_it_has_not_read_from():
    """Opened anew, its workers would start again and skip all batches before the position."""
    opened = []

    class Watched(list):
        def __iter__(self):
            opened.append(len(self))
            return super().__iter__()

    optimizer = bilevel(peft_net(), Flaky([net_batch()] * 4, {1}), Watched([net_batch()] * 3))
    optimizer.step()
    before = len(opened)
    with pytest.raises(OSError):
        optimizer.step()
    optimizer.step()
    assert len(opened) == before


def test_a_checkpoint_of_a_longer_loader_is_refused():
    model, data = peft_net(), numbered(8)
    optimizer = recorded(model, DataLoader(data, 1), [])
    for _ in range(5):
        optimizer.step()
    state = optimizer.state_dict()
    other = recorded(model, DataLoader(data, 2), [])
    before = other.state_dict()
    with pytest.raises(ValueError, match="after batch 5 of its epoch and has 4; give it the dataset"):
        other.load_state_dict(state)
    assert difference(before, other.state_dict()) is None
    other.step()
    unsized = recorded(model, Flaky(data[:3], set()), [])
    unsized.load_state_dict(state)
    for _ in range(2):
        with pytest.raises(ValueError, match="after batch 5 of its epoch and has 3"):
            unsized.step()


def test_a_loader_of_another_length_is_told_of(caplog):
    model, data = peft_net(), numbered(8)
    optimizer = recorded(model, DataLoader(data, 2), [])
    optimizer.step()
    recorded(model, DataLoader(data, 2), []).load_state_dict(optimizer.state_dict())
    assert not caplog.records
    recorded(model, DataLoader(data, 1), []).load_state_dict(optimizer.state_dict())
    assert "others than they would have been" in caplog.text


# --- streams ------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Numbered examples that can only be read in order."""

    def __init__(self, size: int = 7):
        self.rows = numbered(size)

    def __iter__(self):
        yield from self.rows


class Resumable(Stream):
    """One that goes on from where its state says, and so begins anew only at its end."""

    def __init__(self, size: int = 7):
        super().__init__(size)
        self.at = 0

    def __iter__(self):
        while self.at < len(self.rows):
            self.at += 1
            yield self.rows[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def hugging_face(size: int = 7):
    datasets = pytest.importorskip("datasets")
    rows = [{key: value.tolist() for key, value in row.items()} for row in numbered(size)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=1)
    return stream.with_format("torch")


def torchdata(dataset):
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(dataset, 2)


STREAMS = {
    "own state": lambda: DataLoader(Resumable(), 2),
    "datasets": lambda: DataLoader(hugging_face(), 2),
    "datasets, as the loader": lambda: hugging_face().batch(2),
    "torchdata": lambda: torchdata(Stream()),
    "torchdata, own state": lambda: torchdata(Resumable()),
    "torchdata, datasets": lambda: torchdata(hugging_face()),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_is_resumed_through_its_own_state(kind):
    seen, states = [], []
    optimizer = recorded(peft_net(), STREAMS[kind](), seen)
    for _ in range(10):
        states.append(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
    assert seen == [0, 2, 4, 6, 0, 2, 4, 6, 0, 2]
    resumed: list[int] = []
    other = recorded(peft_net(), STREAMS[kind](), resumed)
    for at in (6, 0, 1, 4, 9):  # there and back, within one process too
        other.load_state_dict(copy.deepcopy(states[at]))
        resumed.clear()
        for _ in range(5):
            other.step()
        assert resumed == (4 * [0, 2, 4, 6])[at : at + 5], at


@pytest.mark.parametrize("kind", [*STREAMS, "no state"])
def test_a_step_that_fails_takes_a_stream_back(kind):
    seen: list[int] = []
    loader = DataLoader(Stream(), 2) if kind == "no state" else STREAMS[kind]()
    optimizer = recorded(peft_net(), loader, seen, unroll_steps=3)
    optimizer.upper.register_step_pre_hook(lambda *_: 1 / 0 if fail else None)
    for fail in (True, False, False, True, True, False):
        if fail:
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
        else:
            optimizer.step()
    once = [0, 2, 4], [6, 0, 2], [4, 6, 0]
    assert seen == [*once[0], *once[0], *once[1], *once[2], *once[2], *once[2]]


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Stream(), 2),
        lambda: DataLoader(Resumable(), 2, num_workers=1),
        lambda: Accelerator(cpu=True).prepare(DataLoader(Resumable(), 2)),
    ],
    ids=["no state", "workers read ahead", "Accelerate reads ahead"],
)
def test_a_stream_without_a_state_works_and_is_refused_at_resume(loader):
    seen: list[int] = []
    optimizer = recorded(peft_net(), loader(), seen)
    start = optimizer.state_dict()
    for _ in range(5):
        optimizer.step()
    assert seen == [0, 2, 4, 6, 0]
    other = recorded(peft_net(), loader(), [])
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"is a stream .* 1 batches into it, .*StatefulDataLoader"):
        other.load_state_dict(optimizer.state_dict())
    assert difference(before, other.state_dict()) is None
    other.load_state_dict(start)
    other.step()


def test_phase_two_goes_on_in_a_stream():
    seen: list[int] = []
    model, stream = peft_net(), DataLoader(Stream(), 2)
    optimizer = recorded(model, numbered(2), seen)
    second = torch.optim.AdamW(direction_parameters(model), lr=0.01)
    for _ in range(3):
        optimizer.retrain(stream, 2, optimizer=second)
    assert seen == [0, 2, 4, 6, 0, 2]
    with pytest.raises(ValueError, match="is a stream"):
        optimizer.retrain(DataLoader(Stream(), 2), 2, optimizer=second)
    optimizer.retrain(stream, 1, optimizer=second)
    assert seen[-1] == 4


# --- a default device ---------------------------------------------------------------------------------------------


def test_another_default_device_changes_nothing():
    """A model on the CPU where new tensors go elsewhere by default; "meta" stands for a GPU and holds no numbers."""

    def run(device: str) -> list:
        model, data = peft_net(dropout=0.2), [net_batch(4) for _ in range(6)]
        torch.manual_seed(3)
        with torch.device(device):
            train, val = split_dataset(data, 0.4, seed=1)
            train, val = ([part[i] for i in range(len(part))] for part in (train, val))
            results: list = [split_dataset(range(9))[1].indices]
            for difference in ("central", "forward"):
                optimizer = bilevel(model, train, val, orthogonality=1e-3, difference=difference)
                results += [optimizer.step(), optimizer.hypergradient(train[0], val[0])]
            optimizer.load_state_dict(optimizer.state_dict())
            second = SGD(direction_parameters(model), lr=0.1)
            results += optimizer.retrain(data, 2, optimizer=second)
        return [*results, state_of(model)]

    assert difference(run("cpu"), run("meta")) is None
