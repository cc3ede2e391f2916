"""Faults while an adapter is written: what is read afterwards is the old one or the new one, whole."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import time

import pytest
import torch
from peft import GraloraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from saving import numbered, save_for_ever, save_under_a_limit
from torch import nn

from flatlora import load_gralora, save_gralora

CONFIG, WEIGHTS, FORMER = "adapter_config.json", "adapter_model.safetensors", "adapter_config.former.json"
STEPS = ("open", "fsync", "replace", "unlink")


def plain(width=16):
    return nn.Sequential(nn.Linear(width, width))


def found(folder, width=16):
    """The number of the adapter in `folder`, if it is a whole one."""
    layer = load_gralora(plain(width), folder)[0]
    values = {layer.alpha, *layer.gralora_A.unique().tolist(), *layer.gralora_B.unique().tolist()}
    assert len(values) == 1, f"a mixture of {values}"
    return int(values.pop())


def found_by_peft(folder, width=16):
    """The same through PEFT; None where it refuses."""
    try:
        layer = PeftModel.from_pretrained(plain(width), folder).base_model.model[0]
    except ValueError as reason:
        assert "Can't find 'adapter_config.json'" in str(reason)
        return None
    alpha = layer.scaling["default"] * 4
    values = {alpha, *layer.gralora_A["default"].unique().tolist(), *layer.gralora_B["default"].unique().tolist()}
    assert len(values) == 1, f"a mixture of {values}"
    return int(values.pop())


def save_with_peft(number, folder):
    config = GraloraConfig(r=4, gralora_k=2, alpha=number, target_modules=["0"])
    model = get_peft_model(plain(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gralora_" in name:
                parameter.fill_(number)
    model.save_pretrained(folder)


class Faults:
    """Lets the `first` system call of a save fail: that one alone or, as after a kill, all that follow as well."""

    def __init__(self, monkeypatch, first, kill):
        self.first, self.kill, self.calls = first, kill, []
        for name in STEPS:
            monkeypatch.setattr(os, name, self.failing(name, getattr(os, name)))

    def failing(self, name, call):
        def wrapped(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) == self.first or (self.kill and len(self.calls) > self.first):
                raise KeyboardInterrupt if self.kill else OSError(28, f"No space left on device, at {name}")
            return call(*args, **kwargs)

        return wrapped


def interrupted(monkeypatch, folder, first, kill, number=3):
    """Saves adapter `number` with a fault at its `first` system call; whether the fault came, and the calls."""
    model = numbered(number)
    with monkeypatch.context() as patch:
        faults = Faults(patch, first, kill)
        try:
            save_gralora(model, folder)
        except (OSError, KeyboardInterrupt):
            return True, faults.calls
    return False, faults.calls


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("old", [None, 2, 3])
def test_a_fault_at_any_step_leaves_the_old_or_the_new(tmp_path, monkeypatch, old, kill):
    """`old` 3 is an adapter of the same configuration, which PEFT too must find at every moment."""
    outcomes = []
    for first in range(1, 40):
        folder = tmp_path / str(first)
        if old is not None:
            save_gralora(numbered(old), folder)
            folder.joinpath("README.md").write_text("keep me")
        if old == 3:  # the same numbers, other weights
            model = numbered(3)
            with torch.no_grad():
                model[0].gralora_B.fill_(5)
            save_gralora(model, folder)
        came, calls = interrupted(monkeypatch, folder, first, kill)
        if not came:
            break
        if old is None:
            try:
                outcomes.append(found(folder))
            except FileNotFoundError:
                outcomes.append(None)
            assert found_by_peft(folder) in (None, outcomes[-1])
        elif old == 2:
            outcomes.append(found(folder))
            assert found_by_peft(folder) in (None, outcomes[-1])
        else:
            B = load_gralora(plain(), folder)[0].gralora_B.unique().tolist()
            peft = PeftModel.from_pretrained(plain(), folder).base_model.model[0].gralora_B["default"]
            assert peft.unique().tolist() == B
            outcomes.append({5: 2, 3: 3}[B[0]])
        if old is not None:
            assert folder.joinpath("README.md").read_text() == "keep me"
        save_gralora(numbered(7), folder)  # and the next save is as any
        assert found(folder) == found_by_peft(folder) == 7
        kept = {"README.md"} if old is not None else set()
        assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS, *kept}
    assert set(calls) >= {"fsync", "replace"} and len(outcomes) >= 6
    before = None if old is None else 2
    assert set(outcomes) == {before, 3} and outcomes == sorted(outcomes, key=lambda number: number == 3)


def test_an_exception_puts_everything_back(tmp_path, monkeypatch):
    save_with_peft(2, tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    config = (tmp_path / CONFIG).read_bytes()
    for first in range(1, 40):
        came, calls = interrupted(monkeypatch, tmp_path, first, kill=False)
        if found(tmp_path) == 3:
            break
        assert came and sorted(file.name for file in tmp_path.iterdir()) == names
        assert (tmp_path / CONFIG).read_bytes() == config and found_by_peft(tmp_path) == 2
    assert calls.count("replace") >= 2  # beyond the configuration's move, which was undone


def test_a_kill_over_an_adapter_of_pefts_is_said_with_the_way_back(tmp_path, monkeypatch):
    said = 0
    for first in range(1, 40):
        folder = tmp_path / str(first)
        save_with_peft(2, folder)
        came, _ = interrupted(monkeypatch, folder, first, kill=True)
        if not came:
            break
        if not (folder / CONFIG).exists() and b'"adapter_config"' not in (folder / WEIGHTS).read_bytes():
            with pytest.raises(FileNotFoundError, match=rf"interrupted save .* rename it to {CONFIG}"):
                load_gralora(plain(), folder)
            assert found_by_peft(folder) is None
            (folder / FORMER).rename(folder / CONFIG)
            assert found(folder) == found_by_peft(folder) == 2
            said += 1
        assert found(folder) in (2, 3)
    assert said


def started(work, *arguments):
    """A process that does `work` and the pipe it reports through; a fork, as imports take longer than the work."""
    context = mp.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, there), daemon=True)
    process.start()
    there.close()
    return process, here


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_limit_on_the_size_of_files(tmp_path, limit):
    save_gralora(numbered(2, 256), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    process, pipe = started(save_under_a_limit, tmp_path, 256, limit)
    assert "File too large" in pipe.recv()
    process.join()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_kills_at_random_moments_leave_the_old_or_the_new(tmp_path):
    save_gralora(numbered(2, 256), tmp_path)
    (tmp_path / "README.md").write_text("keep me")
    moments, seen, refused = random.Random(0), set(), 0
    for _ in range(20):
        process, pipe = started(save_for_ever, tmp_path, 256)
        for _ in range(1 + moments.randrange(3)):
            pipe.recv()
        time.sleep(moments.random() * 0.01)
        process.kill()
        process.join()
        seen.add(number := found(tmp_path, 256))
        by_peft = found_by_peft(tmp_path, 256)
        assert by_peft in (None, number)
        refused += by_peft is None
        assert (tmp_path / "README.md").read_text() == "keep me"
    assert seen == {2, 3} and refused < 20
    save_gralora(numbered(7, 256), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_the_files_of_two_adapters_are_told_apart(tmp_path, caplog):
    for number in (2, 3):
        save_gralora(numbered(number), tmp_path / str(number))
    (tmp_path / "2" / CONFIG).replace(tmp_path / "3" / CONFIG)
    model = plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{CONFIG} and {WEIGHTS} .* are of two adapters: alpha is 2 in one and 3 in"):
        load_gralora(model, tmp_path / "3")
    assert model.state_dict().keys() == before.keys() and type(model[0]) is nn.Linear
    (tmp_path / "3" / CONFIG).unlink()  # as the message advises
    with caplog.at_level("WARNING", "flatlora"):
        assert found(tmp_path / "3") == 3
    assert f"has no {CONFIG}; the weights' own is taken" in caplog.text
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}"):
        (tmp_path / "2" / WEIGHTS).unlink()
        load_gralora(model, tmp_path / "2")


def test_changes_that_do_not_touch_the_numbers_are_fine(tmp_path):
    save_gralora(numbered(2), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "else/where"}))
    assert found(tmp_path) == found_by_peft(tmp_path) == 2
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)  # as other tools rewrite it: without our header
    assert found(tmp_path) == 2
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {CONFIG}; expected a folder that save_gralora or PEFT wrote"):
        found(tmp_path)


def test_files_are_as_readable_as_others(tmp_path):
    save_gralora(numbered(2), tmp_path / "adapter")
    (tmp_path / "other").write_text("")
    modes = {(tmp_path / "adapter" / name).stat().st_mode for name in (CONFIG, WEIGHTS)}
    assert modes == {(tmp_path / "other").stat().st_mode}
