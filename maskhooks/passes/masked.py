"""A masked pass: values replaced at sites, and the model from there on."""

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
    """Masks the values of a group's sites and runs the model from there on; gradients reach probes and baselines.

    Args:
        clean: the clean pass, which has read `group.reads`.
        generator: for the samples.
        rounded: instead of sampling, open the gates with P(z != 0) above this.
        held: see `onward_pass`.

    Returns:
        The samples of the gates, of several sites along one axis, and what the model says.
    """
    masked = group.sample(clean.values, clean.places, generator, rounded=rounded)
    samples = masked[0] if len(masked) == 1 else GateSamples.flattened(masked)
    return samples, onward_pass(clean, group.replacements(masked), held)


def onward_pass(
    clean: Clean, replaced: Mapping[Site, Replacement], held: contextlib.ExitStack | None = None
) -> Outputs:
    """Runs the model with values replaced, from the first site onward where the clean pass was recorded.

    Args:
        replaced: by site, in the order of computation, a function of its value.
        held: what the caller closes after backward; until then the model stays tapped, as one with activation
            checkpointing needs, which computes parts of itself again then.
    """
    hooked, recording = clean.hooked, clean.recording
    with contextlib.ExitStack() if held is None else contextlib.nullcontext(held) as stack:
        stack.enter_context(hooked.tap(replace=replaced))
        if recording is not None:
            stack.enter_context(recording.play(next(iter(replaced))))
        outputs = hooked(clean.batch)
    return hooked.distribution(outputs, clean.batch)
