"""The bar of a training run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from maskhooks.loop import Loop
from maskhooks.progress import bar


class StepBar(pl.Callback):
    """A progress bar of our own steps, with the latest divergence and fraction kept."""

    def on_train_start(self, trainer: pl.Trainer, loop: pl.LightningModule) -> None:
        assert isinstance(loop, Loop)
        self.bar, self.task = bar("training", loop.total)
        self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, loop: pl.LightningModule, *_: Any) -> None:
        assert isinstance(loop, Loop)
        latest = loop.result.log[-50:]
        divergence, kept = (sum(row[key] for row in latest) / len(latest) for key in ("divergence", "expected_l0"))
        self.bar.update(self.task, completed=loop.done, description=f"divergence {divergence:.3f} kept {kept:.2f}")

    def on_train_end(self, trainer: pl.Trainer, loop: pl.LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, loop: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()
