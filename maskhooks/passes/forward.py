"""One step in plain torch: a clean pass that reads, a masked pass that replaces, from the masked site onward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from maskhooks.errors import BatchError
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.replay import Recording, Replay
from maskhooks.masks.group import together
from maskhooks.masks.masking import Masked, Masks, Places
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Outputs, count
from maskhooks.sites.example_index import Examples
from maskhooks.sites.site import Site
from maskhooks.sites.units import Units


@dataclass(frozen=True)
class Clean:
    """A batch with what a clean pass saw.

    Attributes:
        values: by address, what was read.
        result: what the model returned.
        outputs: the same as distributions.
        recording: to go on from; None to run the model in full.
    """

    batch: Any
    values: Mapping[str, Tensor]
    result: Any
    outputs: Outputs
    recording: Recording | None


def clean_pass(
    hooked: Hooked,
    batch: Any,
    reads: Iterable[Site],
    onward: Iterable[Site] = (),
    replay: Replay | None = None,
) -> Clean:
    """Runs the model as it is, without gradients.

    Args:
        reads: sites to read.
        onward: the sites that masked passes will go on from; what comes before is recorded in `replay`.
    """
    with torch.no_grad():
        if replay is not None:
            replay.trace(lambda: _untapped(hooked, batch))
        recorded = replay.record(onward) if replay is not None else contextlib.nullcontext(None)
        with hooked.tap(read=with_beside(hooked, reads)) as tap, recorded as recording:
            result = hooked(batch)
        return Clean(batch, dict(tap.values), result, hooked.distribution(result, batch), recording)


def _untapped(hooked: Hooked, batch: Any) -> Any:
    with hooked.opened(()):  # as adapters have it while their modules are tapped
        return hooked(batch)


def with_beside(hooked: Hooked, reads: Iterable[Site]) -> list[Site]:
    """The sites to read, and those that the task needs beside them."""
    wanted = list(reads)
    return list(dict.fromkeys([*wanted, *(other for site in wanted for other in hooked.task.beside(site))]))


def masked_pass(
    hooked: Hooked,
    clean: Clean,
    masking: Masks,
    generator: Generator | None = None,
    *,
    rounded: float | None = None,
    held: contextlib.ExitStack | None = None,
) -> tuple[Masked, Outputs]:
    """Masks the values of its sites and runs the model from there on; gradients reach probes and baselines.

    Args:
        clean: the clean pass, which has read `masking.reads`.
        generator: for the samples.
        rounded: instead of sampling, open the gates with P(z != 0) above this.
        held: see `onward_pass`.
    """
    masked = masking.masked(clean.values, lambda site: places(hooked, clean, site), generator, rounded=rounded)
    return together(masked), onward(hooked, clean, masking, masked, held)


def onward(
    hooked: Hooked, clean: Clean, masking: Masks, masked: Sequence[Masked], held: contextlib.ExitStack | None = None
) -> Outputs:
    """Runs the model with what `masking.masked` gave; sites behind the first are gated as their values come.

    Args:
        held: see `onward_pass`.
    """
    replaced: dict[str | Site, Replacement] = {
        part.site: part.onto(one, anew=number > 0)
        for number, (part, one) in enumerate(zip(masking.parts, masked, strict=True))
    }
    return _onward(hooked, clean, replaced, held)


def onward_pass(
    hooked: Hooked,
    clean: Clean,
    site: Site,
    replaced: Tensor | Replacement,
    held: contextlib.ExitStack | None = None,
) -> Outputs:
    """Runs the model with a value replaced, from its site onward where the clean pass was recorded.

    Args:
        held: what the caller closes after backward; until then the model stays tapped, as one with activation
            checkpointing needs, which computes parts of itself again then.
    """
    function = (lambda value: replaced) if isinstance(replaced, Tensor) else replaced
    return _onward(hooked, clean, {site: function}, held)


def _onward(
    hooked: Hooked, clean: Clean, replaced: dict[str | Site, Replacement], held: contextlib.ExitStack | None
) -> Outputs:
    first = next(site for site in replaced if isinstance(site, Site))
    played = clean.recording.play(first) if clean.recording is not None else contextlib.nullcontext()
    with contextlib.ExitStack() if held is None else contextlib.nullcontext(held) as stack:
        stack.enter_context(hooked.tap(replace=replaced))
        stack.enter_context(played)
        outputs = hooked(clean.batch)
    return hooked.distribution(outputs, clean.batch)


def real_positions(hooked: Hooked, clean: Clean, site: Site) -> Tensor:
    """Which positions of a site are no padding, over the position axes."""
    return hooked.task.real(site, clean.batch, clean.values[str(site)])


def examples(hooked: Hooked, clean: Clean, site: Site) -> Examples | None:
    """Whose each row of a site is; None where its first axis is the batch.

    Raises:
        BatchError: there are not as many numbers as rows, or larger ones than there are examples.
    """
    value = clean.values[str(site)]
    index = hooked.task.examples(site, clean.batch, clean.values)
    if index is None:
        return None
    sizes = site.gating().shape(value, site=site)
    rows, total = sizes[site.gating().positions[0]], count(clean.outputs)
    low, high = (int(end) for end in index.aminmax()) if index.numel() else (0, 0)
    if index.shape != (rows,) or (rows and not 0 <= low <= high < total):
        raise BatchError(
            f"site {site} has {rows} positions of {total} examples (as many as there are outputs), and the examples "
            f"given for them have shape {list(index.shape)}"
            + (f" and numbers from {low} to {high}" if index.numel() else "")
            + ". Give the number of each position's example, from 0: wrap(model, examples=lambda batch: ...)"
        )
    return Examples(index.to(value.device), total)


def places(hooked: Hooked, clean: Clean, site: Site) -> Places:
    """Which positions of a site are real, whose, and gated together with which."""
    return Places(real_positions(hooked, clean, site), examples(hooked, clean, site), units(hooked, clean, site))


def units(hooked: Hooked, clean: Clean, site: Site) -> Units | None:
    """Which positions of a site are gated together; None where each is alone."""
    numbers = hooked.task.units(site, clean.batch, clean.values)
    device = clean.values[str(site)].device
    return None if numbers is None else Units.of(numbers.to(device), examples(hooked, clean, site))
