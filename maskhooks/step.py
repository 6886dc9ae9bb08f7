"""One step in plain torch: a clean pass that reads, a masked pass that replaces, from the masked site onward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from maskhooks.hooked import Hooked
from maskhooks.masking import Masked, Masking
from maskhooks.outputs import Outputs
from maskhooks.port import Replacement
from maskhooks.replay import Recording, Replay
from maskhooks.site import Site


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
            replay.trace(lambda: hooked(batch))
        recorded = replay.record(onward) if replay is not None else contextlib.nullcontext(None)
        with hooked.tap(read=list(reads)) as tap, recorded as recording:
            result = hooked(batch)
        return Clean(batch, dict(tap.values), result, hooked.distribution(result, batch), recording)


def masked_pass(
    hooked: Hooked,
    clean: Clean,
    masking: Masking,
    generator: Generator | None = None,
    *,
    rounded: float | None = None,
    held: contextlib.ExitStack | None = None,
) -> tuple[Masked, Outputs]:
    """Masks the site's value and runs the model from there on; gradients reach probes and baseline.

    Args:
        clean: the clean pass, which has read `masking.reads`.
        generator: for the samples.
        rounded: instead of sampling, open the gates with P(z != 0) above this.
        held: see `onward_pass`.
    """
    masked = masking(clean.values, real_positions(hooked, clean, masking.site), generator, rounded=rounded)
    return masked, onward_pass(hooked, clean, masking.site, masking.onto(masked), held)


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
    played = clean.recording.play(site) if clean.recording is not None else contextlib.nullcontext()
    function = (lambda value: replaced) if isinstance(replaced, Tensor) else replaced
    with contextlib.ExitStack() if held is None else contextlib.nullcontext(held) as stack:
        stack.enter_context(hooked.tap(replace={site: function}))
        stack.enter_context(played)
        outputs = hooked(clean.batch)
    return hooked.distribution(outputs, clean.batch)


def real_positions(hooked: Hooked, clean: Clean, site: Site) -> Tensor:
    """Which positions of a site are no padding, over the position axes."""
    return hooked.task.real(site, clean.batch, clean.values[str(site)])
