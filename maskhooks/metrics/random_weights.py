"""Random weights: a model with random numbers in place of trained weights, within a `with`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maskhooks.errors import ModelError
from maskhooks.model.hooked import Hooked
from maskhooks.passes.clean import clean_pass
from maskhooks.seeds import generator, preserved_rng

_WEIGHTS = 430  # the purpose of random numbers


class RandomWeights:
    """The weights of a model by layer, to be made random and brought back.

    A weight becomes normal noise of mean 0 and of the root mean square that it had, so that values keep their scale
    whatever initialiser the model was made with. Buffers, such as the statistics of a batch normalisation, stay.

    Args:
        hooked: the wrapped model.
        batch: a batch on the model's device, which shows in which order layers run.
        seed: the random seed.

    Attributes:
        layers: the weights of each module that has some, the module that ran last first. A weight that several
            modules share is among those of the first of them.

    Raises:
        ModelError: the model has no floating-point weight.
    """

    def __init__(self, hooked: Hooked, batch: Any, seed: int = 0) -> None:
        self._model, self._seed = hooked.model, seed
        seen: set[int] = set()
        self.layers: list[list[nn.Parameter]] = []
        for module in _last_first(hooked, batch):
            own = [weight for weight in module._parameters.values() if weight is not None and id(weight) not in seen]
            own = [weight for weight in own if weight.is_floating_point()]
            seen.update(map(id, own))
            self.layers += [own] if own else []
        if not self.layers:
            raise ModelError(
                f"{type(self._model).__name__} has no floating-point weight to make random, so this cannot be tested"
            )

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Bring back all weights, buffers and the global random state on exit, bit for bit."""
        registers: list[dict[str, Any]] = []
        for module in self._model.modules():
            registers += [module._parameters, module._buffers]
        before = [dict(register) for register in registers]
        tensors = {id(one): one for held in before for one in held.values() if one is not None}
        copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        try:
            with preserved_rng(self._model):
                yield
        finally:
            with torch.no_grad():
                for key, tensor in tensors.items():
                    tensor.copy_(copies[key])
            for register, held in zip(registers, before, strict=True):
                register.clear()
                register.update(held)

    @torch.no_grad()
    def randomise(self, number: int, draw: int = 0) -> None:
        """Make the weights of a layer random, within `kept`.

        Args:
            number: which of `layers`.
            draw: which of several independent draws.
        """
        numbers = generator(self._seed, _WEIGHTS, draw, number)
        for weight in self.layers[number]:
            weight.copy_(_noise(weight, numbers))


def _noise(weight: Tensor, numbers: torch.Generator) -> Tensor:
    scale = weight.detach().double().square().mean().sqrt() if weight.numel() else 0.0
    return torch.randn(weight.shape, generator=numbers, dtype=torch.float64).to(weight.device) * scale


def _last_first(hooked: Hooked, batch: Any) -> list[nn.Module]:
    """Return all modules, those that end last first; one that does not run by itself goes with what it is in."""
    ended: dict[int, int] = {}
    names = dict(hooked.model.named_modules())

    def note(module: nn.Module, *_: Any) -> None:
        ended[id(module)] = len(order)
        order.append(id(module))

    order: list[int] = []
    with contextlib.ExitStack() as hooks:
        for module in names.values():
            hooks.callback(module.register_forward_hook(note).remove)
        clean_pass(hooked, batch, ())

    def when(name: str) -> int:
        while name and id(names[name]) not in ended:
            name = name.rpartition(".")[0]
        return ended.get(id(names[name]), -1)

    return [names[name] for name in sorted(names, key=when, reverse=True)]
