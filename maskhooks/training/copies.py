"""Copies: several gate samples of each example in one batch, for per-example logits."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from maskhooks.errors import BatchError
from maskhooks.hooks.replay import Replay
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.probes import PerExampleLogits
from maskhooks.masks.samples import GateSamples
from maskhooks.model.outputs import count
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.training.problem import Problem

# Samples the gates in one step; returns the samples, the divergence and the penalty, in nats per example.
Estimate = Callable[
    [Problem, Clean, MaskingGroup, Generator, contextlib.ExitStack],
    tuple[GateSamples, Float[Tensor, " batch"], Float[Tensor, " batch"]],
]


class Copies:
    """Estimates that are means over several samples of an example's gates.

    The copies of a batch are one larger batch, whose clean pass is recorded once, so that a step runs only what lies
    above the site. Examples that cannot be repeated, such as the nodes of one graph, get one pass for each sample.

    Args:
        estimate: samples the gates once.
        clean: the clean pass of the batch.
        count: the number of samples.
        replay: what records the clean pass of the copies; None runs the whole model in each step.

    Raises:
        BatchError: copies of an example have other values than the example.
    """

    def __init__(
        self, estimate: Estimate, clean: Clean, group: MaskingGroup, count: int, replay: Replay | None
    ) -> None:
        self.estimate, self.clean, self.count = estimate, clean, count
        self.copied = _copied(clean, group, count, replay) if count > 1 else None

    def __call__(
        self, problem: Problem, group: MaskingGroup, source: Generator, held: contextlib.ExitStack
    ) -> tuple[GateSamples, Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return the samples, and the mean divergence and penalty of each example, in nats."""
        if self.copied is None:
            found = [self.estimate(problem, self.clean, group, source, held) for _ in range(self.count)]
            means = [torch.stack(column).mean(0) for column in list(zip(*found, strict=True))[1:]]
            return found[-1][0], means[0], means[1]
        with _repeated(group, self.count):
            samples, divergence, penalty = self.estimate(problem, self.copied, group, source, held)
        rows = self.count * count(self.clean.outputs)
        means = [one.view(self.count, -1).mean(0) for one in (divergence, penalty)]
        return _first(samples, rows // self.count, rows), means[0], means[1]


def _first(samples: GateSamples, examples: int, rows: int) -> GateSamples:
    """Return the samples of the first copy; the gates' probabilities are those of all copies."""
    fields = {one.name: getattr(samples, one.name) for one in dataclasses.fields(samples)}
    first: dict[str, Any] = {
        name: one[:examples]
        for name, one in fields.items()
        if isinstance(one, Tensor) and one.dim() and len(one) == rows
    }
    return dataclasses.replace(samples, **first)


@contextlib.contextmanager
def _repeated(group: MaskingGroup, copies: int) -> Iterator[None]:
    """Let per-example logits serve a batch of copies, inside the `with`."""
    found = {id(vote.probe): vote.probe for masking in group.maskings for vote in masking.votes}.values()
    probes = [probe for probe in found if isinstance(probe, PerExampleLogits)]
    try:
        for probe in probes:
            probe.copies = copies
        yield
    finally:
        for probe in probes:
            probe.copies = 1


def _copied(clean: Clean, group: MaskingGroup, copies: int, replay: Replay | None) -> Clean | None:
    """Return the clean pass of a batch of copies; None if the examples cannot be repeated."""
    if len(group.sites) > 1 or clean.places[group.sites[0]].example_index is not None:
        return None
    examples = count(clean.outputs)
    batch = clean.hooked.task.select(clean.batch, list(range(examples)) * copies, examples)
    made = clean_pass(clean.hooked, batch, group.reads, group.sites, replay)
    if count(made.outputs) == examples:
        return None
    for site in group.reads:
        here, there = made.values[site][:examples], clean.values[site]
        if here.shape != there.shape or not torch.allclose(here, there, rtol=0.01, atol=0.001):
            raise BatchError(
                f"copies of the batch's examples have other values at {site} than the examples. Say how to select "
                "examples: wrap(model, select=lambda batch, numbers: ...)"
            )
    return made
