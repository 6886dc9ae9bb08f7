"""The progress bar of a training run."""

from __future__ import annotations

from types import TracebackType

from maskhooks.progress import bar
from maskhooks.training.loop import Loop

_LATEST = 50  # steps that the shown means cover


class StepBar:
    """A progress bar of a loop's steps, with the latest divergence and fraction kept."""

    def __init__(self, loop: Loop, *, shown: bool = True) -> None:
        self.loop, self.shown = loop, shown
        self.bar, self.task = bar("training", loop.total)

    def __enter__(self) -> StepBar:
        if self.shown:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            self.bar.stop()

    def update(self) -> None:
        """Show the loop's progress."""
        if not self.shown:
            return
        latest = self.loop.result.log[-_LATEST:]
        divergence, kept = (sum(row[key] for row in latest) / len(latest) for key in ("divergence", "expected_l0"))
        self.bar.update(self.task, completed=self.loop.done, description=f"divergence {divergence:.3f} kept {kept:.2f}")
