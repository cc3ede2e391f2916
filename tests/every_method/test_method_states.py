"""What every method does with checkpoints: resumes to the bit, and refuses what is not its own before it changes."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import adamw, difference, through_a_file
from methods import (
    KEEPS_STATE,
    adapted,
    every_method,
    load_weights,
    logits,
    set_streams,
    started,
    streams,
    train,
    values,
    weights,
)

from flatlora.wrapper import STATE_KEY

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@every_method()
def test_a_resumed_run_is_the_uninterrupted_one(method):
    model, optimizer = started(method, steps=3, dropout=0.1)
    saved = through_a_file([weights(model), optimizer.state_dict(), streams()])
    straight = train(model, optimizer, range(3, 6))

    other = adapted(method, dropout=0.1)
    resumed = method.start(other, adamw, seed=99)
    load_weights(other, saved[0])
    resumed.load_state_dict(saved[1])
    set_streams(saved[2])
    assert train(other, resumed, range(3, 6)) == straight
    assert difference(weights(model), weights(other)) is None
    assert difference(optimizer.state_dict(), resumed.state_dict()) is None
    torch.manual_seed(0)
    next_one = logits(model)
    torch.manual_seed(0)
    assert difference(next_one, logits(other)) is None


@every_method()
def test_a_setting_that_a_checkpoint_replaces_is_told_of(method, caplog):
    _, optimizer = started(method, steps=1)
    state = optimizer.state_dict()
    for part in state.get(STATE_KEY, {}).values():
        part.update({name: 2 * part[name] for name in ("sigma", "beta", "rho") if name in part})
    replaced = {name for part in state.get(STATE_KEY, {}).values() for name in ("sigma", "beta", "rho") if name in part}
    optimizer.load_state_dict(state)
    assert {name for name in ("sigma", "beta", "rho") if f"checkpoint's {name} =" in caplog.text} == replaced
    caplog.clear()
    optimizer.load_state_dict(state)
    assert "checkpoint's" not in caplog.text


@every_method()
def test_saving_disturbs_nothing(method):
    runs = []
    for saving in (False, True):
        model, optimizer = started(method, steps=3, dropout=0.1)
        if saving:
            optimizer.state_dict()
            weights(model)
            copy.deepcopy(model)
        runs.append((train(model, optimizer, range(3, 5)), weights(model)))
    assert difference(*runs) is None


def refused(method, changes):
    """Has a run load its own checkpoint after each of `changes`; what went wrong, by change; nothing if all is well."""
    found = {}
    run = None
    for name, change in changes.items():
        if run is None:
            run = started(method, steps=2)
            # The checkpoint is of another moment, so that whatever is taken over of it shows.
            saved = copy.deepcopy(run[1].state_dict())
            train(*run, range(2, 3))
            before = present(*run)
        state = copy.deepcopy(saved)
        change(state)
        try:
            run[1].load_state_dict(state)
            found[name], run = "was taken", None
        except ValueError:
            if changed := difference(before, present(*run)):
                found[name], run = f"changed {changed}", None
        except Exception as error:
            found[name], run = f"raised {error!r}", None
    return found


def present(model, optimizer):
    return copy.deepcopy(optimizer.state_dict()), weights(model), logits(model)


def place(state, path):
    for key in path[:-1]:
        state = state[key]
    return state


def own_part(method):
    """The keys that lead to each value of the method's part of a checkpoint."""
    _, optimizer = started(method, steps=2)
    return [((STATE_KEY, *path), value) for path, value in values(optimizer.state_dict()[STATE_KEY])]


def one_layer_alike(paths):
    """`paths` without those that differ from an earlier one by the layer's name alone."""
    found = {}
    for path, value in paths:
        found.setdefault(tuple("layer" if "." in str(key) else key for key in path), (path, value))
    return list(found.values())


@every_method(
    among=KEEPS_STATE,
)
def test_a_state_that_lacks_a_field_is_refused_and_changes_nothing(method):
    # Without the method's own name it is the checkpoint of a base optimizer, which is taken.
    # What came after version 0.1.0 may be missing.
    paths = [p for p, _ in one_layer_alike(own_part(method)) if len(p) > 2 and p[-1] not in ("rise", "std")]
    assert len(paths) >= 4
    changes = {path: lambda state, path=path: place(state, path).pop(path[-1]) for path in paths}
    assert refused(method, changes) == {}


@every_method(among=KEEPS_STATE)
def test_a_state_with_a_number_that_is_none_is_refused_and_changes_nothing(method):
    numbers = [path for path, value in one_layer_alike(own_part(method)) if type(value) in (int, float)]
    assert numbers

    def put(path, wrong):
        return lambda state: place(state, path).update({path[-1]: wrong})

    wrongs = (float("nan"), None, "1", -(2.0**70))
    changes = {(path, wrong): put(path, wrong) for path in numbers for wrong in wrongs}
    known = {key for key in changes if key[0][-1] == "length" and key[1] is None}  # as a stream's
    assert refused(method, {key: change for key, change in changes.items() if key not in known}) == {}


@every_method(among=KEEPS_STATE)
def test_a_state_of_another_form_is_refused_and_changes_nothing(method):
    def put(wrong):
        return lambda state: state[STATE_KEY].update(dict.fromkeys(state[STATE_KEY], wrong))

    assert refused(method, {repr(wrong): put(wrong) for wrong in (3, [], "state", {}, {"layers": 3})}) == {}


def state_of(method, **other):
    model = adapted(method, **other)
    optimizer = method.start(model, adamw)
    train(model, optimizer, range(1))
    return optimizer.state_dict()


@every_method(among=KEEPS_STATE)
def test_a_state_of_a_model_with_other_ranks_is_refused_and_changes_nothing(method):
    theirs = state_of(method, r=2)
    assert refused(method, {"rank": lambda state: state.update(theirs)}) == {}


@every_method(among=KEEPS_STATE)
def test_a_state_of_a_model_with_other_shapes_is_refused_and_changes_nothing(method):
    theirs = state_of(method, width=16)
    assert refused(method, {"width": lambda state: state.update(theirs)}) == {}


@every_method(among=KEEPS_STATE)
def test_a_state_of_another_method_is_refused_and_changes_nothing(method):
    own = {next(iter(method.start(adapted(method), adamw).state_dict()[STATE_KEY]))}
    others = {other.name: state_of(other)[STATE_KEY] for other in KEEPS_STATE}
    changes = {
        name: lambda state, part=part: state.update({STATE_KEY: part})
        for name, part in others.items()
        if not own & part.keys()
    }
    assert len(changes) >= 2
    assert refused(method, changes) == {}
