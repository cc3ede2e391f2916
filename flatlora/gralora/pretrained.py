"""A transformers model with GraLoRA: the Trainer trains it, quantised too, and saves its adapters alone.

transformers marks a model that PEFT put adapters into by `_hf_peft_config_loaded`. With it the Trainer takes a
quantised model, and gradient checkpointing has the embeddings' output require a gradient; both are right for GraLoRA.
To save such a model, transformers looks for PEFT's own layers, so the model gets a `save_pretrained` of its own.
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
    """Has the Trainer not list the frozen base as missing from a checkpoint of all that is trained."""
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
    """Writes the adapters alone, as `save_gralora` does; `push_to_hub` uploads them.

    The Trainer resumes, and loads its best model, from a ``model.safetensors``. So a folder that is one of its
    checkpoints gets one too, with all that training changes.

    Args:
        save_directory, is_main_process, state_dict, push_to_hub: as in transformers.
        kwargs: `repo_id` and others of the model's `push_to_hub`; options for a whole model's files are ignored.
    """
    if not is_main_process and state_dict is not None:
        return  # where nothing is saved it may be empty
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
    """All that a step may change, such as an unfrozen norm's weight and its buffers."""
    state = model.state_dict(keep_vars=True) if state_dict is None else state_dict
    names = {name for name, p in model.named_parameters() if p.requires_grad} | {n for n, _ in model.named_buffers()}
    return {name: full_tensor(state[name].detach()).cpu().clone().contiguous() for name in state if name in names}
