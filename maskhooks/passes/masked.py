"""Masked pass: replace values at sites, and run the model from there."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from torch import Generator

from maskhooks.hooks.port import Replacement
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.samples import GateSamples
from maskhooks.model.outputs import Outputs
from maskhooks.passes.clean import Clean
from maskhooks.sites.site import Site


def masked_pass(
    clean: Clean,
    group: MaskingGroup,
    generator: Generator | None = None,
    *,
    rounded: float | None = None,
    held: contextlib.ExitStack | None = None,
) -> tuple[GateSamples, Outputs]:
    """Mask the values at a group's sites and run the model from there; gradients reach probes and baselines.

    Args:
        clean: the clean pass, which has read `group.reads`.
        generator: the random generator of the samples.
        rounded: open the gates with P(z != 0) above this, instead of sampling.
        held: see `onward_pass`.

    Returns:
        The gate samples, those of several sites along one axis, and the model's outputs.
    """
    masked = group.sample(clean.values, clean.places, generator, rounded=rounded)
    samples = masked[0] if len(masked) == 1 else GateSamples.flattened(masked)
    return samples, onward_pass(clean, group.replacements(masked), held)


def onward_pass(
    clean: Clean, replaced: Mapping[Site, Replacement], held: contextlib.ExitStack | None = None
) -> Outputs:
    """Run the model with values replaced, from the first site onward if the clean pass was recorded.

    Args:
        replaced: a function of the value at each site, in order of computation.
        held: a stack that the caller closes after backward. Until then the model stays tapped, as activation
            checkpointing needs: it computes modules again during backward.
    """
    hooked, recording = clean.hooked, clean.recording
    with contextlib.ExitStack() if held is None else contextlib.nullcontext(held) as stack:
        stack.enter_context(hooked.tap(replace=replaced))
        if recording is not None:
            stack.enter_context(recording.play(next(iter(replaced))))
        outputs = hooked(clean.batch)
    return hooked.distribution(outputs, clean.batch)
