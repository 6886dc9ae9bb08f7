"""The methods that benchmarks of explanations compare: explainers of a BERT's tokens, in the settings that they share.

All score the tokens of a text for the class that the model predicts. Most do so at the output of the word embeddings.
`iba` and `schulz` limit information at one hidden state, with noise of the statistics of training texts, and
`attention` is that of [CLS] in the last layer, mean over heads: their scores count as those of the tokens there.

- `integrated_gradients` has 50 steps from the embedding of [PAD]; it and `gradient_x_input` are of the logit, signed.
- `gradient_l2` is the norm of the logit's gradient by a token's embedding.
- `lime` fits the logit of 100 sets of tokens, the others replaced by [MASK], with a lasso at 1e-3; signed.
- `leave_one_out` replaces a token by [MASK]; the score is how far the output moves.
- `diffmask` is amortised: fitted once, with the recipe "language", it reads a token's embedding and one hidden state.
  `diffmask_per_example` optimises the gates of each batch, with [MASK] for what is closed.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoders import Examples, Row
from jaxtyping import Float
from maskhooks_captum.at_site import AtSite
from maskhooks_captum.explainer import CaptumExplainer
from maskhooks_captum.gradients import InputXGradient, IntegratedGradients
from maskhooks_captum.perturbations import Lime
from torch import Tensor

import maskhooks
from maskhooks import IBA, Attention, DiffMask, Explanation, Guan, Hooked, LeaveOneOut, Random, Recipe, Schulz
from maskhooks.explainers.base import Explainer
from maskhooks.masks.baselines import Token
from maskhooks.metrics.intervals import interval
from maskhooks.metrics.judgement import Judgement

INPUT = "bert.embeddings.word_embeddings:output"
BATCH = 32
LENGTH = 64  # tokens of a text, which is cut there
AT_ONCE = 128  # rows in one pass of integrated gradients
FITTED = 8  # texts in a training step of the amortised masks
STATISTICS = 640  # training texts for the noise of bottlenecks
TIMED = 3.0  # seconds for which a quick method is repeated


@dataclass(frozen=True)
class Settings:
    """What was chosen by trials on training texts.

    Attributes:
        layer: the encoder layer whose output `iba` and `schulz` limit; None for the word embeddings.
        beta: the price of information of `iba`, in nats of loss per nat of mean capacity.
        schulz_beta: that of `schulz`.
        read: the encoder layer whose output the amortised masks read beside the embeddings.
        margin: the divergence that DiffMask's masks may cost, in nats.
        fit_steps: training steps of the amortised masks.
        logit_steps: steps of the gates of an example.
    """

    layer: int | None
    beta: float
    schulz_beta: float
    read: int
    margin: float = 0.1
    fit_steps: int = 480
    logit_steps: int = 150


class GradientNorm(CaptumExplainer):
    """The Euclidean norm of the output's gradient by a position's value."""

    name = "gradient-l2"

    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        value = at.layout.value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(at(value, at.rows).sum(), value)
        return at.layout.summed(gradient**2).sqrt()


@dataclass(frozen=True)
class Methods:
    """The methods on one model.

    Args:
        hooked: the model.
        tokenizer: its tokenizer.
        learned: batches of training texts, for the noise of bottlenecks.
        folder: where its amortised masks are kept.
        settings: what was chosen by trials.
    """

    hooked: Hooked
    tokenizer: Any
    learned: Sequence[Any]
    folder: Path
    settings: Settings

    def make(self, name: str) -> Explainer:
        """The explainer of a name, fitted if it learns."""
        return self._makers[name]()

    @property
    def _makers(self) -> dict[str, Callable[[], Explainer]]:
        hooked, chosen = self.hooked, self.settings
        pad, mask = (self._embedding(token) for token in (self.tokenizer.pad_token_id, self.tokenizer.mask_token_id))
        place = site(chosen.layer)
        single = dataclasses.replace(Recipe.named("stable"), steps=chosen.logit_steps, logit_learning_rate=0.1)
        return {
            "iba": lambda: IBA(hooked, place, beta=chosen.beta).fit(self.learned, progress=False),
            "schulz": lambda: Schulz(hooked, place, beta=chosen.schulz_beta).fit(self.learned, progress=False),
            "diffmask": lambda: maskhooks.load(self.folder, hooked),
            "diffmask_per_example": lambda: DiffMask(
                hooked, INPUT, amortized=False, margin=chosen.margin, baseline=Token(mask), recipe=single
            ),
            "integrated_gradients": lambda: IntegratedGradients(
                hooked, INPUT, baseline=pad, n_steps=50, internal_batch_size=AT_ONCE
            ),
            "gradient_l2": lambda: GradientNorm(hooked, INPUT),
            "gradient_x_input": lambda: InputXGradient(hooked, INPUT),
            "lime": lambda: Lime(hooked, INPUT, baseline=mask, n_samples=100, alpha=1e-3, perturbations_per_eval=50),
            "guan": lambda: Guan(hooked, INPUT),
            "leave_one_out": lambda: LeaveOneOut(hooked, INPUT, baseline=Token(mask)),
            "attention": lambda: Attention(hooked, heads="mean", queries="cls", layer=-1),
            "random": lambda: Random(hooked, INPUT, seed=3),
        }

    def _embedding(self, token: int) -> Float[Tensor, " hidden"]:
        model: Any = self.hooked.model
        vector: Tensor = model.get_input_embeddings().weight[token]
        return vector.detach().clone()

    def fit_amortised(self, examples: Examples) -> float:
        """Fit the amortised masks on texts, unless they are in the folder; the seconds that it took.

        A tenth of the texts, which masks are not trained on, choose the state that is kept.
        """
        if self.fit_seconds is not None:
            return self.fit_seconds
        explainer = self._amortised()
        batches = [examples.batch(numbers) for numbers in examples.batches(FITTED, random.Random(0))]
        held = -(-len(batches) // 10)
        begun = time.perf_counter()
        explainer.fit(batches[held:], batches[:held])
        seconds = time.perf_counter() - begun
        explainer.save(self.folder)
        about = {"settings": self._fit_settings, "seconds": seconds}
        (self.folder / "fit.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        return seconds

    @property
    def fit_seconds(self) -> float | None:
        """The seconds that the fit of the masks in the folder took; None if there are none with these settings."""
        try:
            about = json.loads((self.folder / "fit.json").read_text(encoding="utf-8"))
        except OSError:
            return None
        same = all(about["settings"].get(name) == value for name, value in self._fit_settings.items())
        return float(about["seconds"]) if same else None

    @property
    def _fit_settings(self) -> dict[str, Any]:
        """The settings that the amortised masks depend on."""
        return {name: getattr(self.settings, name) for name in ("read", "margin", "fit_steps")}

    def _amortised(self) -> DiffMask:
        chosen = self.settings
        recipe = dataclasses.replace(Recipe.named("language"), steps=chosen.fit_steps)
        read = site(chosen.read)
        return DiffMask(self.hooked, INPUT, conditioned_on=read, cumulative=False, margin=chosen.margin, recipe=recipe)


def site(layer: int | None) -> str:
    """The output of an encoder layer; None for the word embeddings."""
    return INPUT if layer is None else f"bert.encoder.layer.{layer}:output"


def rows_of(path: Path) -> list[Row]:
    """The examples in a file of an encoder."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sampled(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Rows drawn without replacement, at most `count`."""
    return random.Random(seed).sample(list(rows), min(count, len(rows)))


