"""Captum and maskhooks, both ways round: each of Captum's methods at our sites, and each of our explainers in Captum.

`table` has a row for each method, model and site: the largest difference from a reference, whether it passed, or why
the method does not apply. References of Captum's methods are Captum's own: its layer method where there is one, and its
input method on the part of the model after the site, which is written out here and has no hook. Both get the same
random numbers. A difference may be 1e-5 of the largest attribution. Our explainers in Captum may differ by 1e-6 from
`explain`. `overhead` is the time of our integrated gradients over Captum's layer method, medians of interleaved runs in
one process. `their_tests` runs the cases of `captum.testing` with one input and one layer at our sites.

The BERT is `$MASKHOOKS_DATA/models/minilm-sst5` (default ../shared); without it a random one is taken, and said so.

    python benchmarks/captum_partner.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import captum
import numpy as np
import torch
import transformers
from captum import attr
from captum.testing.attr.helpers.test_config import config as captum_cases
from maskhooks_captum import LayerMaskAttribution, MaskAttribution
from maskhooks_captum.explainer import _STREAM
from maskhooks_captum.plugin import maskhooks_explainers
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, global_add_pool

import maskhooks
from maskhooks.errors import MaskhooksError, MaskhooksWarning
from maskhooks.seeds import seeded

Compute = Callable[[], Tensor]

CLOSE, SAME = 1e-5, 1e-6
SETTINGS: dict[str, dict[str, Any]] = {
    "integrated-gradients": {"n_steps": 10},
    "input-x-gradient": {},
    "deep-lift": {},
    "feature-ablation": {},
    "occlusion": {"window": 2},
    "shapley-sampling": {"n_samples": 2},
    "kernel-shap": {"n_samples": 20},
    "lime": {"n_samples": 20, "alpha": 1e-4},
}
THEIRS = {
    "integrated-gradients": "IntegratedGradients",
    "input-x-gradient": "InputXGradient",
    "deep-lift": "DeepLift",
    "feature-ablation": "FeatureAblation",
    "occlusion": "Occlusion",
    "shapley-sampling": "ShapleyValueSampling",
    "kernel-shap": "KernelShap",
    "lime": "Lime",
}
LAYER = {
    "integrated-gradients": attr.LayerIntegratedGradients,
    "input-x-gradient": attr.LayerGradientXActivation,
    "deep-lift": attr.LayerDeepLift,
    "feature-ablation": attr.LayerFeatureAblation,
}
MASKED = ["integrated-gradients", "input-x-gradient", "deep-lift"]
RECIPE = dataclasses.replace(maskhooks.Recipe(), steps=4, baseline_steps=2, warmup_steps=2, validations=2)
FREE = {"margin": 0.1, "recipe": RECIPE}
OURS: list[tuple[str, type[Any], dict[str, Any]]] = [
    ("leave-one-out", maskhooks.LeaveOneOut, {}),
    ("erasure", maskhooks.Erasure, {"margin": 0.001, "max_sets": 200}),
    ("beam", maskhooks.Beam, {"margin": 0.001, "width": 2}),
    ("random", maskhooks.Random, {"seed": 3}),
    ("diffmask", maskhooks.DiffMask, {"amortized": False, **FREE}),
    ("graphmask", maskhooks.GraphMask, {"amortized": False, **FREE}),
    ("reinforce", maskhooks.Reinforce, FREE),
    ("guan", maskhooks.Guan, {"recipe": {"name": "guan", "steps": 4}}),
]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def seed_as_ours() -> None:
    """Put the global generators where an explainer of seed 0 puts them at its first site."""
    seed = seeded(0, _STREAM, 0)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


@dataclasses.dataclass
class Place:
    """A site of a model, and what Captum needs to be asked about it without maskhooks.

    Attributes:
        model: the model's name.
        site: the site's address.
        batch: a batch for `hooked`.
        tail: the model from the site on, from the value and the rows to logits; of a whole value, their sum.
        inputs, extra: the first and the other arguments of `forward`.
        forward, layer: what Captum's layer methods take; None where they do not apply.
    """

    model: str
    hooked: maskhooks.Hooked
    site: str
    batch: Any
    tail: Callable[[Tensor, Tensor], Tensor]
    inputs: Any = None
    extra: tuple[Any, ...] = ()
    forward: Callable[..., Tensor] | None = None
    layer: nn.Module | None = None

    @property
    def value(self) -> Tensor:
        with torch.no_grad(), self.hooked.tap(read=self.site) as tap:
            self.hooked(self.batch)
        return tap.values[self.site]

    @property
    def targets(self) -> Tensor:
        with torch.no_grad():
            found = self.hooked(self.batch)
        logits: Tensor = getattr(found, "logits", found)
        return logits.argmax(-1)


class Tail(nn.Module):
    """The model from a site on, as a module whose layers DeepLift finds."""

    def __init__(self, place: Place, whole: bool) -> None:
        super().__init__()
        layers = getattr(place.tail, "layers", None)
        self.layers = copy.deepcopy(layers) if layers is not None else None
        self.place, self.whole, self.targets = place, whole, place.targets

    def forward(self, value: Tensor, rows: Tensor) -> Tensor:
        if self.whole:
            targets = self.targets
            every = torch.arange(len(targets))
            found = [self.place.tail(one, every)[every, targets].sum() for one in value]
            return torch.stack(found)
        logits = self.layers(value) if self.layers is not None else self.place.tail(value, rows)
        return logits.gather(1, self.targets[rows][:, None])[:, 0]


def mlp() -> Iterator[Place]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 6)
    feature = "batch feature -> batch feature"
    sites = {"0:output": feature, "2:output": feature}
    hooked = maskhooks.wrap(net, sites=sites, output=lambda logits: Categorical(logits=logits))
    for site, begin in (("0:output", 1), ("2:output", 3)):
        yield Place("mlp", hooked, site, x, Run(net[begin:]), x, (), net, net[begin - 1])


def cnn() -> Iterator[Place]:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 9, 3),
    ).eval()  # fmt: skip
    x = torch.randn(2, 1, 6, 6)
    pixel = "batch channel height width -> batch height width"
    hooked = maskhooks.wrap(
        net, sites={"0:output": pixel, "3:output": pixel}, output=lambda logits: Categorical(logits=logits)
    )
    for site, begin in (("0:output", 1), ("3:output", 4)):
        yield Place("cnn", hooked, site, x, Run(net[begin:]), x, (), net, net[begin - 1])


class Run:
    """Layers as a tail."""

    def __init__(self, layers: nn.Module) -> None:
        self.layers = layers

    def __call__(self, value: Tensor, rows: Tensor) -> Tensor:
        found: Tensor = self.layers(value)
        return found


def bert(folder: Path) -> Iterator[Place]:
    if folder.is_dir():
        name, tokenizer = "minilm-sst5", transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        texts = ["a charming film", "not a good movie at all", "dull"]
        batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        batch.pop("token_type_ids", None)
    else:
        say(f"{folder} is missing: a random BERT is taken")
        name = "random-bert"
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=99, **sizes)).eval()
        mask = (torch.arange(7) < torch.tensor([[5], [7], [3]])).long()
        batch = {"input_ids": torch.randint(5, 99, (3, 7)), "attention_mask": mask}
    hooked = maskhooks.wrap(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits

    count = len(model.bert.encoder.layer)
    for number in (0, count // 2):
        site, layer = f"bert.encoder.layer.{number}:output", model.bert.encoder.layer[number]
        yield Place(name, hooked, site, batch, partial(onward, model, mask, number + 1), ids, (mask,), forward, layer)


def onward(model: Any, mask: Tensor, begin: int, value: Tensor, rows: Tensor) -> Tensor:
    """A BERT from one of its layers on."""
    closed = (1 - mask[rows])[:, None, None].to(value.dtype) * torch.finfo(value.dtype).min
    closed = closed.expand(-1, -1, value.shape[1], -1)
    hidden = value
    for layer in model.bert.encoder.layer[begin:]:
        found = layer(hidden, closed)
        hidden = found if isinstance(found, Tensor) else found[0]
    logits: Tensor = model.classifier(model.bert.pooler(hidden))
    return logits


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = GCNConv(3, 8), GCNConv(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.onward(self.first(x, edge_index), edge_index, batch)

    def onward(self, hidden: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        hidden = self.second(hidden.relu(), edge_index).relu()
        found: Tensor = self.last(global_add_pool(hidden, batch))
        return found


def gcn() -> Iterator[Place]:
    torch.manual_seed(3)
    model = GCN().eval()
    edges = [torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), torch.tensor([[0, 1, 2], [1, 2, 0]])]
    data = Batch.from_data_list([Data(x=torch.randn(one.shape[1], 3), edge_index=one) for one in edges])
    hooked = maskhooks.wrap(model, example=data)
    with torch.no_grad(), hooked.tap(read=["first.edges:output"]) as tap:
        hooked(data)
    targets = tap.values["first.edges:output"][:, 1].long()  # the node that receives each message

    def of_messages(messages: Tensor, rows: Tensor) -> Tensor:
        hidden = messages.new_zeros(len(data.x), 8).index_add(0, targets, messages) + model.first.bias
        return model.onward(hidden, data.edge_index, data.batch)

    def of_nodes(nodes: Tensor, rows: Tensor) -> Tensor:
        return model.onward(nodes, data.edge_index, data.batch)

    yield Place("gcn", hooked, "first.message:output", data, of_messages)
    yield Place("gcn", hooked, "first:output", data, of_nodes)


def ours_at(place: Place, name: str, **settings: Any) -> Tensor:
    """The scores of one of Captum's methods at a site, by maskhooks."""
    explainer = maskhooks_explainers()[name](place.hooked, sites=place.site, **{**SETTINGS[name], **settings})
    (site,) = place.hooked.required_sites(place.site)
    rows = explainer.explain(place.batch)["score"]
    return torch.as_tensor(rows).reshape(site.gating().mask_shape(place.value))


