"""Our explainers as Captum's attributions, of inputs and of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from captum.attr import LayerAttribution, PerturbationAttribution
from captum.log import log_usage
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from maskhooks.errors import BatchError, SettingError
from maskhooks.explainers.base import EXPLAINERS, Explainer
from maskhooks.explanations.explanation import Explanation
from maskhooks.model.hooked import Hooked
from maskhooks.model.task import device_of, move
from maskhooks.plugins.registry import registry
from maskhooks.sites.modules import Modules
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site
from maskhooks_captum.forward import ForwardModule, Function, hooked_at, model_of, of_target, site_at, targets

#: An explainer: its registered name, a mapping of its name and settings, a function of the `Hooked` and its sites that
#: makes one, or an explainer of a `Hooked` of yours, such as a fitted one.
Ours = str | Mapping[str, Any] | Explainer | Callable[[Hooked, list[Site]], Explainer]


class BaseMaskAttribution:
    """The base class of attributions by explainers of ours.

    Args:
        forward_func: the forward function of Captum; it returns `(batch, class)` or `(batch,)`.
        explainer: see `Ours`. A function gets a `Hooked` of the forward function and its sites:
            `lambda hooked, sites: DiffMask(hooked, sites, amortized=False, margin=0.1)`.
        model: the model that the forward function runs, if it is not that module or a method of it.
        pattern: how the axes of each input or of the layer are named; those right of the arrow have a score.
        batch: for an explainer of a `Hooked` of yours, a function from the inputs and further arguments to a batch for
            it; by default a tuple of them.
        options: what else `maskhooks.wrap` takes, such as `output`, `valid` or `units`; functions of a batch get a
            tuple of the inputs, the baselines if given, and the further arguments.
    """

    forward_func: Function

    def __init__(
        self,
        forward_func: Function,
        explainer: Ours,
        *,
        model: nn.Module | None = None,
        pattern: str | Pattern | Sequence[str | Pattern] | None = None,
        batch: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        self.explainer, self.pattern, self.batch, self.options = explainer, pattern, batch, options
        if not isinstance(explainer, Explainer):
            self.model = model_of(forward_func, model)
            if not callable(explainer):
                registry.check(EXPLAINERS, explainer)

    def _of_theirs(
        self, inputs: tuple[Tensor, ...], baselines: Any, target: Any, extra: tuple[Any, ...]
    ) -> tuple[Explanation, Any]:
        """Explain by the explainer of a `Hooked` of the user's; return the batch too."""
        assert isinstance(self.explainer, Explainer)
        if target is not None or baselines is not None:
            raise SettingError(
                f"{'target' if baselines is None else 'baselines'} cannot be given here: the explainer was made with "
                "its own baseline, and explains what the model predicts. Leave it out, or give the explainer by name"
            )
        batch = (*inputs, *extra) if self.batch is None else self.batch(*inputs, *extra)
        with torch.enable_grad():
            return self.explainer.explain(batch), batch

    def _module(
        self, inputs: tuple[Tensor, ...], baselines: Any, target: Any, extra: tuple[Any, ...], layer: nn.Module | None
    ) -> tuple[ForwardModule, tuple[Any, ...], dict[str, Any]]:
        """Return the forward function as a model, a batch for it, and the options to wrap it with."""
        bases = _expanded(baselines, inputs)
        module = ForwardModule(self.forward_func, self.model, layer, len(inputs), bool(bases), len(extra))
        batch: tuple[Any, ...] = (*inputs, *bases, *extra)
        if target is None:
            return module, batch, self.options
        if "output" in self.options:
            raise SettingError("a target cannot be given together with output=, which says what is explained")
        chosen = targets(target, len(inputs[0]), inputs[0].device)
        read = {"output": lambda outputs, batch: of_target(_classes(outputs, batch[-1]), batch[-1])}
        return module, (*batch, chosen), {**self.options, **read}

    def _explained(self, hooked: Hooked, sites: list[Site], batch: Any, baselines: Any) -> Explanation:
        """Explain a batch of the forward function."""
        ours = self.explainer
        assert not isinstance(ours, Explainer)
        if callable(ours):
            made = ours(hooked, sites)
        else:
            settings = {"name": ours} if isinstance(ours, str) else dict(ours)
            taken = registry.part(EXPLAINERS, settings["name"])
            if baselines is not None and "baseline" in _settings(taken):
                settings.setdefault("baseline", "zero")  # inputs pass as the difference from their baselines
            made = registry.make(EXPLAINERS, settings, {"hooked": hooked}, sites=sites)
        with torch.enable_grad():
            return made.explain(batch)


