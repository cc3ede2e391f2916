"""Every method in the checkpoints of torch.distributed.checkpoint, in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import adamw, difference, sgd
from methods import KEEPS_STATE, METHODS, adapted, every_method, train, weights
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from flatlora import CheckpointState, MethodState

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:.*no process group"),
]


def states(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": CheckpointState(model, optimizer)}


def save_async(state, checkpoint_id):
    dcp.async_save(state, checkpoint_id=checkpoint_id).result()


@pytest.mark.parametrize("save", [dcp.save, save_async])
@every_method(among=KEEPS_STATE)
def test_training_goes_on_as_it_would_have_in_new_objects(method, save, tmp_path):
    model = adapted(method)
    optimizer = method.start(model, adamw)
    train(model, optimizer, range(3))
    save(states(model, optimizer), checkpoint_id=tmp_path)
    losses = train(model, optimizer, range(3, 6))

    other = adapted(method, seed=1)
    resumed = method.start(other, adamw, seed=8)
    state = states(other, resumed)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(other, state["model"])
    assert train(other, resumed, range(3, 6)) == losses
    assert difference(weights(model), weights(other)) is None


@every_method(among=KEEPS_STATE)
def test_what_is_saved_is_what_it_was_when_it_was_asked_for(method):
    """As it must be where it is written while training goes on."""
    model = adapted(method)
    optimizer = method.start(model, sgd)
    train(model, optimizer, range(2))
    saved = CheckpointState(model, optimizer).state_dict()["flatlora"]
    kept = bytes(saved)
    train(model, optimizer, range(2, 4))
    assert saved == kept != CheckpointState(model, optimizer).state_dict()["flatlora"]


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    ggpo = METHODS[0]
    model, other = adapted(ggpo), adapted(ggpo, r=2)
    optimizer, smaller = ggpo.start(model, adamw), ggpo.start(other, adamw)
    saved = CheckpointState(other, smaller).state_dict()
    train(model, optimizer, range(2))
    before = CheckpointState(model, optimizer).state_dict()
    with pytest.raises(ValueError, match="another model"):
        CheckpointState(model, optimizer).load_state_dict(saved)
    assert difference(before, CheckpointState(model, optimizer).state_dict()) is None


def test_an_optimizer_of_others_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="got AdamW"):
        CheckpointState(model, adamw(model.parameters()))


@pytest.mark.parametrize("written", [b"", b"garbage", "text", {}])
def test_what_method_state_did_not_write_is_refused(written):
    model = adapted(METHODS[0])
    optimizer = METHODS[0].start(model, adamw)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="not the bytes that MethodState wrote"):
        MethodState(optimizer).load_state_dict({"flatlora": written})
    assert difference(before, optimizer.state_dict()) is None
