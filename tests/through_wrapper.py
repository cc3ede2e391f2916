"""A pytest plugin for suites that others wrote: every optimizer their tests build is handed out inside a plain wrapper.

Used as ``pytest -p through_wrapper`` with this folder on PYTHONPATH; CONTRIBUTING has the commands.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from flatlora import OptimizerWrapper

WRAPPED = ("torch.optim.", "pytorch_optimizer.")  # not the libraries' own wrappers, as Accelerate's


def build_wrapped(cls: type[Optimizer], *args: Any, **kwargs: Any) -> Any:
    """Stands for `Optimizer.__new__`: as what it returns is no instance of `cls`, Python leaves `__init__` to us."""
    optimizer = object.__new__(cls)
    if not (args or kwargs) or not cls.__module__.startswith(WRAPPED):  # no arguments: a copy or an unpickled one
        return optimizer
    optimizer.__init__(*args, **kwargs)  # type: ignore[misc]
    return OptimizerWrapper(optimizer)


Optimizer.__new__ = build_wrapped  # type: ignore[method-assign]
