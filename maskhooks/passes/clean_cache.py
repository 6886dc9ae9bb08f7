"""Clean cache: keep clean passes across epochs, so that a training step costs only its masked half."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskhooks.errors import CacheWarning, CorruptFileError, SettingError
from maskhooks.hooks.replay import Recording
from maskhooks.hooks.tap import Values
from maskhooks.model.hooked import Hooked
from maskhooks.passes.clean import Clean, with_dependencies
from maskhooks.progress import length
from maskhooks.seeds import generator, seeded
from maskhooks.sites import nested
from maskhooks.sites.nested import Path as Steps
from maskhooks.sites.site import Site

_ORDER = 300
_AUTO = 0.5  # the part of free memory that an automatic cache may take


class Numbered(NamedTuple):
    """A batch and its number among the cached ones."""

    number: int
    batch: Any


class CleanCache:
    """The clean pass of each batch: values at sites, outputs, and the recording that masked passes resume from.

    The batches are those of the first epoch. Later epochs repeat them in an order drawn from the seed, so examples
    are no longer shuffled into new batches. With `dtype=None`, a step is bit for bit what it is without a cache.

    Args:
        folder: where tensors are kept, one file per batch; None keeps them in memory.
        dtype: `torch.bfloat16` halves the size; values are then rounded to eight bits of mantissa, outputs are not.
            None keeps them exact.
        limit: the most bytes to keep. Batches beyond it are computed anew each time, with a CacheWarning. None keeps
            all batches.

    Raises:
        SettingError: the loader has no length; or there is no limit, and the clean passes would not fit.
    """

    automatic = False  # whether nobody asked for it

    def __init__(
        self, folder: str | Path | None = None, *, dtype: torch.dtype | None = None, limit: int | None = None
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise SettingError(f"a cache needs a floating-point dtype such as torch.bfloat16, got {dtype}")
        self.folder = None if folder is None else Path(folder)
        self.dtype, self.limit = dtype, limit
        self.size = 0  # bytes kept
        self.full = False
        self._kept: dict[int, _Kept] = {}
        self._expected = 1

    @classmethod
    def named(cls, place: CleanCache | str | Path, dtype: torch.dtype | None = None) -> CleanCache:
        """Return the cache for what a user writes: "auto", "memory", a folder, or a `CleanCache`."""
        if isinstance(place, CleanCache):
            return place
        if place == "auto":
            free = free_memory()
            found = cls(dtype=dtype, limit=None if math.isinf(free) else int(_AUTO * free))
            found.automatic = True
            return found
        return cls(None if place == "memory" else place, dtype=dtype)

    def for_rank(self, rank: int, world_size: int) -> CleanCache | None:
        """Return the cache of one of several processes; each keeps its own files. None for an automatic cache.

        With a cache, later epochs repeat batches, so several processes are no longer the same as one with larger
        batches; only who asks for a cache gets that.
        """
        if world_size == 1:
            return self
        if self.automatic:
            return None
        folder = None if self.folder is None else self.folder / f"process-{rank}"
        limit = None if self.limit is None else self.limit // world_size
        return CleanCache(folder, dtype=self.dtype, limit=limit)

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, batches: int) -> None:
        """Clear the cache, and expect this many batches."""
        self.clear()
        self._expected = batches

    def __contains__(self, number: int) -> bool:
        """Whether a batch is kept, or will be when it is first computed."""
        return number in self._kept or not self.full

    @property
    def missing(self) -> float:
        """The fraction of the batches that do not fit."""
        return 1 - len(self) / self._expected if self.full else 0.0

    def clean(
        self,
        hooked: Hooked,
        item: Numbered,
        compute: Callable[[], Clean],
        reads: Iterable[Site],
        onward: Iterable[Site],
    ) -> Clean:
        """Return the clean pass of a batch, computed and kept the first time.

        Args:
            compute: runs the clean pass, reading and recording for every site of the run.
            reads: the sites whose values are needed now.
            onward: the sites that masked passes resume from now.
        """
        if item.number not in self._kept:
            clean = compute()
            kept = self._keep(item.number, clean)
            if self.limit is not None and self.size + kept.shelf.size > self.limit:
                kept.shelf.clear()
                self._fill()
                return clean
            self._kept[item.number] = kept
            self.size += kept.shelf.size
            self._check_room()
        kept = self._kept[item.number]
        shelf = kept.shelf.open()
        result = kept.result.unpack(shelf)
        values = Values({str(site): kept.values[str(site)].unpack(shelf) for site in with_dependencies(hooked, reads)})
        recording = kept.recording and kept.recording.changed(lambda packed: packed.unpack(shelf), onward)
        return Clean(hooked, item.batch, values, result, hooked.distribution(result, item.batch), recording)

    def clear(self) -> None:
        """Drop everything, and remove the files."""
        for kept in self._kept.values():
            kept.shelf.clear()
        self._kept.clear()
        self.size, self.full = 0, False

    def _fill(self) -> None:
        """Note that no more batches fit, and say so."""
        self.full = True
        warnings.warn(
            f"the clean passes of {len(self._kept)} of {self._expected} batches are stored, "
            f"{self.size / 2**30:.2f} GB; no more fit into the limit. Those of the other batches are computed in each "
            "step, which takes longer. Store them in a folder, cache='FOLDER', or train on fewer batches.",
            CacheWarning,
            stacklevel=2,
        )

    def _check_room(self) -> None:
        """Check, after the first batch, that all batches fit."""
        if len(self._kept) > 1 or self.limit is not None:
            return
        size = self._expected * sum(kept.shelf.size for kept in self._kept.values())
        free, where = _free(self.folder)
        if size > 0.9 * free:
            raise SettingError(
                f"the clean passes of {self._expected} batches would take {size / 2**30:.1f} GB, and "
                f"{free / 2**30:.1f} GB are free {where}. Use a folder on a larger disk, dtype=torch.bfloat16, fewer "
                f"batches, or no cache."
            )

    def _keep(self, number: int, clean: Clean) -> _Kept:
        shelf = _Shelf() if self.folder is None else _FileShelf(self.folder / f"batch-{number:06d}.safetensors")
        result = _Packed(clean.result, shelf, None)
        values = {address: _Packed(value, shelf, self.dtype) for address, value in clean.values.items()}
        recording = clean.recording and clean.recording.changed(lambda value: _Packed(value, shelf, self.dtype))
        shelf.close()
        return _Kept(result, values, recording, shelf)


class Stored:
    """A training loader with numbered batches; after the first epoch they repeat in random order.

    Args:
        batches: the loader.
        seed: the seed of the order.
        cache: keeps their clean passes.
    """

    def __init__(self, batches: Iterable[Any], seed: int, cache: CleanCache) -> None:
        count = length(batches)
        if count is None:
            raise SettingError(
                "a clean cache needs a loader with a length. Use a DataLoader or a list of batches, or no cache"
            )
        self.batches, self.seed = batches, seed
        self.epoch = 0
        self._seen: list[Any] = []
        self._count = count
        cache.begin(count)

    def __len__(self) -> int:
        return self._count

    @property
    def needs_first_epoch(self) -> bool:
        """Whether the first epoch must run before a later one, as after a resume."""
        return not self._seen

    def set_epoch(self, epoch: int) -> None:
        """Set which epoch comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Numbered]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        if epoch == 0:
            self._seen = []
            for number, batch in enumerate(self.batches):
                self._seen.append(batch)
                yield Numbered(number, batch)
            return
        order = torch.randperm(len(self._seen), generator=generator(seeded(self.seed, _ORDER, epoch)))
        for number in order.tolist():
            yield Numbered(number, self._seen[number])


