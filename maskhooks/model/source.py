"""Sources: open the MODEL given on the command line, and make its batches from records."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskhooks.data.records import Record
from maskhooks.errors import ModelError, PluginError, close_matches
from maskhooks.model.hooked import Hooked
from maskhooks.model.wrapping import wrap
from maskhooks.plugins.kind import declare


@dataclass(frozen=True)
class Opened:
    """A wrapped model with its own batches, or with a way to make them from records.

    Args:
        hooked: the wrapped model.
        batch: makes a batch from records; None if the model takes no texts.
        train: training batches that came with the model.
        validation: validation batches that came with the model.
    """

    hooked: Hooked
    batch: Callable[[Sequence[Record]], Any] | None = None
    train: Iterable[Any] | None = None
    validation: Iterable[Any] | None = None


class Source(ABC):
    """A way to open models of one kind from what a user writes for MODEL.

    Attributes:
        form: what to write for MODEL, briefly, for help and messages.
    """

    form: str

    @abstractmethod
    def claims(self, model: str) -> bool:
        """Whether this source opens the given text; loads nothing."""

    @abstractmethod
    def open(self, model: str, *, max_length: int = 128) -> Opened:
        """Return the wrapped model.

        Args:
            model: what the user wrote.
            max_length: maximum tokens per text, if there are tokens; longer texts are cut.

        Raises:
            MaskhooksError: the model cannot be opened; the message says why, and gives a way out.
        """


def choose(model: str, sources: Mapping[str, Source]) -> Source:
    """Return the source that claims MODEL.

    Raises:
        PluginError: no source claims it, or several do.
    """
    claiming = {name: source for name, source in sources.items() if source.claims(model)}
    if len(claiming) == 1:
        return next(iter(claiming.values()))
    if claiming:
        raise PluginError(
            f"the sources {' and '.join(sorted(claiming))} both claim the model {model!r}. Write it so "
            f"that only one does ({_forms(claiming)}), or uninstall the other's plugin."
        )
    raise PluginError(f"no source knows how to open the model {model!r}. Give {_forms(sources)}.")


def _forms(sources: Mapping[str, Source]) -> str:
    return ", or ".join(source.form for _, source in sorted(sources.items()))


class Factory(Source):
    """Calls `package.module:factory`, a function without arguments that may be in the current folder.

    The function returns a `Hooked`, `(Hooked, training batches)` or `(Hooked, training batches, validation batches)`; a
    plain module is wrapped. A factory whose model takes texts returns an `Opened`.
    """

    form = "package.module:factory, a function that returns a network and its batches"
    _written = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*(\.[^\W\d]\w*)*)")

    def claims(self, model: str) -> bool:
        return self._written.fullmatch(model) is not None and not Path(model).exists()

    def open(self, model: str, *, max_length: int = 128) -> Opened:
        """Return the model that the factory makes.

        Raises:
            ModelError: there is no such module or function, or it returns something else.
        """
        factory = self._factory(model)
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            raise ModelError(f"{model} cannot be called without arguments: {error}. Give each one a default") from error
        except ValueError:  # it has no signature
            pass
        made = factory()
        if isinstance(made, Opened):
            return made
        network, *batches = made if isinstance(made, tuple) else (made,)
        if not isinstance(network, (nn.Module, Hooked)) or len(batches) > 2:
            raise ModelError(
                f"{model} returned {type(made).__name__} instead of a model. A factory returns a Hooked or "
                "a module, or (it, training batches), or (it, training batches, validation batches)."
            )
        for batch in batches:
            if isinstance(batch, (Mapping, Tensor, str)):
                raise ModelError(
                    f"{model} returned a {type(batch).__name__} as batches. Give a list of batches or a DataLoader: "
                    "(model, [batch])."
                )
        hooked = network if isinstance(network, Hooked) else wrap(network)
        return Opened(hooked, None, *batches)

    def _factory(self, model: str) -> Callable[[], Any]:
        name, _, attribute = model.partition(":")
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # an import inside the factory's module failed
            raise ModelError(
                f"there is no module {error.name!r} to import, for the model {model!r}. Run from the "
                "folder that holds it, or install it."
            ) from error
        for step in attribute.split("."):
            if not hasattr(found, step):
                likely = close_matches(step, [key for key in dir(found) if not key.startswith("_")])
                raise ModelError(
                    f"module {name!r} has no {attribute!r}."
                    + (f" Did you mean {', '.join(map(repr, likely))}?" if likely else " Give the name of a function.")
                )
            found = getattr(found, step)
        if not callable(found):
            raise ModelError(f"{model} is not a function. Give one that returns the model: def {attribute}(): ...")
        return found  # type: ignore[no-any-return] # callable, as checked


SOURCES = declare("source", Source, made=True)
