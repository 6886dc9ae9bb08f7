"""Removal: run the model on a batch with positions removed at a site, in order of their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from maskhooks.errors import SettingError
from maskhooks.explanations.scores import Columns, Scores
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.replay import Replay
from maskhooks.masks.baselines import BASELINES, Baseline, BaselineSetting, Token
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.masking import Masking
from maskhooks.metrics.evidence import Evidence, Floats, difference, in_order
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Outputs
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.masked import onward_pass
from maskhooks.plugins.registry import registry
from maskhooks.seeds import seeded
from maskhooks.sites.site import Site

#: What becomes of a removed position.
Operator = Literal["baseline", "mask", "delete"]
Numbers = npt.NDArray[np.int64]
Compared = Callable[[Outputs, Outputs], Float[Tensor, " batch"]]

_TIES, _NOISE = 410, 411  # the purposes of random numbers


@dataclass(frozen=True)
class Removing:
    """How positions are removed.

    Args:
        operator: "baseline": the value at the site becomes a baseline; "mask": the site is the output of an embedding,
            and the value becomes that of a token; "delete": tokens are left out of the batch, at an input of a text
            model whose task knows how.
        baseline: what the operator "baseline" puts there. One that gathers statistics, such as "mean", takes those of
            the batches that are judged.
        token: the id of the token of the operator "mask"; None for the mask token that the model's task knows.
        absolute: whether positions are ordered by the absolute value of their scores.
        seed: the random seed, for the order of equal scores.
    """

    operator: Operator = "baseline"
    baseline: BaselineSetting = "zero"
    token: int | None = None
    absolute: bool = False
    seed: int = 0


class Removal:
    """A batch whose positions are removed in order of their scores.

    Equal scores are in an order drawn for each example from the seed, the same in any batch.

    Args:
        clean: the clean pass of the batch, which has read the site.
        masking: replaces values at the site.
        gates: the score of each gate of the batch; NaN where it does not count and always stays.
        owners: the example of each gate, counted in the batch.
        examples: the index of each example of the batch.
        how: how positions are removed.

    Attributes:
        clean, masking, gates, owners, examples: as given.
    """

    def __init__(
        self, clean: Clean, masking: Masking, gates: Floats, owners: Numbers, examples: Numbers, how: Removing
    ) -> None:
        self.clean, self.masking, self.gates, self.owners, self.examples = clean, masking, gates, owners, examples
        self._deletes, seed = how.operator == "delete", how.seed
        here = np.flatnonzero(~np.isnan(gates))
        self._noise = seeded(seed, _NOISE, int(examples[0]))
        self._counts = np.bincount(owners[here], minlength=len(examples))
        sizes = zip(examples.tolist(), self._counts.tolist(), strict=True)
        draws = [np.random.default_rng(seeded(seed, _TIES, number)).random(size) for number, size in sizes]
        within = np.argsort(owners[here], kind="stable")  # the gates of each example in order, as the draws are
        ties = np.empty(len(here))
        ties[within] = np.concatenate([np.empty(0), *draws])
        order = np.lexsort([ties, -gates[here], owners[here]])
        starts = np.cumsum(self._counts) - self._counts
        rank = np.empty(len(here), np.int64)
        rank[order] = np.arange(len(here)) - np.repeat(starts, self._counts)
        self._here, self._owners, self._rank = here, owners[here], rank

    def numbers(self, share: float) -> Numbers:
        """Return how many positions a share of each example is, rounded up."""
        found: Numbers = np.ceil(np.round(share * self._counts, 6)).astype(np.int64)
        return found

    def shares(self, shares: Sequence[float]) -> Floats:
        """Return the share of positions that each of these is after rounding up, `[share, example]`."""
        return np.stack([self.numbers(share) for share in shares]) / np.maximum(self._counts, 1)

    def without_highest(self, shares: Sequence[float], compare: Compared) -> Float[Tensor, "share batch"]:
        """Compare the original outputs with those without each share of positions, those of the highest scores."""
        return self._compared([self._rank < self._of(share) for share in shares], compare)

    def without_lowest(self, shares: Sequence[float], compare: Compared) -> Float[Tensor, "share batch"]:
        """Compare the original outputs with those without each share of positions, those of the lowest scores."""
        total = self._counts[self._owners]
        return self._compared([self._rank >= total - self._of(share) for share in shares], compare)

    def only_highest(self, shares: Sequence[float], compare: Compared) -> Float[Tensor, "share batch"]:
        """Compare the original outputs with those with only each share of positions, those of the highest scores."""
        return self._compared([self._rank >= self._of(share) for share in shares], compare)

    def _of(self, share: float) -> Numbers:
        return self.numbers(share)[self._owners]

    @torch.no_grad()
    def _compared(self, removed: Sequence[npt.NDArray[np.bool_]], compare: Compared) -> Float[Tensor, "share batch"]:
        """Run the model once for each different set of removed positions, on the whole batch."""
        found: list[Tensor] = []
        for number, gates in enumerate(removed):
            if number and np.array_equal(gates, removed[number - 1]):
                found.append(found[-1])
                continue
            outputs = self._without(gates) if gates.any() else self.clean.outputs
            found.append(compare(self.clean.outputs, outputs).double().cpu())
        return torch.stack(found)

    def replacement(self, is_open: npt.NDArray[np.bool_]) -> Replacement:
        """Return what becomes of the site's value with only some gates open.

        Args:
            is_open: whether each of `gates` is; those that do not count must be.
        """
        site = self.masking.site
        value = self.clean.values[site]
        noise = Generator(value.device).manual_seed(self._noise) if self.masking.noisy else None
        masked = self.masking.mask(value, self.clean.places[site], self._sample(is_open), None, noise)
        return self.masking.replacement(masked)

    def _without(self, removed: npt.NDArray[np.bool_]) -> Outputs:
        site, is_open = self.masking.site, np.ones(len(self.gates), bool)
        is_open[self._here[removed]] = False
        if self._deletes:
            return _deleted(self.clean, site, self._sample(is_open))
        return onward_pass(self.clean, {site: self.replacement(is_open)})

    def _sample(self, is_open: npt.NDArray[np.bool_]) -> Float[Tensor, "*gated"]:
        site = self.masking.site
        value = self.clean.values[site]
        shape = site.gating().mask_shape(value, site=site)
        return torch.from_numpy(is_open).to(value.device, torch.float32).view(shape)


def removals(evidence: Evidence, how: Removing) -> Iterator[Removal]:
    """Yield each batch of the evidence, with the scores at its gates. Positions gated together have one score.

    Raises:
        SettingError: the batches are not those that were explained, or an operator does not fit the site.
    """
    hooked = evidence.hooked
    assert hooked is not None
    (site,) = hooked.required_sites(evidence.site)
    baseline, replay = replacing(hooked, site, how, evidence.batches), Replay(hooked.model)
    first = evidence.start_index
    for batch in evidence.batches:
        clean = _clean(hooked, batch, site, replay)
        masking = _masking(clean, site, baseline)
        _check_predictions(evidence, clean, first)
        gates, owners, size = _placed(evidence, clean, masking, first)
        examples = np.arange(first, first + size)
        if np.isin(examples, evidence.examples).any():
            yield Removal(clean, masking, np.abs(gates) if how.absolute else gates, owners, examples, how)
        first += size
    evidence.check_reached(first)


def _placed(evidence: Evidence, clean: Clean, masking: Masking, first: int) -> tuple[Floats, Numbers, int]:
    """Return the score of each gate of a batch, NaN where it does not count; its example; and how many there are."""
    task, site, places = clean.hooked.task, masking.site, clean.places[masking.site]
    shape = site.gating().mask_shape(clean.values[site], site=site)
    empty = torch.zeros(shape)
    names, edges = task.names(site, clean.batch), task.edges(site, clean.batch, clean.values)
    scaffold = Scores(site, evidence.depth, empty, places.valid, names, places.example_index, edges)
    columns = scaffold.rows(first)
    owners = columns["example"].astype(np.int64) - first
    theirs = np.flatnonzero(columns["valid"] & np.isin(columns["example"], evidence.examples))
    inside = (evidence.columns["example"] >= first) & (evidence.columns["example"] < first + scaffold.count)
    mine = np.flatnonzero(inside)
    theirs = theirs[in_order(_at(columns, theirs))]
    unlike = difference(_at(evidence.columns, mine), _at(columns, theirs))
    if unlike:
        raise SettingError(
            f"the batches are not those that were explained at {site}: {unlike} (here the explanation, there the "
            "batch). Give the same batches in the same order, without shuffling"
        )
    scores, counts = np.zeros(len(owners), np.float32), np.zeros(len(owners), bool)
    scores[theirs], counts[theirs] = evidence.columns["score"][mine], evidence.counted[mine]
    grid = torch.from_numpy(scores).view(shape)
    if places.units is not None:
        grid = places.units.mean(grid.to(places.units.first.device), site.gating()).cpu()
    heads = masking.mask(clean.values[site], places, empty.to(clean.values[site].device)).counted.cpu().numpy()
    gates = np.where(counts & heads.reshape(-1), grid.reshape(-1).double().numpy(), np.nan)
    return gates, owners, scaffold.count


def _check_predictions(evidence: Evidence, clean: Clean, first: int) -> None:
    """Raise SettingError if the model predicts otherwise than when the examples were explained."""
    for number, prediction in enumerate(clean.hooked.task.predictions(clean.outputs) or (), first):
        before = evidence.predictions.get(number, prediction)
        if before != prediction:
            raise SettingError(
                f"the batches are not those that were explained: example {number} was predicted {before!r}, and here "
                f"it is {prediction!r}. Give the same batches in the same order, without shuffling"
            )


def _at(columns: Columns, rows: npt.NDArray[np.intp]) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _clean(hooked: Hooked, batch: Any, site: Site, replay: Replay | None = None) -> Clean:
    on_device = move(batch, device_of(hooked.model))
    return clean_pass(hooked, on_device, [site], [site] if replay is not None else (), replay)


def _masking(clean: Clean, site: Site, baseline: Baseline) -> Masking:
    masking = Masking(site, site.depth or 0, [], HardConcrete(), baseline)
    sizes = masking.sizes_for(clean.values)
    masking.start(sizes, clean.values[site].device)
    if list(baseline().shape) != sizes["baseline"]:
        raise SettingError(
            f"the baseline has shape {list(baseline().shape)}, but the features of {site} have shape "
            f"{sizes['baseline']}. One Baseline object serves one site: judge explanation.select(site=...)"
        )
    return masking


def replacing(hooked: Hooked, site: Site, how: Removing, batches: Sequence[Any]) -> Baseline:
    """Return what replaces removed values: a baseline that has gathered what it needs from the batches."""
    if how.operator == "mask":
        return _token(hooked, site, how.token)
    if how.operator == "delete" and "input" not in site.tags:
        raise SettingError(
            f"operator='delete' leaves tokens out of the input, but {site} is not tagged as one. Use "
            "operator='baseline' there"
        )
    if how.token is not None:
        raise SettingError(f"token={how.token} is for operator='mask', but the operator is {how.operator!r}")
    baseline = registry.make(BASELINES, how.baseline)
    if baseline.started or type(baseline).fit is Baseline.fit:
        return baseline
    for batch in batches:
        clean = _clean(hooked, batch, site)
        value, pattern = clean.values[site], site.gating()
        _masking(clean, site, baseline)
        rows = pattern.rows(value, site=site)[clean.places[site].valid]
        baseline.fit(rows.reshape(len(rows), *pattern.feature_shape(value, site=site)))
    return baseline


def _deleted(clean: Clean, site: Site, sample: Float[Tensor, "*gated"]) -> Outputs:
    """Return the outputs without the tokens whose gates are closed."""
    hooked, places = clean.hooked, clean.places[site]
    if places.units is not None:
        sample = places.units.shared(sample, site.gating())
    plain = sample.dim() == 2 and sample.shape == places.valid.shape and places.example_index is None
    batch = hooked.task.without_tokens(clean.batch, sample == 0) if plain else None
    if batch is None:
        raise SettingError(
            f"operator='delete' needs a batch of token ids with a gate for each token, and the task "
            f"{hooked.task.name!r} cannot leave out positions of {site}. The other operators are 'baseline' and 'mask'"
        )
    with hooked.tap():
        outputs = hooked.distribution(hooked(batch), batch)
    if not isinstance(outputs, Distribution):
        raise SettingError(
            "operator='delete' needs one prediction per example, because positions move when tokens are left out. Use "
            "operator='mask' or 'baseline'"
        )
    return outputs


def _token(hooked: Hooked, site: Site, token: int | None) -> Baseline:
    """Return the value of a token at the output of an embedding."""
    modules = dict(hooked.model.named_modules())
    embedding = modules.get(site.module)
    if not isinstance(embedding, nn.Embedding) or site.port != "output" or site.path:
        raise SettingError(
            f"operator='mask' needs the output of an nn.Embedding, but {site} is of a {type(embedding).__name__}. Use "
            "operator='baseline' there"
        )
    number = hooked.task.mask_token if token is None else token
    if number is None:
        raise SettingError(
            f"operator='mask' needs the id of a token, and the task {hooked.task.name!r} knows no mask token. Give it: "
            "{'name': ..., 'operator': 'mask', 'token': 103}"
        )
    if not 0 <= number < embedding.num_embeddings:
        raise SettingError(f"there is no token {number}: {site} embeds {embedding.num_embeddings} tokens")
    ids = torch.tensor(number, device=embedding.weight.device)
    with torch.no_grad():
        return Token(type(embedding).forward(embedding, ids))  # some scale their vectors; no hook runs