def reference(place: Place, name: str) -> Tensor:
    """The same by Captum alone, on the part of the model after the site."""
    (site,) = place.hooked.required_sites(place.site)
    pattern, value = site.gating(), place.value
    whole = place.model == "gcn"
    text = isinstance(place.batch, dict)
    valid = place.batch["attention_mask"].bool() if text else torch.ones(pattern.mask_shape(value)).bool()
    baseline = value * ~pattern.spread(valid, value)  # padding keeps its value
    units = torch.arange(math.prod(valid.shape[1:])).view(1, *valid.shape[1:]).expand(valid.shape)
    units = torch.arange(len(valid)) if whole else torch.where(valid, units, 0)
    units = pattern.spread(units, value)
    if whole:
        value, baseline, units = value[None], baseline[None], units[None]
    rows = torch.arange(len(value))
    tail = Tail(place, whole).eval()
    seed_as_ours()
    if name == "lime":
        from captum._utils.models.linear_model import SkLearnLasso

        method = attr.Lime(tail, interpretable_model=SkLearnLasso(alpha=SETTINGS[name]["alpha"]))
    else:
        method = getattr(attr, THEIRS[name])(tail)
    given = {key: setting for key, setting in SETTINGS[name].items() if key in ("n_steps", "n_samples")}
    given |= {} if name == "input-x-gradient" else {"baselines": baseline}
    if name in ("feature-ablation", "shapley-sampling"):
        given["feature_mask"] = units
    if name == "occlusion":
        gated = [axis in pattern.gated for (axis,) in pattern.axes][0 if whole else 1 :]
        sizes = list(zip(value.shape[1:], gated, strict=True))
        given["sliding_window_shapes"] = tuple(min(2, size) if one else size for size, one in sizes)
        given["strides"] = tuple(1 if one else size for size, one in sizes)
    if name in ("kernel-shap", "lime"):
        found = torch.cat(
            [
                method.attribute(
                    value[row : row + 1],
                    baselines=baseline[row : row + 1],
                    feature_mask=units[row : row + 1],
                    additional_forward_args=(rows[row : row + 1],),
                    n_samples=given["n_samples"],
                )
                for row in rows.tolist()
            ]
        )
    else:
        found = method.attribute(value, additional_forward_args=(rows,), **given)
    found = found.detach()[0] if whole else found.detach()
    features = tuple(index for index, (axis,) in enumerate(pattern.axes) if axis not in pattern.gated)
    if features:
        found = found.sum(features) if name in MASKED else found.amax(features)
    return torch.where(valid, found, 0).float()


