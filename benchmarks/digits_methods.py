"""Other methods on the digits task's hidden state: as table 1 of De Cao et al. 2020 has them, and in other settings.

`published` has the settings of the authors' code, whatever one thinks of them; `variants` has what they leave out.
Attributions are non-negative scores on the hidden state, zero at padding, which sum to 1. In the authors' code

- the network is that of the epoch with the best validation accuracy, of 50 of Adam at 1e-3; what keeps its logits
  moderate is the entropy of a softmax over the examples of a batch.
- integrated gradients go from zero to the state in 500 steps, both ends included, to the logit. The gradient of each
  step is that by the state, not by the point on the path, so that each point counts in proportion to its share of the
  path. Sundararajan et al. 2017 have no such factor; Captum, in `variants`, has not either.
- Schulz has one gate a position, 500 steps of centred RMSprop at .1 from a logit of 5, one sample a step, a price of 10
  on the capacity, which is averaged over all ten positions, and the cross-entropy with the label. Mean and deviation of
  the noise are those of each position and feature over the training examples. In both, padding counts like digits.
- Guan adds noise in 500 such steps from -5, and scores 1 / deviation. The squared errors of the logit are summed over
  the examples, entropies averaged over them, so that an entropy weighs 1 over the number of examples.
- Erasure is not searched: all weight is on the first digit that decides the label.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from maskhooks_captum.gradients import IntegratedGradients
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from maskhooks import IBA, Erasure, Guan, Hooked, LeaveOneOut, Random, Schulz, wrap
from maskhooks.explainers.base import Explainer
from maskhooks.metrics.attribution import normalize
from maskhooks.model.outputs import Outputs
from maskhooks.progress import track
from maskhooks.toy_tasks.digits import HIDDEN, LENGTH, Digits, DigitsModel, accuracy, attribution, hook

Method = Callable[[], Float[Tensor, "example token"]]

PLAIN = "batch token hidden -> batch token"
BY_POSITION = f"{PLAIN}, token={LENGTH}"  # an axis with a size has statistics of its own


def train_as_published(train: Digits, validation: Digits, *, seed: int = 0, epochs: int = 50) -> DigitsModel:
    """Train the model as the authors do, and return it as it was after its best epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    source = torch.Generator().manual_seed(seed)
    best, kept = 0.0, model
    for _ in track(range(epochs), "training the authors' network"):
        for rows in torch.randperm(len(train), generator=source).split(128):
            batch = train[rows]
            logits = model(batch.query, batch.digits, batch.valid)
            entropy = Categorical(logits=logits).entropy()  # over the batch
            loss = F.binary_cross_entropy_with_logits(logits, batch.label) - 0.35 * entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        reached = accuracy(model, validation)
        if reached > best:
            best, kept = reached, copy.deepcopy(model)
    return kept.eval()


