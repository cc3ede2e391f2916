"""An adapter's two files, written so that no fault mixes those of two adapters, and read so that none goes unseen.

PEFT's format is a pair, ``adapter_config.json`` and ``adapter_model.safetensors``, and no file system replaces two
files at once. So the weights carry a copy of their configuration in the header of their file: to this library that one
file is the adapter, and its rename is the moment at which the old adapter becomes the new one. PEFT reads the two
apart, and new weights under an old alpha would be wrong without a word; so an old configuration that differs is out of
the way before new weights arrive, and the new one comes last. A fault leaves one of these:

    at the fault                           load_gralora              PeftModel.from_pretrained
    before anything is moved               the old adapter           the old adapter
    old configuration moved aside          the old adapter (1)       raises: no adapter_config.json
    new weights in place                   the new adapter           raises: no adapter_config.json (2)
    new configuration in place             the new adapter           the new adapter

(1) Weights that PEFT wrote carry no configuration: then it raises, and names the file to rename. An exception, unlike
a kill, moves the file back itself.
(2) Where the configuration is the same as before it is never moved, and PEFT too has the new adapter from here on.

Both files are complete and flushed to the disk before the first move, and each move before the next.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["CONFIG", "FORMER", "WEIGHTS", "read_adapter", "write_adapter", "write_weights"]

logger = logging.getLogger("flatlora")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMER = "adapter_config.former.json"  # the old configuration, while new weights take the place of its own
_CARRIED = "adapter_config"  # in the header of the weights' file
_DECISIVE = ("peft_type", "r", "gralora_k", "alpha", "hybrid_r")  # what the weights mean nothing without


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as reason:
        raise ImportError("adapters are saved as safetensors; install it with: pip install 'flatlora[hf]'") from reason
    return safetensors


# --- writing --------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts an adapter into `folder`, made if it is not there, in place of the one that may be in it.

    Raises:
        OSError: the disk is full, a limit is reached, or the like; the old adapter is as it was, or the new one is
            whole.
        ImportError: safetensors is missing.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    # "format" is what transformers asks for.
    weights = _safetensors().torch.save(tensors, metadata={"format": "pt", _CARRIED: text})
    folder.mkdir(parents=True, exist_ok=True)
    new_config, new_weights = (folder / f"{name}.{_rank()}.tmp" for name in (CONFIG, WEIGHTS))
    try:
        _write(new_weights, weights)
        _write(new_config, text.encode())
        _replace(folder, new_config, new_weights)
    finally:
        for file in (new_config, new_weights):
            file.unlink(missing_ok=True)


def write_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `tensors` to `file`, in place of what it holds."""
    new = file.with_name(f"{file.name}.{_rank()}.tmp")
    try:
        _write(new, _safetensors().torch.save(tensors, metadata={"format": "pt"}))
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def _replace(folder: Path, new_config: Path, new_weights: Path) -> None:
    """The moves, in the order that the table at the top of this module is about."""
    config, former = folder / CONFIG, folder / FORMER
    had_config = config.exists()
    try:
        if had_config and config.read_bytes() != new_config.read_bytes():
            with suppress(FileNotFoundError):  # another rank, that saves the same, was here first
                os.replace(config, former)
            _sync(folder)
        os.replace(new_weights, folder / WEIGHTS)
    except BaseException:
        # Ctrl-C can strike right behind a rename: what is on the disk says which were made.
        if had_config and new_weights.exists() and not config.exists():
            os.replace(former, config)
        raise
    _sync(folder)
    os.replace(new_config, config)
    _sync(folder)
    former.unlink(missing_ok=True)


def _rank() -> int:
    """Ranks that save the same adapter at once, as sharded models ask of all, write to files of their own."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes the moves in `folder` so far last, where the system can."""
    if os.name != "posix":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as reason:
        if reason.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


# --- reading --------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """The configuration, the weights, and the file that the configuration is from.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
        ValueError: a file that is not whole or not of its format, or two files of different adapters.
        ImportError: safetensors is missing.
    """
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    if not weights_file.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}; expected a folder that save_gralora or PEFT wrote")
    tensors, header = _read_weights(weights_file)
    carried = _parsed(header[_CARRIED].encode(), weights_file) if _CARRIED in header else None
    if config_file.is_file():
        config = _parsed(config_file.read_bytes(), config_file)
        if carried is not None:
            _check_pair(config, carried, folder)
        return config, tensors, config_file
    if carried is not None:
        logger.warning("%s has no %s; the weights' own is taken. PEFT finds it once it is saved again", folder, CONFIG)
        return carried, tensors, weights_file
    left = f"{FORMER}, which an interrupted save moved away from these weights: rename it to {CONFIG}"
    raise FileNotFoundError(
        f"{folder} has no {CONFIG}"
        + (f" but {left}" if (folder / FORMER).is_file() else "; expected a folder that save_gralora or PEFT wrote")
    )


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and what the header of the file says beside them."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as reason:
        raise ValueError(f"{path} is no whole safetensors file: {reason}") from reason


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"it has {', '.join(map(repr, twice))} twice")
        return dict(pairs)

    try:
        config = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"the configuration in {path} can't be read: {reason}") from reason
    if not isinstance(config, dict):
        raise ValueError(f"the configuration in {path} is a {type(config).__name__}; expected an object by name")
    return config


def _check_pair(config: dict[str, Any], carried: dict[str, Any], folder: Path) -> None:
    odd = {key: (config.get(key), carried.get(key)) for key in _DECISIVE if config.get(key) != carried.get(key)}
    if odd:
        said = ", ".join(
            f"{key} is {in_config!r} in one and {here!r} in the other" for key, (in_config, here) in odd.items()
        )
        raise ValueError(
            f"{CONFIG} and {WEIGHTS} in {folder} are of two adapters: {said}. If someone is saving to it now, load "
            f"again; else put back the file that was replaced, or remove {CONFIG}: the weights carry their own"
        )