def of_layer(place: Place, name: str) -> Tensor:
    """The same by Captum's layer method."""
    (site,) = place.hooked.required_sites(place.site)
    pattern = site.gating()
    method = LAYER[name](place.forward, place.layer)
    given: dict[str, Any] = {"target": place.targets.tolist(), "additional_forward_args": place.extra or None}
    if name in ("integrated-gradients", "deep-lift"):
        given["baselines"] = torch.zeros_like(place.inputs)
    if name == "integrated-gradients":
        given["n_steps"] = SETTINGS[name]["n_steps"]
    value = place.value
    if name == "feature-ablation":
        shape = pattern.mask_shape(value)
        units = torch.arange(math.prod(shape[1:])).view(1, *shape[1:]).expand(shape)
        given["layer_mask"] = pattern.spread(units, value)
    found = method.attribute(place.inputs, **given).detach()
    features = tuple(index for index, (axis,) in enumerate(pattern.axes) if axis not in pattern.gated)
    if features:
        found = found.sum(features) if name in MASKED else found.amax(features)
    if isinstance(place.batch, dict):
        found = torch.where(place.batch["attention_mask"].bool(), found, 0)
    return found.float()


def value_at_zero(place: Place) -> Tensor:
    """The site's value where the model's inputs are zero: the baseline of Captum's layer methods."""
    if isinstance(place.batch, dict):
        batch: Any = {**place.batch, "input_ids": torch.zeros_like(place.inputs)}
    else:
        batch = torch.zeros_like(place.inputs)
    return dataclasses.replace(place, batch=batch).value


