"""Explaining again: what metrics ask of the explainer whose explanation they judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.model.hooked import Hooked


@runtime_checkable
class Explaining(Protocol):
    """An explainer, as metrics use it; each `Explainer` is one.

    Attributes:
        name: its name, as provenance has it.
        hooked: the wrapped model.
        fitted: whether it has learned from the model as it was when `fit` ran.
    """

    name: str
    hooked: Hooked
    fitted: bool

    def explain(self, batch: Any, *, start_index: int | Sequence[int] = 0) -> Explanation:
        """Explain a batch, its first example having this index."""

    def explain_all(self, batches: Iterable[Any], *, start_index: int = 0) -> Explanation:
        """Explain all batches, the first example having this index."""


#: The explainer of an explanation, or a function of a Hooked that makes it, and fits it if needed.
ExplainedBy = Explaining | Callable[[Hooked], Explaining]


def made(explainer: ExplainedBy, hooked: Hooked) -> Explaining:
    """Return the explainer itself, or make it for a model."""
    return explainer(hooked) if callable(explainer) else explainer


def check_explainer(explainer: ExplainedBy, explanation: Explanation, hooked: Hooked | None) -> None:
    """Raise SettingError if an explainer is of another model, or has another name than the explanation's."""
    if callable(explainer):
        return
    if hooked is not None and explainer.hooked.model is not hooked.model:
        raise SettingError(
            f"the explainer {explainer.name!r} was made for another model than hooked=... Give the Hooked that it was "
            "made with, hooked=explainer.hooked"
        )
    provenance = explanation.provenance
    names = {one["explainer"] for one in provenance.get("of", [provenance]) if "explainer" in one}
    if names - {explainer.name}:
        raise SettingError(
            f"the explanation was made by {', '.join(sorted(names))}, and not by the explainer {explainer.name!r}. "
            "Give the explainer that made it, explainer=..."
        )
