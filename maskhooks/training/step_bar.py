"""The progress of a training run."""

from __future__ import annotations

from types import TracebackType

from maskhooks.progress import Bar
from maskhooks.training.loop import Loop

_LATEST = 50  # steps that the shown means cover


class StepBar:
    """Progress of a loop's steps on stderr, with the latest divergence and fraction kept."""

    def __init__(self, loop: Loop, *, shown: bool = True) -> None:
        self.loop = loop
        self.bar = Bar("training", loop.pace.planned(loop.done), loop.done, shown=shown)

    def __enter__(self) -> StepBar:
        self.bar.__enter__()
        self.loop.on_validation_batch = lambda: self._show("measuring on validation data")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)

    def update(self) -> None:
        """Show the loop's progress."""
        if self.bar.shown:
            latest = self.loop.result.log[-_LATEST:]
            divergence, kept = (sum(row[key] for row in latest) / len(latest) for key in ("divergence", "expected_l0"))
            self._show(f"divergence {divergence:.3f} kept {kept:.2f}")

    def _show(self, text: str) -> None:
        done, pace = self.loop.done, self.loop.pace
        self.bar.update(done, text, pace.left(done), max(done, pace.planned(done)))
