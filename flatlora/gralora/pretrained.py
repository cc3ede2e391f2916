"""A transformers model with GraLoRA: the Trainer trains it, quantised too, and saves its adapters alone.

transformers has a flag for a model that PEFT put adapters into, `_hf_peft_config_loaded`. Under it alone the Trainer
takes a quantised model, and gradient checkpointing has the embeddings' output require a gradient; both are right for
GraLoRA. To save such a model, transformers would look for PEFT's own layers, so the model gets a `save_pretrained` of
its own, which writes what `save_gralora` does.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layers.base import full_tensor
from .contents import PREFIX, adapter
from .disk import write_adapter, write_weights

__all__ = ["declare", "withdraw"]

_FLAG, _HOOK = "_hf_peft_config_loaded", "_quiet_about_frozen"


def declare(model: nn.Module) -> None:
    """Has a transformers model say that it has adapters, and save them; does nothing to any other module."""
    if hasattr(type(model), _FLAG):
        hook = model.register_load_state_dict_post_hook(_quiet_about_frozen)
        model.__dict__.update({_FLAG: True, "save_pretrained": partial(_save_pretrained, model), _HOOK: hook})


def withdraw(model: nn.Module) -> None:
    """Undoes `declare`."""
    if _HOOK in model.__dict__:
        model.__dict__.pop(_HOOK).remove()
        del model.__dict__[_FLAG], model.__dict__["save_pretrained"]


def _quiet_about_frozen(model: nn.Module, keys: Any) -> None:
    """A checkpoint that has all that is trained lacks nothing; the Trainer would list the whole base as missing."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    if set(keys.missing_keys) == frozen:
        keys.missing_keys.clear()


def _save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Writes the adapters alone, as `save_gralora` does and where it and PEFT load them; `push_to_hub` uploads them.

    Of a model without an adapter the Trainer's resuming and its best model load no other file than
    ``model.safetensors``, so a folder that is one of its checkpoints gets one, with all that training changes.

    Args:
        save_directory, is_main_process, state_dict, push_to_hub: as in transformers.
        kwargs: `repo_id` and others of the model's `push_to_hub`; what shapes the files of a whole model is not read.
    """
    if not is_main_process and state_dict is not None:
        return  # it may be empty where nobody saves
    folder = Path(save_directory)
    config, weights = adapter(model, state_dict)
    trained = _trained(model, state_dict) if re.fullmatch(r"checkpoint-\d+", folder.name) else {}
    if not is_main_process:
        return
    write_adapter(folder, config, weights)
    if trained:
        own = {key.removeprefix(PREFIX): value for key, value in weights.items()}
        write_weights(folder / "model.safetensors", {**trained, **own})
    if push_to_hub:
        model.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)


def _trained(model: nn.Module, state_dict: dict[str, Any] | None) -> dict[str, Tensor]:
    """What a step may change beside the adapters as well, such as a norm's weight that was unfrozen and its buffers."""
    state = model.state_dict(keep_vars=True) if state_dict is None else state_dict
    names = {name for name, p in model.named_parameters() if p.requires_grad} | {n for n, _ in model.named_buffers()}
    return {name: full_tensor(state[name].detach()).cpu().clone().contiguous() for name in state if name in names}
