"""What the outputs of `Pyramid` models mean."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.distributions import Bernoulli

from maskhooks.model.outputs import Outputs
from maskhooks.model.task import Task


class PyramidTask(Task):
    """A yes or a no: ten times the mean of a pyramid's top storey is the log-odds of yes."""

    name = "pyramid"

    def types(self) -> tuple[type[nn.Module], ...]:
        library = sys.modules.get("maskhooks_example.pyramid")
        return (library.Pyramid,) if library else ()

    def distribution(self, result: Any, batch: Any) -> Outputs:
        if self._output is not None:  # what the user says of outputs comes first
            return super().distribution(result, batch)
        return Bernoulli(logits=10 * result.mean(-1))
