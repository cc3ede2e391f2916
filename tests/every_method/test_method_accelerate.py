"""Every method under Accelerate: `save_state` and `load_state`, in one process and in two that shard by FSDP2."""

from __future__ import annotations

import functools
import os

import pytest
import torch.distributed as dist
from helpers import RANKS, adamw, difference
from methods import KEEPS_STATE, METHODS, adapted, batch, every_method, weights
from processes import on_ranks

from flatlora import MethodState

accelerate = pytest.importorskip("accelerate")

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]
SHARDED = [method for method in KEEPS_STATE if method.sharded]


def accelerator_of(fsdp_plugin=None):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=fsdp_plugin)
    if fsdp_plugin is not None:  # which it takes note of on accelerators alone; the rest of it runs on CPUs too
        for state in (accelerator.state, accelerate.PartialState()):
            state.distributed_type = accelerate.DistributedType.FSDP
        accelerator.state.fsdp_plugin = fsdp_plugin
    return accelerator


def prepared(method, seed, fsdp_plugin=None):
    accelerator = accelerator_of(fsdp_plugin)
    model = adapted(method, seed=seed)
    optimizer = method.start(model, adamw, seed=7 + seed)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def run(accelerator, model, optimizer, steps, rank=0, ranks=1):
    losses = []
    for i in steps:
        loss = model(**{key: value.chunk(ranks)[rank] for key, value in batch(i, 4).items()}).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@every_method()
def test_a_run_in_one_process_goes_on_in_new_objects(method, tmp_path):
    first = prepared(method, seed=0)
    run(*first, range(3))
    first[0].save_state(str(tmp_path))
    losses = run(*first, range(3, 6))
    again = prepared(method, seed=1)
    again[0].load_state(str(tmp_path))
    assert run(*again, range(3, 6)) == losses
    assert difference(weights(first[1]), weights(again[1])) is None


def fsdp2(method, registered, rank, folder):
    """The losses of further steps, and those after `load_state` in new objects."""
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    found = []
    for seed in (0, 1):
        run_of = prepared(method, seed, fsdp_plugin=plugin)
        accelerator, _, optimizer = run_of
        held = {type(p).__name__ for group in optimizer.param_groups for p in group["params"]}
        if registered:
            accelerator.register_for_checkpointing(MethodState(optimizer.optimizer))
        path = f"{folder}/{method.name} {registered}"
        if seed == 0:
            run(*run_of, range(3), rank, RANKS)
            accelerator.save_state(path)
        else:
            accelerator.load_state(path)
        found.append(run(*run_of, range(3, 6), rank, RANKS))
    return {"losses": found, "held": sorted(held)}


def cases():
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(RANKS), "ACCELERATE_USE_CPU": "true"}.items():
        os.environ[name] = value  # of a process of its own
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(dist.get_rank())
    found = {method.name: functools.partial(fsdp2, method, True) for method in SHARDED}
    return {**found, "not registered": functools.partial(fsdp2, METHODS[0], False)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@every_method(among=SHARDED)
def test_a_run_that_fsdp2_shards_goes_on_in_new_objects(ranks, method):
    for found in (rank[method.name] for rank in ranks):
        assert "error" not in found, found["error"]
        assert found["held"] == ["DTensor"]
        straight, resumed = found["losses"]
        assert straight == resumed
    # Accelerate's own checkpoint has the base alone.
    straight, resumed = ranks[0]["not registered"]["losses"]
    assert straight != resumed