def ordered(rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Batches of texts of similar length."""
    examples = Examples(rows, tokenizer, LENGTH)
    return [examples.batch(numbers) for numbers in examples.batches(BATCH)]


def explained(explainer: Explainer, batches: Sequence[Any]) -> tuple[Explanation, float]:
    """The scores of all tokens, and the seconds of an example; quick methods are repeated, and count by the median."""
    times: list[float] = []
    while not times or (sum(times) < TIMED and len(times) < 5):
        begun, parts, first = time.perf_counter(), list[Explanation](), 0
        for batch in batches:
            parts.append(explainer.explain(batch, start_index=first))
            first += len(batch["input_ids"])
        times.append(time.perf_counter() - begun)
    return at_input(Explanation.concat(parts)), statistics.median(times) / first


def at_input(explanation: Explanation) -> Explanation:
    """The scores at one site as scores of the tokens at its positions."""
    (_,) = explanation.sites
    depth = np.zeros_like(explanation.columns["depth"])
    return dataclasses.replace(explanation, columns={**explanation.columns, "depth": depth}, sites=(INPUT,))


def figures(judgements: Mapping[str, Judgement], seconds: float) -> dict[str, Any]:
    """The figures of one method: means over texts, their intervals of 95 %, the seconds of an example."""
    found = {name: interval(one) for name, one in judgements.items()}
    return {
        **{name: one.mean for name, one in found.items()},
        "interval": {name: [one.low, one.high] for name, one in found.items()},
        "seconds_per_example": seconds,
    }