def row(method: str, place: Place, against: str, limit: float, one: Compute, other: Compute) -> dict[str, Any]:
    """One row of the table.

    Args:
        one, other: give what is compared.
    """
    found: dict[str, Any] = {"method": method, "model": place.model, "site": place.site, "against": against}
    try:
        ours, theirs = one(), other()
    except MaskhooksError as error:
        say(f"{method} {place.model} {place.site}: {error}")
        return {**found, "difference": None, "passed": None, "reason": str(error).partition(". ")[0]}
    largest = float(theirs.abs().max())
    found["largest"] = largest
    difference = float((ours - theirs).abs().max()) / max(1.0, largest) if ours.shape == theirs.shape else math.inf
    say(f"{method} {place.model} {place.site} against {against}: {difference:.1e} of {largest:.1e}")
    passed = difference <= limit and (largest > 0 or limit == SAME)  # nothing needs to be found in a set
    return {**found, "difference": difference, "passed": passed, "reason": None}


def captums(places: list[Place]) -> Iterator[dict[str, Any]]:
    """Captum's methods at our sites."""
    for place in places:
        for name in SETTINGS:
            after = partial(reference, place, name)
            yield row(name, place, "Captum after the site", CLOSE, partial(ours_at, place, name), after)
            if place.layer is not None and name in LAYER:
                based = {"baseline": value_at_zero(place)} if name in ("integrated-gradients", "deep-lift") else {}
                ours, theirs = partial(ours_at, place, name, **based), partial(of_layer, place, name)
                yield row(name, place, "Captum's layer method", CLOSE, ours, theirs)


def as_explained(place: Place, explainer: Any) -> Tensor:
    """The scores of an explainer at a place."""
    (site,) = place.hooked.required_sites(place.site)
    return torch.as_tensor(explainer.explain(place.batch)["score"]).reshape(site.gating().mask_shape(place.value))


def as_attributed(place: Place, explainer: Any, spec: dict[str, Any]) -> Tensor:
    """The same by a class of Captum: of the layer, or of an address by the explainer itself."""
    (site,) = place.hooked.required_sites(place.site)
    batch, pattern = place.batch, site.gating()
    if place.layer is None:
        attribution = LayerMaskAttribution(place.hooked.model, place.site, explainer, batch=lambda *parts: batch)
        found = attribution.attribute(batch.x, additional_forward_args=(batch.edge_index, batch.batch))
    else:
        more = {"valid": lambda batch: batch[1].bool()} if isinstance(batch, dict) else {}
        attribution = LayerMaskAttribution(
            place.forward, place.layer, spec, model=place.hooked.model, pattern=pattern, **more
        )
        found = attribution.attribute(place.inputs, additional_forward_args=place.extra or None)
    features = tuple(index for index, (axis,) in enumerate(pattern.axes) if axis not in pattern.gated)
    return found.sum(features) if features else found


