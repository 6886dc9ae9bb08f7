"""At a site: a model as the function that Captum wants, from the value at a site to a number per example."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from maskhooks.errors import BatchError
from maskhooks.passes.clean import Clean
from maskhooks_captum.explained import Explained
from maskhooks_captum.layout import Layout


class AtSite:
    """Runs a model with the value at a site replaced, while `hooked.tap(replace={site: at_site.replacement})` is open.

    Args:
        clean: the batch and its clean pass.
        layout: the site's value for Captum.
        explained: what is explained.

    Attributes:
        model: the model.
        layout: as given.
    """

    def __init__(self, clean: Clean, layout: Layout, explained: Explained) -> None:
        self.model, self.layout = clean.hooked.model, layout
        self._clean, self._explained = clean, explained
        self._value: Tensor | None = None

    @property
    def rows(self) -> Int[Tensor, " row"]:
        """The numbers of all examples: what Captum repeats together with the value."""
        return torch.arange(len(self.layout.value), device=self.layout.value.device)

    def __call__(self, value: Shaped[Tensor, "row *front"], rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return the explained number for each row; of a whole value, summed over its examples.

        Args:
            value: values at the site, as `Layout.value`.
            rows: which example of the batch each row is.
        """
        if not self.layout.whole:
            select = self._clean.hooked.task.select
            return self._run(value, select(self._clean.batch, rows.tolist(), self.layout.examples), rows)
        every = torch.arange(self.layout.examples, device=value.device)
        return torch.stack([self._run(one[None], self._clean.batch, every).sum() for one in value])

    def replacement(self, old: Shaped[Tensor, "*value"]) -> Shaped[Tensor, "*value"]:
        """Return this pass's value for the one that arrives at the site; it is compared, as a longer one may fit."""
        assert self._value is not None
        if self._value.shape != old.shape:
            raise BatchError(
                f"site {self.layout.site} has a value of shape {list(old.shape)} where {list(self._value.shape)} was "
                f"expected. {_SELECT}"
            )
        return self._value.to(old)

    def _run(self, value: Tensor, batch: Any, rows: Tensor) -> Tensor:
        self._value = self.layout.back(value)
        found = self._explained(self._clean.hooked(batch), batch, rows)
        if found.shape != rows.shape:
            raise BatchError(f"the model returns {len(found)} outputs for {len(rows)} examples. {_SELECT}")
        return found


_SELECT = "Say how to select examples: wrap(model, select=lambda batch, numbers: ...)"
