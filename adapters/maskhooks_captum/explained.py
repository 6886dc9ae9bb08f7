"""What is explained: one number per example, such as the logit of the predicted class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent

from maskhooks.errors import BatchError, SettingError
from maskhooks.model.outputs import Outputs, Positions, compared
from maskhooks.passes.clean import Clean
from maskhooks.settings.types import Natural
from maskhooks.sites import nested

Output = Literal["logit", "log-prob", "prob"]


class _Targets:
    """Checks the setting `target`."""

    words = "a whole number from 0, a list or tensor of one for each example"

    def accepts(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.dim() == 1 and not value.is_floating_point() and value.dtype != torch.bool
        numbers = [value] if type(value) is int else value
        return isinstance(numbers, (list, tuple)) and all(type(one) is int and one >= 0 for one in numbers)


TARGETS = _Targets()
#: Which class is explained.
Target = Annotated[Natural | Sequence[int] | Tensor, TARGETS] | None


class Explained:
    """A number per example of a batch, as a function of the model's outputs for some of its examples.

    Args:
        clean: the batch and its clean pass.
        target: the class, or a class for each example; None for the class that the model predicts for each.
        output: what of that class; None for the logit if the model returns it, else the log-probability.

    Raises:
        SettingError: the outputs have no such class, or no such number.
        BatchError: there are targets for another number of examples.
    """

    def __init__(self, clean: Clean, target: int | Sequence[int] | Tensor | None, output: Output | None) -> None:
        self._hooked, self._output, self._outputs = clean.hooked, output, clean.outputs
        self._raw = _raw_paths(clean.outputs, clean.result)
        if output == "logit" and None in self._raw:
            raise SettingError(
                "output='logit': torch.distributions keeps normalised logits, and the model's result holds no tensor "
                "of others. Use output='log-prob', which differs by one number per example, or output='prob'"
            )
        self._targets = None if target is None else _targets(clean.outputs, target)

    def __call__(self, result: Any, batch: Any, rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return the number for each row.

        Args:
            result: what the model returned.
            batch: its input.
            rows: which example of the clean batch each row is a copy of.
        """
        outputs = self._hooked.distribution(result, batch)
        if self._output in (None, "logit"):
            outputs = _with_logits(outputs, result, iter(self._raw))
        if self._targets is None:
            return compared(_picked(self._outputs, rows), outputs, lambda before, after: self._of(after, before))
        assert isinstance(outputs, Distribution)
        return self._of_class(_base(outputs), self._targets[rows.to(self._targets.device)])

    def _of(self, after: Distribution, before: Distribution) -> Tensor:
        """Return the number of each predicted outcome."""
        after, before = _base(after), _base(before)
        if isinstance(after, Categorical) and isinstance(before, Categorical):
            return self._of_classes(after, before.logits.argmax(-1))
        if isinstance(after, Bernoulli) and isinstance(before, Bernoulli):
            return self._of_yes(torch.where(before.logits > 0, after.logits, -after.logits))
        return self._mean(after)

    def _of_class(self, after: Distribution, classes: Int[Tensor, " row"]) -> Tensor:
        if isinstance(after, Categorical):
            return self._of_classes(after, classes)
        if isinstance(after, Bernoulli):
            if after.logits.dim() == 1:
                return self._of_yes(torch.where(classes == 1, after.logits, -after.logits))
            return self._of_yes(after.logits.gather(-1, classes[:, None]).squeeze(-1))
        return self._mean(after).gather(-1, classes[:, None]).squeeze(-1)

    def _of_classes(self, after: Categorical, classes: Int[Tensor, "*places"]) -> Tensor:
        found = after.logits.gather(-1, classes.to(after.logits.device)[..., None]).squeeze(-1)
        return found.exp() if self._output == "prob" else found

    def _of_yes(self, logits: Float[Tensor, "*places"]) -> Tensor:
        kinds: dict[str | None, Callable[[Tensor], Tensor]] = {"log-prob": F.logsigmoid, "prob": torch.sigmoid}
        return kinds[self._output](logits) if self._output in kinds else logits

    def _mean(self, after: Distribution) -> Tensor:
        if self._output in ("log-prob", "prob"):
            raise SettingError(
                f"output={self._output!r} needs classes, but the outputs are {type(after).__name__}. Leave output out: "
                "their mean is explained"
            )
        mean: Tensor = after.mean
        return mean


def _base(distribution: Distribution) -> Distribution:
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def _leaves(outputs: Outputs) -> list[Distribution]:
    parts = list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]
    return [_base(part.distribution if isinstance(part, Positions) else part) for part in parts]


def _picked(outputs: Outputs, rows: Int[Tensor, " row"]) -> Outputs:
    """Return the outputs of the examples with these indices, repeated as listed."""
    if isinstance(outputs, Mapping):
        return {name: cast(Distribution, _picked(part, rows)) for name, part in outputs.items()}
    if isinstance(outputs, Positions):
        distribution = cast(Distribution, _picked(outputs.distribution, rows))
        return Positions(distribution, outputs.chosen[rows.to(outputs.chosen.device)])
    base = _base(outputs)
    if isinstance(base, (Categorical, Bernoulli)):
        return type(base)(logits=base.logits[rows.to(base.logits.device)])
    return outputs  # only its type counts


def _raw_paths(outputs: Outputs, result: Any) -> list[nested.Path | None]:
    """Return for each distribution of classes where the model's result holds its logits, before normalisation."""
    found: list[nested.Path | None] = []
    for leaf in _leaves(outputs):
        if isinstance(leaf, Categorical):
            same = (path for path, tensor in nested.tensors(result) if _normalises_to(tensor, leaf.logits))
            found.append(next(same, None))
    return found


def _normalises_to(tensor: Tensor, logits: Float[Tensor, "*places cls"]) -> bool:
    if tensor.shape != logits.shape or not tensor.is_floating_point():
        return False
    return torch.allclose(tensor.float().log_softmax(-1), logits.float(), rtol=1e-3, atol=1e-3)


def _with_logits(outputs: Outputs, result: Any, paths: Any) -> Outputs:
    """Put logits as the model returns them into distributions of classes, which keep them normalised."""
    for leaf in _leaves(outputs):
        if isinstance(leaf, Categorical):
            path = next(paths)
            if path is not None:
                leaf.logits = nested.get(result, path)
    return outputs


def _targets(outputs: Outputs, target: int | Sequence[int] | Tensor) -> Int[Tensor, " example"]:
    """Return the class of each example, checked."""
    if not isinstance(outputs, Distribution):
        raise SettingError(
            "a target needs one prediction per example, but the model has several heads or positions. Leave target "
            "out, or choose one of them: wrap(model, output=...)"
        )
    base = _base(outputs)
    numbers = base.logits if isinstance(base, (Categorical, Bernoulli)) else base.mean
    binary = isinstance(base, Bernoulli) and numbers.dim() == 1
    if numbers.dim() != 2 and not binary:
        raise SettingError(
            f"a target needs classes, but the outputs are {type(base).__name__} of shape {list(numbers.shape)}. Leave "
            "target out"
        )
    count, classes = len(numbers), 2 if binary else numbers.shape[-1]
    found = torch.as_tensor(target, device=numbers.device)
    found = found.expand(count) if found.dim() == 0 else found
    if len(found) != count:
        raise BatchError(f"there are targets for {len(found)} examples, but the batch has {count}. Give one for each")
    wrong = found[(found < 0) | (found >= classes)]
    if len(wrong):
        raise SettingError(f"target {int(wrong[0])} is out of range: the model has {classes} classes, from 0")
    return found