def in_captum(places: list[Place]) -> Iterator[dict[str, Any]]:
    """Our explainers as attributions of Captum."""
    for place in places:
        for name, kind, settings in OURS:
            explainer = kind(place.hooked, sites=place.site, **settings)
            theirs = partial(as_attributed, place, explainer, {"name": name, **settings})
            yield row(name, place, "explain", SAME, theirs, partial(as_explained, place, explainer))


def of_inputs(place: Place) -> Iterator[dict[str, Any]]:
    """Our explainers at a model's input, and fitted ones."""
    x, model = place.batch, place.hooked.model
    sites = {":input": "batch feature -> batch feature"}
    hooked = maskhooks.wrap(model, sites=sites, output=lambda logits: Categorical(logits=logits))
    at = dataclasses.replace(place, hooked=hooked, site=":input")
    for name, kind, settings in OURS:
        theirs = partial(MaskAttribution(model, {"name": name, **settings}).attribute, x)
        explainer = kind(hooked, sites=":input", **settings)
        yield row(name, at, "explain", SAME, theirs, partial(as_explained, at, explainer))
    masks = maskhooks.DiffMask(hooked, sites=":input", **FREE)
    for name, fitted in (("diffmask, fitted", masks), ("iba, fitted", maskhooks.IBA(hooked, sites=":input"))):
        fitted.fit([x], [x], progress=False, accelerator="cpu")
        theirs = partial(MaskAttribution(model, fitted).attribute, x)
        yield row(name, at, "explain", SAME, theirs, partial(as_explained, at, fitted))


def overhead(place: Place, rounds: int, n_steps: int = 20) -> dict[str, Any]:
    """The time of our integrated gradients over Captum's, at one site, for the same number of steps."""
    targets, base = place.targets.tolist(), torch.zeros_like(place.inputs)
    at_base = value_at_zero(place)
    theirs = attr.LayerIntegratedGradients(place.forward, place.layer)
    ours = maskhooks_explainers()["integrated-gradients"](
        place.hooked, sites=place.site, baseline=at_base, n_steps=n_steps, target=targets
    )
    calls: list[Callable[[], Any]] = [
        lambda: ours.explain(place.batch),
        lambda: theirs.attribute(
            place.inputs, base, target=targets, additional_forward_args=place.extra, n_steps=n_steps
        ),
    ]
    spent: list[list[float]] = [[], []]
    for number in range(rounds + 1):  # the first one warms up
        for call, times in zip(calls, spent, strict=True):
            begun = time.process_time()
            call()
            if number:
                times.append(time.process_time() - begun)
    one, other = (statistics.median(times) for times in spent)
    say(f"overhead: {one:.3f} s over {other:.3f} s")
    return {"overhead": one / other, "seconds": [one, other], "rounds": rounds}


def their_tests() -> dict[str, Any]:
    """The cases of Captum's own tests with one input, at our sites: inputs, and single layers."""
    kinds = {**{getattr(attr, theirs): name for name, theirs in THEIRS.items()}, **{v: k for k, v in LAYER.items()}}
    run, left_out = 0, 0
    failed: list[str] = []
    refused: dict[str, str] = {}
    for case in captum_cases:
        for algorithm in case["algorithms"]:
            if algorithm not in kinds:
                continue
            which = f"{case['name']} {algorithm.__name__}"
            try:
                outcome = their_case(case, algorithm, kinds[algorithm])
            except MaskhooksError as error:
                refused[which] = str(error).partition(". ")[0]
                continue
            if outcome is None:
                left_out += 1
                continue
            run += 1
            if not outcome:
                failed.append(which)
    say(f"their tests: {run - len(failed)} of {run} passed, {left_out} left out; failed: {failed}; refused: {refused}")
    return {"run": run, "passed": run - len(failed), "left_out": left_out, "failed": failed, "refused": refused}


