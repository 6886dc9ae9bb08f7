"""TensorBoard: a training run's logs as scalars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from maskhooks.errors import MissingExtraError, SettingError, StorageError

_RUNS = {"log": "train", "validation": "validation"}
_NO_SCALARS = {"step", "epoch", "site", "depth"}


class Board:
    """Writes log rows as scalars `<site>/divergence`, `<site>/multiplier`, ..., by step.

    Training and validation are two TensorBoard runs, so that one chart shows both.

    Args:
        folder: where the event files go; `tensorboard --logdir FOLDER` shows them.
        layers: site and depth of each mask. A site with several depths is named `<site> depth <depth>`.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, layers: Iterable[tuple[str, int]]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "Writing logs for TensorBoard") from error
        sites = [site for site, _ in dict.fromkeys(layers)]
        self.folder = folder
        self._several = {site for site in sites if sites.count(site) > 1}
        self._make = SummaryWriter
        self._writers: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: bool | str | Path, run_dir: Path | None, layers: Iterable[tuple[str, int]]) -> Board | None:
        """Return the board in a folder; True means `tensorboard` in `run_dir`, False means no board.

        Raises:
            SettingError: `folder` is True, but there is no `run_dir`.
        """
        if folder is False:
            return None
        if folder is True:
            if run_dir is None:
                raise SettingError("tensorboard=True writes into run_dir. Give run_dir, or a folder as tensorboard")
            folder = run_dir / "tensorboard"
        return cls(Path(folder), layers)

    def close(self) -> None:
        """Flush and close the writers."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # `write` already reported a full disk
                writer.close()
        self._writers = {}

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to the log called `name`; an earlier run's rows from the first step written on are hidden.

        Raises:
            StorageError: the row cannot be written, for example on a full disk.
        """
        place = f"{row['site']} depth {row['depth']}" if row["site"] in self._several else row["site"]
        try:
            if name not in self._writers:
                self._writers[name] = self._make(str(self.folder / _RUNS[name]), purge_step=row["step"])
            for key, value in row.items():
                if key not in _NO_SCALARS and value is not None:
                    self._writers[name].add_scalar(f"{place}/{key}", value, row["step"])
        except OSError as error:
            raise StorageError(
                f"{self.folder} cannot be written: {error}. Free some space, or choose another folder.",
                path=self.folder,
            ) from error
