"""Lightning: a callback that logs the metrics of an optimizer. Needs lightning, or pytorch_lightning."""

from __future__ import annotations

from typing import Any

from .metrics import read_metrics

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback  # type: ignore[assignment]

__all__ = ["FlatLoRACallback"]


class FlatLoRACallback(Callback):
    """Sends ``optimizer.metrics()`` to every logger as ``flatlora/...``, once every `log_every_n_steps` steps.

    Only then are the numbers read and the device waited for. They are means over all ranks. With several optimizers all
    but the first have their position in the name: ``flatlora/1/...``.

    Example:
        >>> Trainer(callbacks=[FlatLoRACallback()]).fit(module)
    """

    _logged = 0  # how many times n steps had been made when it logged last

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._logged = trainer.global_step // max(trainer.log_every_n_steps, 1)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = trainer.log_every_n_steps
        if not every or trainer.global_step // every == self._logged:
            return
        self._logged = trainer.global_step // every
        numbers: dict[str, float] = {}
        for i, optimizer in enumerate(trainer.optimizers):
            prefix = f"flatlora/{i}/" if i else "flatlora/"
            found = read_metrics(optimizer, over_ranks=True)
            numbers |= {prefix + name: value for name, value in found.items()}
        for logger in trainer.loggers if numbers else ():
            logger.log_metrics(numbers, step=trainer.global_step)
