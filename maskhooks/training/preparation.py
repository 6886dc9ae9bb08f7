"""Preparation for training: shapes, statistics, fitted baselines, and the divergence of the fully masked model."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Generator, Tensor

from maskhooks.data.epochs import Epochs
from maskhooks.distributed.ranks import Ranks, Shard
from maskhooks.errors import PatternError
from maskhooks.hooks.replay import Replay
from maskhooks.masks.baselines import Learned
from maskhooks.masks.group import MaskingGroup, by_shared_modules, sites_of
from maskhooks.masks.masking import Masking, draw
from maskhooks.masks.samples import Masked
from maskhooks.masks.votes import value_at
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Divergence, count
from maskhooks.model.task import move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.masked import onward_pass
from maskhooks.progress import length, track
from maskhooks.seeds import generator, seeded
from maskhooks.sites.site import Site
from maskhooks.training.penalty import Penalty
from maskhooks.training.problem import BASELINE, Problem
from maskhooks.training.warm_start import warm_start

_OPEN = 5.0  # the logit of a nearly open gate; its negative, of a nearly closed one


def prepare(
    problem: Problem,
    train: Epochs,
    replay: Replay | None,
    ranks: Ranks,
    progress: bool,
    seconds: float = math.inf,
) -> None:
    """Start and fit the maskings' modules, and start the objectives with the divergence of the fully masked model.

    Each rank reads the batches of all ranks, so all gather the same statistics.

    Args:
        seconds: the time for a warm start.
    """
    gather_and_fit_baselines(problem, train, replay, ranks, progress)
    closed = closed_divergences(
        problem.hooked,
        problem.groups,
        itertools.islice(train.batches, min(4, problem.recipe.statistics_batches) * ranks.world_size),
        problem.divergence,
        ranks.device,
        replay,
    )
    means = [divergence.mean() for divergence in closed]
    for objective, mean in zip(problem.objectives, means, strict=True):
        objective.to(ranks.device)
        objective.start(mean)
    apart = len(by_shared_modules(problem.groups)) == len(problem.groups)
    if problem.recipe.warm_start_batches and apart:  # a product of votes has to close one after another
        warm_start(problem, train, [mean.item() for mean in means], replay, ranks, progress, seconds)


def gather_and_fit_baselines(
    problem: Problem, train: Epochs, replay: Replay | None, ranks: Ranks, progress: bool
) -> None:
    """Gather statistics of values, and fit the baselines that come before the gates."""
    most = problem.recipe.statistics_batches * ranks.world_size
    read = itertools.islice(train.batches, most)
    known = length(train.batches)
    shown = track(read, "reading values", total=None if known is None else min(known, most), shown=progress)
    gather(problem.hooked, problem.maskings, shown, ranks.device, problem.penalty)
    fit_baselines(
        problem.hooked,
        problem.fit_first,
        train,
        problem.divergence,
        steps=problem.recipe.baseline_steps,
        ranks=ranks,
        seed=seeded(problem.seed, BASELINE),
        replay=replay,
        progress=progress,
    )


def gather(
    hooked: Hooked,
    maskings: Sequence[Masking],
    batches: Iterable[Any],
    device: torch.device,
    penalty: Penalty | None = None,
) -> None:
    """Start all parts on the first batch, and fit them on the values at valid positions of all batches.

    Args:
        penalty: a penalty to fit on the outputs.
    """
    reads = list(dict.fromkeys(site for masking in maskings for site in masking.reads))
    votes = {id(vote.probe): vote for masking in maskings for vote in masking.votes}
    sites = dict.fromkeys([*(masking.site for masking in maskings), *(s for v in votes.values() for s in v.reads)])
    baselines = {id(masking.baseline): masking for masking in maskings}
    for number, batch in enumerate(batches):
        clean = clean_pass(hooked, move(batch, device), reads)
        if penalty is not None:
            penalty.fit(clean.outputs)
        if number == 0:
            for masking in maskings:
                masking.start(masking.sizes_for(clean.values), device)
        rows = {}
        for site in sites:  # a vote may read selected rows, which the pass did not read as such
            value = value_at(site, clean.values)
            rows[site] = site.gating().rows(value, site=site)[hooked.task.valid(site, clean.batch, value)]
        for vote in votes.values():
            _check_positions(vote.reads, rows)
            vote.probe.fit([rows[site] for site in vote.reads])
        for masking in baselines.values():
            values = rows[masking.site]
            masking.baseline.fit(values.reshape(len(values), *masking.sizes["baseline"]))


def _check_positions(reads: Sequence[Site], rows: Mapping[Site, Shaped[Tensor, "position feature"]]) -> None:
    other = next((site for site in reads if len(rows[site]) != len(rows[reads[0]])), None)
    if other is not None:
        raise PatternError(
            f"site {other} has {len(rows[other])} valid positions in this batch, but {reads[0]}, which is read with "
            f"it, has {len(rows[reads[0]])}. Read sites with the same positions, such as the masked one alone: "
            f"DiffMask(hooked, sites, conditioned_on=sites). wrap(model, example=batch) finds such sites.",
            site=other,
        )


def fit_baselines(
    hooked: Hooked,
    maskings: Sequence[Masking],
    batches: Epochs,
    divergence: Divergence,
    *,
    steps: int,
    rate: float = 0.2,
    seed: int,
    ranks: Ranks,
    replay: Replay | None,
    progress: bool = False,
) -> None:
    """Fit learned baselines under random masks, each example with its own rate, and freeze them.

    Inputs need this: with a poor baseline, a gate keeps positions because the replacement does harm, not because they
    are needed; and a baseline trained with the gates drifts with them. Adam, in units of each feature's standard
    deviation, with a learning rate that falls from `rate` to zero.
    """
    learned = {id(masking.baseline): masking for masking in maskings if isinstance(masking.baseline, Learned)}
    for number, masking in enumerate(learned.values() if steps else ()):
        assert isinstance(masking.baseline, Learned)
        offset = masking.baseline.offset
        optimizer = torch.optim.Adam([offset], lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        known = f"fitting the baseline of {masking.site}"
        stream = itertools.islice(batches.batches_from(), steps)
        for step, (_, _, batch) in enumerate(track(stream, known, total=steps, shown=progress)):
            on_device = move(batch, ranks.device)
            clean = None if batch is None else clean_pass(hooked, on_device, [masking.site], [masking.site], replay)
            source = generator(seed, number, step)
            offset.grad = ranks.all_reduce(_slope(clean, masking, offset, divergence, source, ranks))
            optimizer.step()
            schedule.step()
        offset.requires_grad_(False)


def _slope(
    clean: Clean | None,
    masking: Masking,
    weight: Float[Tensor, "*features"],
    divergence: Divergence,
    source: Generator,
    ranks: Ranks,
) -> Float[Tensor, "*features"]:
    """Return this rank's part of the gradient of the mean divergence under a random mask; zero without a batch."""
    pattern = masking.pattern
    shape = None if clean is None else pattern.mask_shape(clean.values[masking.site])
    share = ranks.shard(ranks.shapes(shape, len(pattern.gated)))
    examples = ranks.shard(ranks.shapes(None if clean is None else (count(clean.outputs),), 1))
    if clean is None:
        return torch.zeros_like(weight)
    masked = random_mask(clean, masking, source, share, examples)
    weight.grad = None
    with contextlib.ExitStack() as held:
        outputs = onward_pass(clean, {masking.site: masking.replacement(masked)}, held)
        far = divergence(clean.outputs, outputs)
        # not autograd.grad, which reentrant checkpointing does not support
        (far.mean() * (len(far) / examples.whole[0])).backward()
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def random_mask(clean: Clean, masking: Masking, source: Generator, share: Shard, counted: Shard) -> Masked:
    """Keep positions at random, each example at a rate drawn from U(0, 1); the gates are nearly open or closed.

    The gate's own noise matters: a baseline far from all values does harm at z = .95, even if it does none at z = 0.

    Args:
        share, counted: this rank's shard of the gates, and of the examples, in the global batch.
    """
    value = clean.values[masking.site]
    shape = masking.pattern.mask_shape(value)
    places = clean.places[masking.site]
    examples = places.example_index
    rate = counted.of(torch.rand(counted.whole, generator=source, dtype=torch.float32), (count(clean.outputs),))
    rate = (rate if examples is None else rate[examples.index.cpu()]).view(-1, *[1] * (len(shape) - 1))
    drawn = share.of(torch.rand(share.whole, generator=source, dtype=torch.float32), shape)
    logits = torch.where((drawn if examples is None else examples.back(drawn)) < rate, _OPEN, -_OPEN)
    sample = draw(share.drawing(masking.gate), logits, source, examples).to(value.device)
    return masking.mask(value, places, sample)


def closed_divergences(
    hooked: Hooked,
    groups: Sequence[MaskingGroup],
    batches: Iterable[Any],
    divergence: Divergence,
    device: torch.device,
    replay: Replay | None,
) -> list[Float[Tensor, " example"]]:
    """Return for each group the divergence with its sites fully masked, per example of all batches, in nats."""
    sites = sites_of(groups)
    found: list[list[Tensor]] = [[] for _ in groups]
    for batch in batches:
        clean = clean_pass(hooked, move(batch, device), sites, sites, replay)
        for group, mine in zip(groups, found, strict=True):
            mine.append(closed_divergence(clean, group, divergence))
    return [torch.cat(mine) for mine in found]


@torch.no_grad()
def closed_divergence(clean: Clean, group: MaskingGroup, divergence: Divergence) -> Float[Tensor, " batch"]:
    """Return the divergence with every position of a group's sites masked, in nats per example."""
    masked = []
    for masking in group.maskings:
        value = clean.values[masking.site]
        closed = torch.zeros(masking.pattern.mask_shape(value), device=value.device)
        masked.append(masking.mask(value, clean.places[masking.site], closed))
    return divergence(clean.outputs, onward_pass(clean, group.replacements(masked)))
