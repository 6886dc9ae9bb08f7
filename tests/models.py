"""Tiny models with the habits that make hooking hard. Each has `example()`, a batch it can be called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Broken(RuntimeError):  # noqa: N818 # reads better in the tests
    """Raised by the tiny models on demand."""


class Tiny(nn.Module):
    """Calls `body`; raises `Broken` in its last module's place while `broken` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.body(*args, **kwargs)
        if self.broken:
            raise Broken("on demand")
        return result

    def body(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def example(self) -> Any:
        return (torch.randn(3, 4),)

    def run(self) -> Any:
        batch = self.example()
        return self(**batch) if isinstance(batch, dict) else self(*batch)

    def read(self) -> list[str]:
        """Addresses that fire once."""
        raise NotImplementedError


class MLP(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.act = nn.ReLU()
        self.last = nn.Linear(5, 2)

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))

    def read(self) -> list[str]:
        return ["first:output", "act:input", "last:input.input", "last:output", ":input", ":output"]


class Stack(Tiny):
    """An embedding and an ordered stack of layers, with one ReLU, in place, that is called after each."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def body(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = self.act(layer(hidden))
        return self.head(hidden.mean(1))

    def example(self) -> Any:
        return (torch.randint(0, 10, (2, 3)),)

    def read(self) -> list[str]:
        return ["embed:output", "layers.0:output", "layers.1:input", "act@1:output", "head:output"]


@dataclass
class Result:
    logits: Tensor
    hidden: dict[str, Tensor]


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], None]:
        value = self.linear(x)
        return value, {"double": 2 * value, "triple": 3 * value}, None


class Nested(Tiny):
    """Outputs in a tuple, a dictionary and a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = Parts()
        self.head = nn.Linear(4, 2)

    def body(self, x: Tensor) -> Result:
        value, more, _ = self.parts(x)
        return Result(self.head(value + more["double"]), more)

    def read(self) -> list[str]:
        return ["parts:output[0]", "parts:output[1].double", "parts:output[1].triple", ":output.logits"]


class Cell(Tiny):
    """A recurrent cell called once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)
        self.head = nn.Linear(4, 2)

    def body(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 4)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)

    def example(self) -> Any:
        return (torch.randn(2, 3, 4),)

    def read(self) -> list[str]:
        return ["cell@0:output", "cell@2:output", "cell@1:input.hx", "cell@1:input[0]", "head:output"]


class KeywordOnly(Tiny):
    """Calls its block with keyword arguments only, as Llama calls its attention."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, *, states: Tensor, scale: float = 1.0) -> Tensor:
            return scale * self.linear(states)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()
        self.head = nn.Linear(4, 2)

    def body(self, *, states: Tensor) -> Tensor:
        return self.head(self.block(states=states, scale=0.5))

    def example(self) -> Any:
        return {"states": torch.randn(2, 4)}

    def read(self) -> list[str]:
        return ["block:input.states", "block:input", "block:output", ":input.states"]


class Noisy(Tiny):
    """Batch statistics and dropout: differs between training and eval mode, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x))))

    def read(self) -> list[str]:
        return ["first:output", "norm:output", "drop:output", "last:output"]


ALL = [MLP, Stack, Nested, Cell, KeywordOnly, Noisy]
