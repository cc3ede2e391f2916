"""An adapter's two files, written so that no fault mixes those of two adapters, and read so that a mixture is noticed.

PEFT's format is a pair, ``adapter_config.json`` and ``adapter_model.safetensors``, and no file system replaces two
files at once. So the weights' file has a copy of the configuration in its header: it alone is the adapter for this
library, and its rename replaces the old adapter. PEFT reads both files, and would take new weights with an old alpha;
so an old configuration that differs is moved aside before the new weights arrive, and the new one comes last. A fault
leaves one of these:

    at the fault                           load_gralora              PeftModel.from_pretrained
    before anything is moved               the old adapter           the old adapter
    old configuration moved aside          the old adapter (1)       raises: no adapter_config.json
    new weights in place                   the new adapter           raises: no adapter_config.json (2)
    new configuration in place             the new adapter           the new adapter

(1) If PEFT wrote the old weights, they carry no configuration: it raises, and names the file to rename. After an
exception, unlike after a kill, the file is moved back.
(2) A configuration that stays the same is never moved: PEFT has the new adapter from here on.

Both files are complete and flushed to the disk before the first move, and each move before the next.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("flatlora")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMER = "adapter_config.former.json"  # the old configuration, while new weights take the place of its own
_CARRIED = "adapter_config"  # in the header of the weights' file
NUMBERS = ("r", "gralora_k", "alpha", "hybrid_r")  # in a configuration; the weights depend on them


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as reason:
        raise ImportError("adapters are saved as safetensors; install it with: pip install 'flatlora[hf]'") from reason
    return safetensors


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts an adapter into `folder`, in place of one that is there; after an OSError the old or the new is whole."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    # "format" is what transformers asks for.
    weights = _safetensors().torch.save(tensors, metadata={"format": "pt", _CARRIED: text})
    folder.mkdir(parents=True, exist_ok=True)
    with _written(folder / WEIGHTS, weights) as new_weights, _written(folder / CONFIG, text.encode()) as new_config:
        _replace(folder, new_config, new_weights)


def write_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `tensors` to `file`, in place of what it holds."""
    with _written(file, _safetensors().torch.save(tensors, metadata={"format": "pt"})) as new:
        os.replace(new, file)


@contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """A complete file that is to be moved to `path`; it is removed if it was not."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    # Ranks that save the same adapter at once, as sharded models ask of all, have files of their own.
    new = path.with_name(f"{path.name}.{torch.distributed.get_rank() if distributed else 0}.tmp")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield new
    finally:
        new.unlink(missing_ok=True)


def _replace(folder: Path, new_config: Path, new_weights: Path) -> None:
    """The moves, in the order of the table at the top of this module."""
    config, former = folder / CONFIG, folder / FORMER
    had_config = config.exists()
    try:
        if had_config and config.read_bytes() != new_config.read_bytes():
            with suppress(FileNotFoundError):  # another rank that saves the same was first
                os.replace(config, former)
            _sync(folder)
        os.replace(new_weights, folder / WEIGHTS)
    except BaseException:
        # A KeyboardInterrupt may come right after a rename, so the disk has to be asked which were made.
        if had_config and new_weights.exists() and not config.exists():
            os.replace(former, config)
        raise
    _sync(folder)
    os.replace(new_config, config)
    _sync(folder)
    former.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Flushes the moves in `folder` to the disk, where the system can."""
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


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """The configuration, the weights, and the file that the configuration is from.

    FileNotFoundError without an adapter; ValueError for a broken file, or two files of different adapters.
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
    if (folder / FORMER).is_file():
        left = f"{FORMER}, which an interrupted save moved away from these weights: rename it to {CONFIG}"
        raise FileNotFoundError(f"{folder} has no {CONFIG} but {left}")
    raise FileNotFoundError(f"{folder} has no {CONFIG}; expected a folder that save_gralora or PEFT wrote")


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata in the file's header."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as reason:
        raise ValueError(f"{path} is no whole safetensors file: {reason}") from reason


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(f"it has {key!r} twice")
        return dict(pairs)

    try:
        config = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"the configuration in {path} can't be read: {reason}") from reason
    if not isinstance(config, dict):
        raise ValueError(f"the configuration in {path} is a {type(config).__name__}; expected an object by name")
    return config


def _check_pair(config: dict[str, Any], carried: dict[str, Any], folder: Path) -> None:
    if odd := [key for key in ("peft_type", *NUMBERS) if config.get(key) != carried.get(key)]:
        said = ", ".join(f"{key} is {config.get(key)!r} in one and {carried.get(key)!r} in the other" for key in odd)
        raise ValueError(
            f"{CONFIG} and {WEIGHTS} in {folder} are of two adapters: {said}. If it is being saved to now, load again; "
            f"else put back the file that was replaced, or remove {CONFIG}: the weights carry their own"
        )
