"""What every kind of adapter layer is asked; `flatlora.layers.kinds` has the table of all kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .adapter import Adapter
from .base import BaseWeight

__all__ = ["NotLinear", "Reader"]


class NotLinear(Exception):
    """An adapter layer is left out: its adapters are not low-rank updates of a linear layer's weight. Says why."""


class Reader(ABC):
    """Reads one kind of adapter layer: every question is about the module as it is at present."""

    is_peft = False

    @abstractmethod
    def reads(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    def of(self, module: Any) -> Reader:
        """What reads this one layer, where layers of the kind differ and have to be found out about.

        Raises:
            NotLinear: its adapters are of another kind.
            ValueError: it looks like a layer of this kind, and computes something else.
        """
        return self

    def parts(self, module: Any) -> Iterable[nn.Module]:
        """Children that look like layers by themselves and belong to this one."""
        return ()

    @abstractmethod
    def names(self, module: Any) -> Iterable[str]:
        """The adapters that the module holds."""

    @abstractmethod
    def base(self, module: Any) -> BaseWeight:
        """The weight that they adapt; `NotLinear` where they are no low-rank updates of a linear layer's weight."""

    @abstractmethod
    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        """What the adapter of that name consists of, for a base weight (m, n); nothing if there is none here."""

    def enabled(self, module: Any) -> bool:
        """Whether the module adds its adapters at all."""
        return True

    def active(self, module: Any) -> Sequence[str]:
        """Names of the adapters that the module adds while it is enabled and they are not merged."""
        return ("default",)

    def merged(self, module: Any) -> Sequence[str]:
        """Names of the adapters that are folded into the base weight."""
        return ()