class MaskAttribution(BaseMaskAttribution, PerturbationAttribution):  # type: ignore[misc] # Captum has no types
    """Attributes to inputs by an explainer of ours, as a class of Captum.

    A position's score is divided by its number of features, so that an attribution has the shape of its input and sums
    to the score; it has the sign of the score, if any. NoiseTunnel, `infidelity` and `sensitivity_max` take it.

    Args:
        forward_func, explainer, model, pattern, batch, options: as `BaseMaskAttribution` takes them; `pattern` may be a
            list, with one for each input.

    Raises:
        SettingError: it is not known which model the forward function runs.
        UnknownNameError: no explainer has this name.
    """

    def __init__(self, forward_func: Function, explainer: Ours, **settings: Any) -> None:
        PerturbationAttribution.__init__(self, forward_func)
        BaseMaskAttribution.__init__(self, forward_func, explainer, **settings)

    @log_usage()  # type: ignore[untyped-decorator] # NoiseTunnel needs what it leaves on the function
    def attribute(
        self, inputs: Any, baselines: Any = None, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        """Return attributions of the shape of the inputs: a tensor for a tensor, a tuple for a tuple.

        Args:
            inputs: a tensor or a tuple, the batch axis first; token ids too, for explainers that close whole positions.
            baselines: what a closed position has, as Captum takes it; None for the explainer's own baseline.
            target: the class that is explained, against all others; None for what the model predicts.
            additional_forward_args: further arguments of the forward function.

        Raises:
            SettingError, BatchError: an argument does not fit.
        """
        given, extra = _tuple(inputs), _tuple(additional_forward_args)
        if isinstance(self.explainer, Explainer):
            explanation, batch = self._of_theirs(given, baselines, target, extra)
            if len(given) > 1 or len(explanation.sites) > 1:
                raise SettingError(
                    f"the explainer scores {', '.join(explanation.sites)}: which of them are the inputs is not known. "
                    "Use LayerMaskAttribution with an address, and one input"
                )
            site = _site(self.explainer.hooked, explanation.sites[0])
            found: tuple[Tensor, ...] = (_spread(explanation, site, given[0]),)
        else:
            module, batch, options = self._module(given, baselines, target, extra, None)
            patterns = _patterns(self.pattern, len(given))
            sites = [
                site_at(f"inputs.{number}:output", value, pattern)
                for number, (value, pattern) in enumerate(zip(given, patterns, strict=True))
            ]
            explanation = self._explained(hooked_at(module, sites, options), sites, batch, baselines)
            found = tuple(_spread(explanation, site, value) for site, value in zip(sites, given, strict=True))
        return found if isinstance(inputs, tuple) else found[0]


class LayerMaskAttribution(BaseMaskAttribution, LayerAttribution, PerturbationAttribution):  # type: ignore[misc]
    """Attributes to the output or input of a layer by an explainer of ours, as a class of Captum.

    Attributions have the shape of the layer's value; else as `MaskAttribution`.

    Args:
        forward_func, explainer, model, pattern, batch, options: as `BaseMaskAttribution` takes them.
        layer: the layer; with an explainer of a `Hooked` of yours also the address of one of its sites, such as
            "first.message:output".
    """

    def __init__(self, forward_func: Function, layer: nn.Module | str, explainer: Ours, **settings: Any) -> None:
        LayerAttribution.__init__(self, forward_func, layer)
        BaseMaskAttribution.__init__(self, forward_func, explainer, **settings)

    @log_usage()  # type: ignore[untyped-decorator] # as above
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Return attributions of the shape of the layer's value.

        Args:
            inputs, target, additional_forward_args: as `MaskAttribution.attribute` takes them.
            baselines: None; the explainer has its own.
            attribute_to_layer_input: whether the value is the layer's input, not its output.

        Raises:
            SettingError, BatchError: an argument does not fit.
        """
        given, extra = _tuple(inputs), _tuple(additional_forward_args)
        port = "input" if attribute_to_layer_input else "output"
        if isinstance(self.explainer, Explainer):
            explanation, batch = self._of_theirs(given, baselines, target, extra)
            hooked = self.explainer.hooked
            site = _own(hooked, explanation.sites, self.layer, port)
            return _spread(explanation, site, _read(hooked, str(site), batch))
        if isinstance(self.layer, str):
            raise SettingError(f"layer={self.layer!r}: give the module, or an explainer of a Hooked with this site")
        if baselines is not None:
            raise SettingError(
                "baselines of inputs cannot be given for a layer: an explainer has its own, such as "
                "{'name': 'leave-one-out', 'baseline': 'zero'}"
            )
        module, batch, options = self._module(given, None, target, extra, self.layer)
        address = f"layer:{port}"
        value = _read(hooked_at(module, [Site.parse(address)], options), address, batch)
        site = site_at(address, value, *_patterns(self.pattern, 1))
        return _spread(self._explained(hooked_at(module, [site], options), [site], batch, None), site, value)


def _spread(explanation: Explanation, site: Site, like: Shaped[Tensor, "*value"]) -> Float[Tensor, "*value"]:
    """Return the scores of a site over its features, which share them.

    Raises:
        BatchError: there are scores for other positions than the value has.
    """
    shape = site.gating().mask_shape(like, site=site)
    numbers = explanation["score"][explanation["site"] == str(site)]
    if len(numbers) != math.prod(shape):
        raise BatchError(
            f"site {site} has {len(numbers)} scores, but a value of shape {list(like.shape)} has {math.prod(shape)} "
            "positions. Give one depth, and a pattern that fits"
        )
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    scores = torch.as_tensor(numbers, dtype=dtype, device=like.device).reshape(shape)
    spread = site.gating().spread(scores, like).expand(like.shape)
    return (spread * (scores.numel() / max(1, spread.numel()))).contiguous()


def _expanded(baselines: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return Captum's baselines as tensors like the inputs; none if all are zero."""
    if baselines is None:
        return ()
    given = _tuple(baselines)
    if len(given) != len(inputs):
        raise SettingError(f"there are {len(given)} baselines for {len(inputs)} inputs. Give one for each")
    found = []
    for base, value in zip(given, inputs, strict=True):
        tensor = torch.as_tensor(base, dtype=value.dtype, device=value.device)
        if tensor.dim() and (tensor.dim() != value.dim() or tensor.shape not in (value.shape, (1, *value.shape[1:]))):
            raise SettingError(
                f"a baseline has shape {list(tensor.shape)}, but its input {list(value.shape)}. Give a number, or a "
                "tensor of that shape or with a first axis of 1"
            )
        found.append(tensor.expand(value.shape))
    return () if all(isinstance(base, (int, float)) and base == 0 for base in given) else tuple(found)


def _classes(outputs: Any, target: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        raise SettingError("a target needs outputs (batch, class). Leave target out, or let the forward return classes")
    if not bool((target < outputs.shape[1]).all()) or not bool((target >= 0).all()):
        raise SettingError(f"target {target.tolist()} is out of range: there are {outputs.shape[1]} classes, from 0")
    return outputs


def _own(hooked: Hooked, addresses: Sequence[str], layer: nn.Module | str, port: str) -> Site:
    """Return the explained site that a layer is."""
    modules = Modules(hooked.model)
    every = [_site(hooked, address) for address in addresses]
    found = [
        site
        for site in every
        if str(site) == layer or (site.port == port and modules.get(site.module) is layer and layer is not None)
    ]
    if len(found) != 1:
        raise SettingError(
            f"the explainer scores {', '.join(addresses)}, and {len(found)} of them are this layer's {port}. Give the "
            "address of one as layer"
        )
    return found[0]


def _site(hooked: Hooked, address: str) -> Site:
    (found,) = hooked.find(address)
    return found


@torch.no_grad()
def _read(hooked: Hooked, address: str, batch: Any) -> Tensor:
    with hooked.tap(read=address) as tap:
        hooked(move(batch, device_of(hooked.model)))
    return tap.values[address]


def _patterns(given: Any, count: int) -> Sequence[str | Pattern | None]:
    if given is None or isinstance(given, (str, Pattern)):
        return [given] * count
    if len(given) != count:
        raise SettingError(f"there are {len(given)} patterns for {count} inputs. Give one for each")
    return list(given)


def _settings(part: Any) -> Any:
    from maskhooks.settings.schema import schema_of

    return schema_of(part)


def _tuple(given: Any) -> tuple[Any, ...]:
    if given is None:
        return ()
    return tuple(given) if isinstance(given, tuple) else (given,)