@dataclass
class _Kept:
    result: _Packed
    values: dict[str, _Packed]
    recording: Recording | None
    shelf: _Shelf


class _Packed:
    """A value with its tensors on a shelf."""

    def __init__(self, value: Any, shelf: _Shelf, dtype: torch.dtype | None) -> None:
        self.places: list[tuple[Steps, str, torch.dtype, torch.device]] = []
        for path, tensor in list(nested.tensors(value)):
            key = shelf.put(tensor, dtype if tensor.is_floating_point() else None)
            self.places.append((path, key, tensor.dtype, tensor.device))
            value = nested.put(value, path, torch.empty(0))
        self.rest = value

    def unpack(self, shelf: Callable[[str], Tensor]) -> Any:
        value = self.rest
        for path, key, dtype, device in self.places:
            value = nested.put(value, path, shelf(key).to(device, dtype))
        return value


class _Shelf:
    """The tensors of one batch in memory, equal ones once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.size = 0

    def put(self, tensor: Tensor, dtype: torch.dtype | None) -> str:
        copy = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        for key, other in self.tensors.items():
            if other.shape == copy.shape and other.dtype == copy.dtype and torch.equal(other, copy):
                return key
        key = str(len(self.tensors))
        self.tensors[key] = copy
        self.size += copy.nbytes
        return key

    def close(self) -> None:  # a file shelf writes its file here
        """Finish the batch: no more tensors follow."""

    def open(self) -> Callable[[str], Tensor]:
        return self.tensors.__getitem__

    def clear(self) -> None:
        self.tensors.clear()


class _FileShelf(_Shelf):
    """The tensors of one batch in a file; a step reads only those it needs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def close(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, self.path)
        self.tensors = {}

    def open(self) -> Callable[[str], Tensor]:
        try:
            reader: Callable[[str], Tensor] = safe_open(self.path, "pt").get_tensor
        except (OSError, SafetensorError) as error:
            raise CorruptFileError(
                f"{self.path} of the clean cache cannot be read ({error}). Leave it in place while training runs. "
                f"Start again, with an empty folder.",
                path=self.path,
            ) from error
        return reader

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def _free(folder: Path | None) -> tuple[float, str]:
    if folder is not None:
        return float(shutil.disk_usage(folder).free), f"in {folder}"
    return free_memory(), "in memory"


def free_memory() -> float:
    """Return how many bytes of memory this process may still take, as the machine or its container allows."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024.0 * float(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            found.append(float(limit) - float(used))
    if not found:
        with contextlib.suppress(ValueError, OSError, AttributeError):
            found.append(float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    return max(0.0, min(found, default=math.inf))  # not every system says