@dataclass(frozen=True)
class Methods:
    """The methods on one model, by name; each is computed when it is called.

    Args:
        model: the trained model.
        train, data: the training examples, and those to explain.
        steps: of integrated gradients and of the noise.
    """

    model: DigitsModel
    train: Digits
    data: Digits
    steps: int = 500

    def published(self) -> dict[str, Method]:
        """Return the methods of table 1, apart from DiffMask, in the authors' settings."""
        return {
            "erasure": self.data.erasure,
            "integrated_gradients": self.weighted_integrated_gradients,
            "schulz": partial(self.schulz, BY_POSITION),
            "guan": partial(self.guan, 1 / len(self.data)),
            "random": partial(self.explained, Random(self.hooked, HIDDEN)),
        }

    def variants(self) -> dict[str, Method]:
        """Return the methods in other settings: `*_default` are ours."""
        hooked = self.hooked
        return {
            "erasure_searched": partial(self.explained, Erasure(hooked, HIDDEN)),
            "leave_one_out": partial(self.explained, LeaveOneOut(hooked, HIDDEN)),
            "integrated_gradients_correct": partial(self.integrated_gradients, "zero"),
            "integrated_gradients_correct_from_mean": partial(self.integrated_gradients, "mean"),
            "schulz_statistics_per_feature": partial(self.schulz, PLAIN),
            "schulz_from_4.99": partial(self.schulz, BY_POSITION, logit_init=4.99),
            "schulz_default": partial(self.explained, Schulz(hooked, HIDDEN)),
            "guan_weight_1": partial(self.guan, 1.0),
            "guan_default": partial(self.explained, Guan(hooked, HIDDEN)),
            "iba_default": partial(self.explained, IBA(hooked, HIDDEN)),
        }

    @cached_property
    def hooked(self) -> Hooked:
        return hook(self.model)

    @property
    def batch(self) -> tuple[Tensor, ...]:
        return self.data.query, self.data.digits, self.data.valid

    def explained(self, explainer: Explainer) -> Float[Tensor, "example token"]:
        """Fit an explainer, if it learns, and return its attributions."""
        if isinstance(explainer, (Schulz, IBA)):
            explainer.fit([self.train_batch], progress=False)
        return attribution(explainer.explain(self.batch), self.data)

    def weighted_integrated_gradients(self) -> Float[Tensor, "example token"]:
        """Return integrated gradients as the authors compute them: |h . mean_a a f'(a h)|, a from 0 to 1."""
        with self.hooked.tap(read=HIDDEN) as tap, torch.no_grad():
            self.hooked(self.batch)
        state = tap.values[HIDDEN].requires_grad_()
        total = torch.zeros_like(state)
        for share in track(torch.linspace(0, 1, self.steps), "integrated gradients"):
            with self.hooked.tap(replace={HIDDEN: partial(_scaled, state, share)}):
                total += torch.autograd.grad(self.hooked(self.batch).sum(), state)[0]
        return normalize((state * total / self.steps).sum(-1).detach().abs(), self.data.valid)

    def integrated_gradients(self, baseline: str) -> Float[Tensor, "example token"]:
        """Return integrated gradients from Captum, without their sign."""
        explainer = IntegratedGradients(
            self.hooked, HIDDEN, baseline=baseline, n_steps=self.steps, internal_batch_size=10 * len(self.data)
        )
        explanation = explainer.fit([self.train_batch]).explain(self.batch)
        scores = torch.from_numpy(explanation["score"]).view(self.data.digits.shape)
        return normalize(scores.abs(), self.data.valid)

    def schulz(self, pattern: str, **recipe: Any) -> Float[Tensor, "example token"]:
        """Return the authors' Schulz; the model is wrapped without a mask of valid positions, so that padding counts.

        Args:
            pattern: of the hidden state: which axes have statistics of their own.
            recipe: what differs from the authors' settings.
        """
        padded = wrap(self.model, sites={HIDDEN: pattern}, output=lambda logits: Bernoulli(logits=logits))
        settings = {"name": "schulz", "steps": self.steps, **recipe}
        explainer = Schulz(padded, HIDDEN, divergence=self._label_loss, recipe=settings)
        explainer.fit([self.train_batch], progress=False)
        return attribution(explainer.explain(self.batch), self.data)

    def guan(self, weight: float) -> Float[Tensor, "example token"]:
        """Return the authors' Guan, in which a nat of noise is worth `weight`."""
        recipe = {"name": "guan", "steps": self.steps}
        return self.explained(Guan(self.hooked, HIDDEN, weight=weight, recipe=recipe))

    @property
    def train_batch(self) -> tuple[Tensor, ...]:
        return self.train.query, self.train.digits, self.train.valid

    def _label_loss(self, original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
        assert isinstance(masked, Bernoulli)
        return F.binary_cross_entropy_with_logits(masked.logits, self.data.label, reduction="none")


def _scaled(state: Tensor, share: Tensor, old: Tensor) -> Tensor:
    return share * state
