"""The base class of explainers that close sets of positions of each example and look at the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from maskhooks.errors import SettingError
from maskhooks.explainers.base import Explainer
from maskhooks.explanations.explanation import Scores
from maskhooks.hooks.replay import Replay
from maskhooks.masks.baselines import BASELINES, Baseline, BaselineSetting
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DIVERGENCES, DivergenceSetting
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.plugins.registry import registry
from maskhooks.search.batched import BatchQuestions, RowQuestion
from maskhooks.search.question import Criterion, Question
from maskhooks.search.repeated import Repeated
from maskhooks.search.scheduler import SearchSteps, answered
from maskhooks.settings.types import Count, Seed
from maskhooks.sites.site import Selector, Site

T = TypeVar("T")


class Closing(Explainer):
    """An explainer that runs the model with sets of positions closed; nothing is learned.

    Args:
        hooked: the wrapped model.
        sites: where positions are closed, each site by itself: a tag, an address, a glob, a Site, or several of these.
        baseline: what replaces a closed position; a `Baseline` object serves a single site.
        divergence: distance between original and masked outputs, in nats per example.
        batch_size: number of position sets in one pass of the model.
        replay: whether passes start at the site, if possible, instead of running the whole model.
        seed: the random seed, for the order in which a shuffling loader gives batches to `explain_to`.

    Raises:
        SettingError: a number is out of range.
        UnknownSiteError: no site matches.
    """

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        baseline: BaselineSetting = "zero",
        divergence: DivergenceSetting = "kl",
        batch_size: Count = 64,
        replay: bool = True,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, seed=seed)
        self.sites = hooked.required_sites(sites)
        if isinstance(baseline, Baseline) and len(self.sites) > 1:
            raise SettingError("one Baseline object serves one site; give a registered name, or an explainer for each")
        _check_baseline(baseline)
        self.baseline, self.batch_size = baseline, batch_size
        self.divergence = registry.make(DIVERGENCES, divergence)
        self.replay = replay
        self.recorder = Replay(hooked.model) if replay else None

    @property
    def reads(self) -> Sequence[Site]:
        return self.sites

    def clean(self, batch: Any) -> Clean:
        """Run a clean pass of a batch."""
        return clean_pass(self.hooked, move(batch, device_of(self.hooked.model)), self.sites)

    def questions(self, clean: Clean, site: Site) -> Sequence[Question]:
        """Return a `Question` for each example, which runs the model on its position sets."""
        baseline = registry.make(BASELINES, self.baseline)
        rows = self.batch_size
        if clean.places[site].example_index is not None:
            return BatchQuestions(clean, site, baseline, rows=rows).members
        return [
            Repeated(clean, site, example, baseline, rows=rows, replay=self.recorder)
            for example in range(len(clean.values[site]))
        ]

    def answers(
        self, questions: Sequence[Question], ask: Callable[[Question], SearchSteps[T]], function: Criterion
    ) -> list[T]:
        """Return the search result of each example of a batch at a site.

        Args:
            ask: the search for one example.
            function: maps the original and the masked outputs to a row for each set.
        """
        if questions and isinstance(questions[0], RowQuestion):
            return questions[0].batch_questions.answer([ask(question) for question in questions], function)
        return [_answered(question, ask(question), function) for question in questions]

    def spread_scores(
        self, clean: Clean, questions: Sequence[Question], scores: Sequence[Tensor], rest: float
    ) -> Scores:
        """Return the scores of a site.

        Args:
            questions: one for each example.
            scores: for each example, a score in [0, 1] per position.
            rest: the score of padding.
        """
        site = questions[0].site
        values = torch.full(site.gating().mask_shape(clean.values[site], site=site), rest)
        for question, numbers in zip(questions, scores, strict=True):
            question.write(numbers, values.view(-1))
        return self.site_scores(clean, site, site.depth or 0, values)


def _answered(question: Question, steps: SearchSteps[T], function: Criterion) -> T:
    try:
        return answered(steps, lambda sets: question.measured(sets, function))
    finally:
        question.forget()


def _check_baseline(baseline: str | Mapping[str, Any] | Baseline) -> None:
    """Refuse a baseline that needs training data, and would silently be zero without it."""
    made = registry.make(BASELINES, baseline)
    if not made.started and type(made).fit is not Baseline.fit:
        raise SettingError(
            f"the baseline {type(made).__name__} needs training data, which a search does not see. Use 'zero', or "
            "give a vector: Token(values.mean((0, 1)))."
        )