def their_case(case: dict[str, Any], algorithm: Any, name: str) -> bool | None:
    """Whether ours equals Captum's; None for several inputs or layers, noise, or outputs of several axes."""
    args, layer = dict(case["attribute_args"]), case.get("layer")
    inputs, target = args.pop("inputs"), args.pop("target", None)
    baselines, extra = args.pop("baselines", None), args.pop("additional_forward_args", None)
    layered = algorithm in LAYER.values()
    if (
        not isinstance(inputs, Tensor)
        or case.get("noise_tunnel")
        or case.get("baseline_distr")
        or (layered and not isinstance(layer, str))
        or not inputs.is_floating_point()
        or isinstance(target, tuple)
        or (isinstance(target, list) and isinstance(target[0], tuple))
        or set(args) & {"feature_mask", "layer_mask", "layer_baselines", "sliding_window_shapes", "stdevs"}
    ):
        return None
    model = copy.deepcopy(case["model"]).eval()
    extras = extra if isinstance(extra, tuple) else () if extra is None else (extra,)
    port = "input" if args.pop("attribute_to_layer_input", False) else "output"
    site = f"{layer}:{port}" if layered else ":input"
    batch = (inputs, *extras)
    with torch.no_grad():
        out = model(*batch)
        hooked = maskhooks.wrap(model, sites=[site])
        with hooked.tap(read=site) as tap:
            hooked(batch)
        value = tap.values[site]
    if out.dim() > 2 or not value.is_floating_point():
        return None
    axes = " ".join(f"axis{index}" for index in range(1, value.dim()))
    numbers = target is None
    hooked = maskhooks.wrap(
        model,
        sites={site: f"batch {axes} -> batch {axes}"},
        output=lambda out: Normal(out.flatten(), 1.0) if numbers else Categorical(logits=out),
    )
    given = {key: args[key] for key in ("n_steps", "method", "internal_batch_size", "n_samples") if key in args}
    given |= {"perturbations_per_eval": args["perturbations_per_eval"]} if "perturbations_per_eval" in args else {}
    given |= {"n_samples": 25} if name == "lime" and "n_samples" not in given else {}  # Captum's default
    own = dict(given)
    if name == "occlusion":
        return None
    if name != "input-x-gradient":
        base = torch.as_tensor(0.0 if baselines is None else baselines, dtype=inputs.dtype).expand_as(inputs)
        if layered and name != "feature-ablation":
            with torch.no_grad(), hooked.tap(read=site) as tap:
                hooked((base, *extras))
            own["baseline"] = tap.values[site]
        elif not layered:
            own["baseline"] = base.clone()
    chosen = target.tolist() if isinstance(target, Tensor) else target
    chosen = chosen[0] if isinstance(chosen, list) and len(chosen) == 1 else chosen
    module = model.get_submodule(layer) if layered else None
    settings = {**given, "target": target, "additional_forward_args": extra}
    settings |= (
        {} if name == "input-x-gradient" or (layered and name == "feature-ablation") else {"baselines": baselines}
    )
    settings |= {"attribute_to_layer_input": True} if port == "input" else {}
    seed_as_ours()
    method = algorithm(model, module) if layered else algorithm(model)
    if name in ("kernel-shap", "lime"):
        if extras or not isinstance(chosen, (int, type(None))):
            return None
        pairs = zip(inputs.split(1), base.split(1), strict=True)
        found = torch.cat([method.attribute(one, baselines=other, target=target, **given) for one, other in pairs])
    else:
        found = method.attribute(inputs, **settings)
    found = found[0] if isinstance(found, tuple) else found
    explainer = maskhooks_explainers()[name](hooked, sites=site, target=chosen, **own)
    rows = torch.as_tensor(explainer.explain(batch)["score"]).reshape(value.shape)
    return bool(torch.allclose(rows, found.detach().float(), rtol=1e-4, atol=1e-5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one site of each model, under a minute")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    warnings.simplefilter("ignore", MaskhooksWarning)
    transformers.logging.set_verbosity_error()
    folder = Path(os.environ.get("MASKHOOKS_DATA", "../shared")) / "models" / "minilm-sst5"
    models = [list(mlp()), list(cnn()), list(bert(folder)), list(gcn())]
    places = [place for found in models for place in (found[:1] if given.quick else found)]
    table = [
        *captums(places),
        *in_captum([models[0][0], models[1][-1], models[2][-1], models[3][0]]),
        *of_inputs(models[0][0]),
    ]
    checked = [one for one in table if one["passed"] is not None]
    result = {
        "benchmark": "captum_partner",
        "quick": given.quick,
        "checks": len(checked),
        "passed": sum(one["passed"] for one in checked),
        **overhead(models[2][-1], 5 if given.quick else 21),
        "their_tests": their_tests(),
        "versions": {"captum": captum.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
        "table": table,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
