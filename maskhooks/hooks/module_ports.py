"""Module ports: hooks on a module's output and on its input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskhooks.hooks.port import NOW, Point, Port, exported
from maskhooks.hooks.threads import check_thread
from maskhooks.sites import nested
from maskhooks.sites.signature import signature


class OutputPort(Port):
    """The hook on a module's output."""

    _whole: Point | None = None  # the only point, if it reads the whole output of the only call

    def attach(self) -> RemovableHandle:
        if not self.replaces and len(self.reads) == 1:
            (point,) = self.reads
            self._whole = point if not point.path and point.site.call is None else None
        return self.module.register_forward_hook(self)

    def path(self, value: Any, point: Point) -> nested.Path:
        return point.path

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:
        point = self._whole
        if point is None or self.calls or type(output) is not Tensor or _special(output):
            return self.pass_through(output)
        check_thread(self._pass.thread)
        self.calls = 1  # the same as pass_through, in a fifth of the time
        point.fired = NOW
        self._values[point.key] = output.clone()
        return None


class InputPort(Port):
    """The hook on a module's input: a pair of positional and keyword arguments."""

    def attach(self) -> RemovableHandle:
        return self.module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.pass_through((args, kwargs))

    def overlap(self, one: nested.Path, other: nested.Path) -> bool:
        """Whether one path contains the other; an argument's position and its name are the same."""
        names = list(signature(self.module).parameters)
        first, second = (
            (names.index(path[0]) if path[0] in names else path[0]) if path else 0 for path in (one, other)
        )
        return first == second and super().overlap(one[1:], other[1:])

    def path(self, value: Any, point: Point) -> nested.Path:
        """Return where an argument, given by position or name, was passed: `(0, position)` or `(1, name)`."""
        args, kwargs = value
        wanted, rest = (point.path[0], point.path[1:]) if point.path else (0, ())
        if isinstance(wanted, int) and wanted < len(args):
            return (0, wanted, *rest)
        if isinstance(wanted, str) and wanted in kwargs:
            return (1, wanted, *rest)
        names = list(signature(self.module).parameters)
        if isinstance(wanted, int) and wanted < len(names) and names[wanted] in kwargs:
            return (1, names[wanted], *rest)
        if isinstance(wanted, str) and wanted in names[: len(args)]:
            return (0, names.index(wanted), *rest)
        passed = ", ".join([f"[{index}]" for index in range(len(args))] + [f".{name}" for name in kwargs])
        raise nested.PathError(
            f"no argument {nested.format_path((wanted,))} in this call, which has {passed or 'none'}"
        )


def _special(tensor: Tensor) -> bool:
    """Whether a plain copy is not enough."""
    return tensor.requires_grad or tensor.is_nested or tensor.is_meta or exported()
