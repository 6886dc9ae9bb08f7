"""Our explainers in Captum's `LLMAttribution`."""

from __future__ import annotations

from typing import Any

import torch
from captum.attr import FeatureAblation
from captum.log import log_usage
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributions import Bernoulli

from maskhooks.errors import SettingError
from maskhooks.explainers.base import Explainer
from maskhooks_captum.attributions import MaskAttribution, Ours
from maskhooks_captum.forward import Function, model_of


class PromptMaskAttribution(FeatureAblation):  # type: ignore[misc] # Captum has no types
    """Attributes a language model's answer to parts of its prompt by an explainer of ours, inside `LLMAttribution`.

    `LLMAttribution(PromptMaskAttribution(model, "leave-one-out"), tokenizer)` takes it; pass `use_cached_outputs=False`
    to its `attribute`.

    Each token of the answer, and the answer as a whole, has an explanation of its own: which parts of the prompt are
    needed for its probability. Closed parts are replaced by the baselines of `inp`. The model runs without gradients,
    so the explainer is one that searches, such as leave-one-out, erasure or beam.

    Args:
        forward_func: the language model.
        explainer: the explainer's registered name, a mapping of its name and settings, or a function of a `Hooked` and
            its sites that makes one.

    Raises:
        SettingError: the explainer belongs to a `Hooked` already.
    """

    def __init__(self, forward_func: Function, explainer: Ours) -> None:
        super().__init__(forward_func)
        if isinstance(explainer, Explainer):
            raise SettingError("the explainer belongs to a Hooked. Give its name, or a function that makes one")
        self.explainer = explainer
        self.model = model_of(forward_func, None)  # stays when LLMAttribution puts its own function

    @log_usage()  # type: ignore[untyped-decorator] # as other attributions of Captum
    def attribute(
        self,
        inputs: Shaped[Tensor, "1 part"],
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Float[Tensor, "output part"]:
        """Return the scores of the parts for each output of the forward function: the whole answer, then its tokens."""
        extra = additional_forward_args if isinstance(additional_forward_args, tuple) else ()
        asked = _Answers(self.forward_func, extra, getattr(self.forward_func, "__self__", None))
        present = torch.ones_like(inputs, dtype=torch.float32)
        outputs = asked(present).shape[1]
        found = [
            MaskAttribution(
                asked, self.explainer, model=self.model, output=lambda answers, at=at: _whether(answers[:, at])
            ).attribute(present)
            for at in range(outputs)
        ]
        return torch.cat(found)


class _Answers(nn.Module):
    """Log-probabilities of an answer and its tokens for rows of parts; each row is asked once."""

    def __init__(self, function: Function, extra: tuple[Any, ...], owner: Any) -> None:
        super().__init__()
        self.function, self.extra = function, extra
        self.probabilities = getattr(owner, "attr_target", "log_prob") != "log_prob"
        self.known: dict[tuple[float, ...], Tensor] = {}

    def forward(self, rows: Float[Tensor, "row part"]) -> Float[Tensor, "row output"]:
        return torch.stack([self._answer(row) for row in rows])

    def _answer(self, row: Tensor) -> Tensor:
        key = tuple(row.tolist())
        if key not in self.known:
            found = self.function(row[None], *self.extra).detach().reshape(-1)
            self.known[key] = found.log() if self.probabilities else found
        return self.known[key]


def _whether(log_probability: Float[Tensor, " row"]) -> Bernoulli:
    """Return whether the model gives this answer."""
    log_probability = log_probability.double().clamp(max=-1e-12)
    return Bernoulli(logits=(log_probability - torch.log(-torch.expm1(log_probability))).float())
