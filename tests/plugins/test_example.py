"""The example plugin: installed from its wheel, used part by part, and each part told from ours by its numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical

import maskhooks
from maskhooks import DiffMask, Explanation, Hooked, Recipe, Site
from maskhooks.errors import ModelError, PluginError, SettingError, UnknownDistributionError, UnknownNameError
from maskhooks.explainers.base import EXPLAINERS
from maskhooks.explanations.scores import Scores
from maskhooks.masks.baselines import BASELINES
from maskhooks.masks.gates import GATES
from maskhooks.masks.probes import PROBES
from maskhooks.masks.samples import GateSamples
from maskhooks.metrics.judgement import judge
from maskhooks.model.outputs import DIVERGENCES, Positions
from maskhooks.model.source import SOURCES, Opened, choose
from maskhooks.plugins.kind import declared
from maskhooks.plugins.registry import registry
from maskhooks.training.objectives import OBJECTIVES
from maskhooks.training.optimizers import OPTIMIZERS
from maskhooks.training.penalty import PENALTIES
from maskhooks.training.recipe import RECIPES

EXAMPLE = Path(__file__).parent / "example"
OURS = {kind: set(registry.parts(kind)) for kind in (GATES, BASELINES, PROBES, OBJECTIVES, PENALTIES, DIVERGENCES)}
PARTS = {
    "adapter": ["pyramid"],
    "baseline": ["midrange"],
    "divergence": ["total-variation"],
    "explainer": ["gradient-norm", "shared-mask"],
    "gate": ["gaussian"],
    "metric": ["gini"],
    "objective": ["exponentiated"],
    "optimizer": ["sign-sgd"],
    "penalty": ["squared"],
    "probe": ["linear"],
    "recipe": ["example"],
    "source": ["pyramid"],
    "task": ["pyramid"],
}
SETTINGS = {"recipe": "example", "gate": "gaussian", "baseline": "midrange", "divergence": "total-variation"}


# Installed: a process that knows of the plugin by its entry point alone


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plugin, built to a wheel and installed into a folder of its own, without a network."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", wheels, EXAMPLE], check=True)
    (wheel,) = wheels.glob("maskhooks_example-1.2.3-*.whl")
    subprocess.run([*pip, "install", *options, "--target", target, wheel], check=True)
    return target


def run(installed: Path | str, *arguments: str | Path, code: int = 0) -> str:
    """What a new Python prints that finds what is installed in a folder."""
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{installed}:{root}:{root / 'adapters'}", "OMP_NUM_THREADS": "1", "PATH": ""}
    words = [sys.executable, "-W", "error::UserWarning", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env={**environment, "COLUMNS": "200"}, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


USE = """
import sys, torch, maskhooks
from maskhooks.plugins.registry import registry
maskhooks.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8)))
assert "maskhooks_example.pyramid" not in sys.modules  # the plugin did not load its library

from maskhooks.explainers.base import EXPLAINERS
from maskhooks.model.source import SOURCES, choose
opened = choose("pyramid://8", registry.parts(SOURCES)).open("pyramid://8")
hooked = opened.hooked
print(hooked, [str(site) for site in hooked.sites])
batch = opened.validation[0]

rows = registry.make(EXPLAINERS, "gradient-norm", {"hooked": hooked}).explain(batch)
print(rows.provenance["explainer"], len(rows), set(rows.select(depth=2)["score"]))

settings = {"recipe": {"name": "example", "steps": 8}, "gate": {"name": "gaussian", "deviation": 1.2}}
settings |= {"baseline": "midrange", "divergence": "total-variation", "margin": 0.4}
fit = {"progress": False, "accelerator": "cpu"}
for name in ("diffmask", "shared-mask"):
    mask = registry.make(EXPLAINERS, name, {"hooked": hooked}, **settings).fit(opened.train, opened.validation, **fit)
    mask.save(name)
    again = maskhooks.load(name, hooked.model)
    print(name, mask.within_margin, again.gate, again.recipe.probe, mask.explain(batch) == again.explain(batch))

report = next(report for report in registry.reports if report.name == "example")
print(report.package, repr(report.error), *[f"{offer.kind}:{offer.name}" for offer in report.offers])
"""


def test_every_part_is_used_from_python(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    offers = " ".join(f"{kind}:{name}" for kind, names in PARTS.items() for name in names)
    gate = "Gaussian(deviation=1.2)"
    assert run(installed, "-c", USE).splitlines() == [
        "Hooked(Pyramid, 3 sites, task pyramid, adapters pyramid) "
        "['storeys.0:output', 'storeys.1:output', 'storeys.2:output']",
        "gradient-norm 224 {np.float32(1.0)}",
        f"diffmask True {gate} linear True",
        f"shared-mask True {gate} linear True",
        f"maskhooks-example 1.2.3 '' {offers}",
    ]


def test_every_part_is_used_from_the_command_line(installed: Path, tmp_path: Path) -> None:
    """Fitted with a recipe, gate, baseline and divergence by name, and explained."""
    out, rows = tmp_path / "run", tmp_path / "rows"
    words = ["--recipe", "example", "--gate", "gaussian", "--baseline", "midrange", "--margin", "0.4", "--steps", "12"]
    words += ["--set", "divergence=total-variation", "--device", "cpu", "--out", str(out)]
    run(installed, "-m", "maskhooks", "fit", "pyramid://8", *words)
    saved = json.loads((out / "explainer.json").read_text())["settings"]
    assert {name: saved[name] for name in ("gate", "baseline", "divergence")} == {
        "gate": {"name": "gaussian", "deviation": 1.5},
        "baseline": "midrange",
        "divergence": "total-variation",
    }
    recipe = {name: saved["recipe"][name] for name in ("name", "probe", "penalty", "optimizer", "objective")}
    assert recipe == {
        "name": "example",
        "probe": "linear",
        "penalty": "squared",
        "optimizer": "sign-sgd",
        "objective": {"name": "exponentiated", "rate": 0.05},
    }
    run(installed, "-m", "maskhooks", "explain", out, "pyramid://8", "--device", "cpu", "--out", rows)
    assert len(maskhooks.Explanation.from_parquet(rows / "explanation.parquet")) == 4 * 32 * 7


def test_without_the_plugin_a_command_says_what_is_not_there(tmp_path: Path) -> None:
    words = ["explain", "shared-mask", "torch.nn:Identity", "--out", tmp_path / "rows"]
    found = " ".join(run(tmp_path, "-m", "maskhooks", *words, code=2).split())
    assert "'shared-mask' is neither the folder of a run nor the name of an explainer" in found


LISTS = """
from maskhooks.cli.app import app
for words in [["plugins"], *(["settings", name] for name in {names})]:
    app(words, standalone_mode=False)
    print("end of", *words)
app(["explain", "gradient-norm", "pyramid://8", "--out", {out!r}], standalone_mode=False)
"""


def test_every_part_is_listed_and_has_its_settings_listed(installed: Path, tmp_path: Path) -> None:
    names = sorted(name for kind, found in PARTS.items() if kind not in ("adapter", "task") for name in found)
    shown = run(installed, "-c", LISTS.format(names=names, out=str(tmp_path))).split("end of ")
    table = [" ".join(line.replace("│", " ").split()) for line in shown[0].splitlines()]
    for kind, found in PARTS.items():
        for name in found:
            (row,) = [line for line in table if line.startswith(f"{kind} {name} maskhooks-example 1.2.3 ")]
            assert len(row.split("1.2.3 ")[1]) > 15, row
    assert len(shown) == len(names) + 2
    assert "average over 128" in " ".join(shown[-1].split())  # what the explainer that learns nothing gave
    for name, text in zip(names, shown[1:], strict=False):
        assert f"{name}: " in text
    everything = "\n".join(shown)
    for setting in ("deviation", "momentum", "init_logit", "highest", "weight", "together", "warmup_steps"):
        assert setting in everything


# Part by part, each against a slow reference, and against ours


@pytest.fixture
def plugin() -> Iterator[ModuleType]:
    """The example plugin, registered by hand."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        module = importlib.import_module("maskhooks_example.plugin")
    finally:
        sys.path.remove(str(EXAMPLE))
    maskhooks.register(module, name="example-by-hand")
    yield module
    maskhooks.unregister("example-by-hand")


@contextlib.contextmanager
def unregistered() -> Iterator[None]:
    """As if the plugin were not installed."""
    maskhooks.unregister("example-by-hand")
    try:
        yield
    finally:
        maskhooks.register(importlib.import_module("maskhooks_example.plugin"), name="example-by-hand")


@pytest.fixture
def opened(plugin: ModuleType) -> Opened:
    return choose("pyramid://8", registry.parts(SOURCES)).open("pyramid://8")


def test_it_offers_a_part_of_every_kind(plugin: ModuleType) -> None:
    hooks = {kind.hook: kind.names(getattr(plugin, kind.hook)()) for kind in declared.values()}
    assert {declared[hook].name: names for hook, names in hooks.items()} == PARTS


def test_the_adapter_finds_the_sites(opened: Opened) -> None:
    model = opened.hooked.model
    assert [str(site) for site in maskhooks.wrap(nn.Sequential(model)).sites] == [
        "0.storeys.0:output",
        "0.storeys.1:output",
        "0.storeys.2:output",
    ]
    with unregistered():
        assert len(maskhooks.wrap(nn.Sequential(model)).sites) == 0


def test_the_task_says_what_outputs_mean(opened: Opened) -> None:
    tops = torch.tensor([[0.2], [-0.1]])
    outputs = opened.hooked.distribution(tops, None)
    assert isinstance(outputs, Bernoulli)
    assert outputs.probs.tolist() == pytest.approx([1 / (1 + math.exp(-10 * top)) for top in (0.2, -0.1)])
    other = maskhooks.wrap(opened.hooked.model, output=lambda result: Bernoulli(probs=result.abs().flatten()))
    assert other.distribution(tops, None).probs.tolist() == pytest.approx([0.2, 0.1])  # the user comes first
    with pytest.raises(UnknownDistributionError):
        maskhooks.wrap(nn.Linear(2, 1)).distribution(tops, None)


def test_the_source_opens_a_model_with_batches(opened: Opened) -> None:
    again = choose("pyramid://8", registry.parts(SOURCES)).open("pyramid://8")
    assert isinstance(opened.train, list)
    assert isinstance(again.train, list)
    assert [batch.shape for batch in opened.train] == [(32, 8)] * 8
    assert torch.equal(opened.hooked(opened.train[0]), again.hooked(again.train[0]))
    with pytest.raises(PluginError, match="pyramid://WIDTH"):
        choose("pyramids://8", registry.parts(SOURCES))
    with pytest.raises(ModelError, match="pyramid://2 is no pyramid"):
        choose("pyramid://2", registry.parts(SOURCES)).open("pyramid://2")


@pytest.mark.parametrize("logit", [-2.0, 0.3, 1.0])
def test_the_gate(plugin: ModuleType, logit: float) -> None:
    normal = statistics.NormalDist(logit, 0.8)
    logits = torch.full((40_000,), logit)
    gate = registry.make(GATES, {"name": "gaussian", "deviation": 0.8})
    closed = normal.cdf(-1)
    assert gate.probability(logits[:1]).item() == pytest.approx(1 - closed, rel=1e-5)
    sample = gate.sample(logits, torch.Generator().manual_seed(0))
    inside = statistics.NormalDist((logit + 1) / 2, 0.4)
    assert (sample < 0.7).double().mean().item() == pytest.approx(inside.cdf(0.7), abs=0.02)
    at = torch.tensor([0.0, 0.35, 1.0])
    wanted = [math.log(closed), math.log(inside.pdf(0.35)), math.log(1 - normal.cdf(1))]
    assert gate.log_prob(at, logits[:3]).tolist() == pytest.approx(wanted, rel=1e-4)
    for name in OURS[GATES]:
        assert abs(registry.make(GATES, name).probability(logits[:1]).item() - (1 - closed)) > 1e-3, name


def test_the_baseline(plugin: ModuleType) -> None:
    values = [torch.randn(20, 3), torch.randn(30, 3)]
    wanted = [(min(column) + max(column)) / 2 for column in torch.cat(values).T.tolist()]

    def fitted(name: str) -> Tensor:
        baseline = registry.make(BASELINES, name)
        baseline.start((3,))
        for batch in values:
            baseline.fit(batch)
        return baseline().detach()

    assert fitted("midrange").tolist() == pytest.approx(wanted)
    for name in OURS[BASELINES] - {"token"}:  # that one needs a vector
        assert (fitted(name) - torch.tensor(wanted)).abs().max() > 1e-2, name


def test_the_probe(plugin: ModuleType) -> None:
    reads = [torch.randn(5, 2), torch.randn(5, 3)]
    probe = registry.make(PROBES, "linear", {"min_logit": -3.0})
    probe.start([2, 3], 2)
    nn.init.normal_(probe.linear.weight)
    weight, bias = probe.linear.weight.tolist(), probe.linear.bias.tolist()
    for position, logits in enumerate(probe(reads).tolist()):
        x = [*reads[0][position].tolist(), *reads[1][position].tolist()]
        for group in range(2):
            linear = sum(a * b for a, b in zip(weight[group], x, strict=True)) + bias[group]
            assert logits[group] == pytest.approx(1.0 + 4.0 * math.tanh(linear), rel=1e-4)
    count = sum(weight.numel() for weight in probe.parameters())
    assert count == 2 * 5 + 2
    for name in OURS[PROBES]:
        other = registry.make(PROBES, name)
        other.start([2, 3], 2)
        assert sum(weight.numel() for weight in other.parameters()) != count, name


def test_the_objective(plugin: ModuleType) -> None:
    logits, divergences = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), [0.5, 0.1, 0.02, 3.0]
    samples = GateSamples(torch.ones(2, 2), nn.functional.logsigmoid(logits), torch.ones(2, 2, dtype=torch.bool))
    kept = sum(1 / (1 + math.exp(-a)) for a in (0.0, 1.0, 2.0, -1.0)) / 4

    def losses(name: str) -> list[float]:
        objective = registry.make(OBJECTIVES, name, {"margin": 0.1})
        objective.start(torch.tensor(2.0))
        found = []
        for far in divergences:
            found.append(objective(samples, torch.full((2,), far), torch.full((2,), 2 * far)).item())
            objective.ascend(torch.full((2,), far))
        return found

    multiplier, wanted = 1.0, []
    for far in divergences:
        wanted.append(kept + multiplier * (2 * far / 0.1 - 1))
        multiplier = min(100.0, multiplier * math.exp(0.02 * (far / 0.1 - 1)))
    assert losses("exponentiated") == pytest.approx(wanted, rel=1e-5)
    for name in OURS[OBJECTIVES]:
        assert all(abs(a - b) > 1e-3 for a, b in zip(losses(name), wanted, strict=True)), name


def test_the_penalty(plugin: ModuleType) -> None:
    divergence, outputs = [0.0, 0.5, 3.0], Categorical(logits=torch.randn(3, 4))
    charged = registry.make(PENALTIES, {"name": "squared", "weight": 2.0})(outputs, outputs, torch.tensor(divergence))
    assert charged.tolist() == pytest.approx([far + 2 * far * far for far in divergence])
    for name in OURS[PENALTIES]:
        other = registry.make(PENALTIES, name)(outputs, outputs, torch.tensor(divergence))
        assert (other - charged).abs()[1:].min() > 0.1, name


def test_the_metric(plugin: ModuleType) -> None:
    site = Site.parse("storeys.0:output", "batch feature -> batch feature")
    scores = torch.tensor([[0.0, 0.0, 5.0, 0.0], [2.0, 2.0, -2.0, 2.0], [1.0, 3.0, 0.0, 0.0], [0.0] * 4])
    given = Explanation.build([Scores(site, 0, scores, torch.ones(4, 4, dtype=torch.bool))], provenance={})
    (found,) = judge(given, "gini")
    wanted = [
        sum(abs(abs(a) - abs(b)) for a in row for b in row) / (8 * sum(map(abs, row))) for row in scores[:3].tolist()
    ]
    assert found.values[:3].tolist() == pytest.approx(wanted)
    assert found.undefined == 1
    assert found.mean == pytest.approx(sum(wanted) / 3)


def test_the_optimizer(plugin: ModuleType) -> None:
    gradients = [[3.0, -0.1], [-1.0, -0.1], [-1.0, 0.3], [-1.0, 0.3]]

    def weights(name: str) -> list[float]:
        weight = nn.Parameter(torch.tensor([1.0, 1.0]))
        optimizer = registry.make(OPTIMIZERS, name, {"params": [{"params": [weight], "lr": 0.1}]})
        for gradient in gradients:
            weight.grad = torch.tensor(gradient)
            optimizer.step()
        return weight.tolist()

    wanted = []
    for column in zip(*gradients, strict=True):
        weight, mean = 1.0, 0.0
        for gradient in column:
            mean = 0.9 * mean + 0.1 * gradient
            weight -= 0.1 * math.copysign(1, mean)
        wanted.append(weight)
    assert weights("sign-sgd") == pytest.approx(wanted)
    for name in ("adam", "lookahead"):
        assert max(abs(a - b) for a, b in zip(weights(name), wanted, strict=True)) > 1e-2, name


def test_the_divergence(plugin: ModuleType) -> None:
    p, q = torch.rand(3, 4).softmax(-1), torch.rand(3, 4).softmax(-1)
    wanted = [
        sum(abs(a - b) for a, b in zip(*rows, strict=True)) / 2 for rows in zip(p.tolist(), q.tolist(), strict=True)
    ]
    function = registry.make(DIVERGENCES, "total-variation")
    found = function(Categorical(probs=p), Categorical(probs=q))
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)
    yes = function(Bernoulli(probs=p), Bernoulli(probs=q)).tolist()  # four heads, which are summed
    assert yes == pytest.approx([2 * far for far in wanted], rel=1e-4)
    chosen = torch.tensor([[True, True, False]])
    positions = function(Positions(Categorical(probs=p[None]), chosen), Positions(Categorical(probs=q[None]), chosen))
    assert positions.tolist() == pytest.approx([(wanted[0] + wanted[1]) / 2], rel=1e-4)
    with pytest.raises(UnknownDistributionError, match="needs classes"):
        function(*[torch.distributions.Normal(torch.zeros(2), 1.0)] * 2)
    for name in OURS[DIVERGENCES]:
        other = registry.make(DIVERGENCES, name)(Categorical(probs=p), Categorical(probs=q))
        assert (other - found).abs().max() > 1e-2, name


def test_the_recipe(plugin: ModuleType) -> None:
    recipe = Recipe.named("example")
    made = [recipe.make_probe(), recipe.make_objective(0.1), recipe.make_penalty()]
    made.append(recipe.make_optimizer([nn.Parameter(torch.ones(1))], []))
    assert [type(part).__name__ for part in made] == ["Linear", "ExponentiatedGradient", "Squared", "SignSGD"]
    assert made[1].rate == 0.05
    assert registry.make(RECIPES, {"name": "example", "steps": 7}) == dataclasses.replace(recipe, steps=7)


def test_the_gradients_norm(opened: Opened) -> None:
    """By differences, in float64, one unit at a time."""
    model, batch = opened.hooked.model, torch.randn(2, 8)
    rows = registry.make(EXPLAINERS, "gradient-norm", {"hooked": opened.hooked}).explain(batch).select(depth=0)
    model = model.double()

    def log_odds(pre: Tensor) -> float:
        value = pre
        for storey in model.storeys[1:]:
            value = storey(value).tanh()
        return 10 * value.mean().item()

    slopes = []
    for row in model.storeys[0](batch.double()):
        start = log_odds(row.tanh())
        chosen = max(1 / (1 + math.exp(-start)), 1 / (1 + math.exp(start)))
        found = []
        for unit in range(4):
            moved = row.clone()
            moved[unit] += 1e-6
            there = log_odds(moved.tanh())
            other = 1 / (1 + math.exp(-there if start > 0 else there))
            found.append(abs(math.log(other) - math.log(chosen)) / 1e-6)
        slopes += [slope / max(found) for slope in found]
    assert rows["score"].tolist() == pytest.approx(slopes, rel=1e-2, abs=1e-3)
    for name in ("random", "leave-one-out"):
        other = registry.make(EXPLAINERS, name, {"hooked": opened.hooked}, sites="storeys.0:output")
        others = other.explain(batch.double()).select(depth=0)
        assert np.abs(others["score"] - np.array(slopes)).max() > 0.05, name


@pytest.fixture
def narrow(plugin: ModuleType) -> Hooked:
    """A pyramid of two storeys, whose top needs the last two of four units, the others nearly not at all."""
    pyramid = importlib.import_module("maskhooks_example.pyramid").Pyramid(8, 2)
    with torch.no_grad():
        pyramid.storeys[0].weight.copy_(torch.cat([torch.eye(4), torch.zeros(4, 4)], 1))
        pyramid.storeys[1].weight.copy_(torch.tensor([0.0, 0.02, 0.7, -0.7]).expand(2, 4))
        for storey in pyramid.storeys:
            storey.bias.zero_()
    return maskhooks.wrap(pyramid)


def test_the_shared_mask_is_the_smallest_set_for_all_data(narrow: Hooked) -> None:
    """Against all 16 sets of units, each tried on all data."""
    data, margin = list(torch.randn(4, 32, 8)), 0.1
    recipe = {"name": "stable", "steps": 250, "learning_rate": 0.03}
    settings = {"sites": "storeys.0:output", "baseline": "zero", "margin": margin, "recipe": recipe}
    mask = registry.make(EXPLAINERS, "shared-mask", {"hooked": narrow}, **settings)
    mask.fit(data, data[:2], progress=False, accelerator="cpu")
    (gates,) = mask.gates().values()

    def divergence(kept: tuple[bool, ...]) -> float:
        x = torch.cat(data).double()
        first, second = narrow.model.storeys
        state = first.double()(x)
        odds = [10 * second.double()(part.tanh()).tanh().mean(-1) for part in (state, state * torch.tensor(kept))]
        p, q = (torch.sigmoid(one) for one in odds)
        return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean().detach())

    within = [kept for kept in itertools.product([False, True], repeat=4) if divergence(kept) <= margin]
    smallest = min(within, key=sum)
    assert smallest == (False, False, True, True)
    assert tuple(gate > 0.5 for gate in gates) == smallest
    narrow.model.float()
    scores = mask.explain(data[0])["score"].reshape(32, 4)
    assert np.ptp(scores, axis=0).max() == 0  # the same for every example
    assert scores[0].tolist() == pytest.approx(gates)
    each = DiffMask(narrow, "storeys.0:output", baseline="zero", margin=margin, recipe={"name": "stable", "steps": 3})
    each.fit(data, progress=False, accelerator="cpu")
    assert np.ptp(each.explain(data[0])["score"].reshape(32, 4), axis=0).max() > 0


# In a run


def fitted(opened: Opened, **settings: Any) -> DiffMask:
    given = {**SETTINGS, "margin": 0.3, "sites": "storeys.0:output", **settings}
    return DiffMask(opened.hooked, **given).fit(opened.train, progress=False, accelerator="cpu")


def test_a_run_trains_with_the_parts(opened: Opened) -> None:
    """The multiplier follows its formula from the logged divergences; weights move by the sign of their gradients."""
    recipe = {"name": "example", "steps": 6, "warmup_steps": 0, "decay_fraction": 0.0}
    mask = fitted(opened, recipe=recipe)
    multiplier = 1.0
    for row in mask.result.log:
        assert row["multiplier"] == pytest.approx(multiplier, rel=1e-4)
        multiplier *= math.exp(0.05 * (row["divergence"] / 0.3 - 1))
        assert 0 <= row["divergence"] <= 1  # total variation
    (masking,) = mask.maskings
    weights = masking.votes[0].probe.linear.weight.detach().double() / 0.02
    assert (weights - weights.round()).abs().max() < 1e-3
    assert weights.abs().max().round() == 6  # six steps of one size, from 0
    values = torch.cat([opened.hooked.model.storeys[0](batch) for batch in opened.train])
    assert masking.baseline().tolist() == pytest.approx(((values.amin(0) + values.amax(0)) / 2).tolist())
    start = 1 - statistics.NormalDist(2.0, 1.5).cdf(-1)
    assert mask.result.log[0]["expected_l0"] == pytest.approx(start, rel=1e-4)


def test_the_penalty_of_a_recipe_is_what_the_loss_charges(opened: Opened) -> None:
    one, other = (
        fitted(opened, recipe={"name": "example", "steps": 4, "warmup_steps": 0, "optimizer": "adam", "penalty": name})
        for name in ("squared", "divergence")
    )
    assert one.result.log[0] == other.result.log[0]
    assert one.result.log[-1]["divergence"] != other.result.log[-1]["divergence"]


def test_without_the_plugin_a_saved_run_says_what_is_missing(opened: Opened, tmp_path: Path) -> None:
    model = opened.hooked.model
    fitted(opened, recipe={"name": "example", "steps": 2}).save(tmp_path / "diffmask")
    fitted(opened, recipe={"name": "stable", "steps": 2}, gate="gaussian").save(tmp_path / "gate")
    shared = registry.make(EXPLAINERS, "shared-mask", {"hooked": opened.hooked}, recipe={"name": "stable", "steps": 2})
    shared.fit(opened.train, progress=False, accelerator="cpu").save(tmp_path / "shared")
    missing = {"diffmask": "optimizer is named 'sign-sgd'", "gate": "divergence is named 'total-variation'"}
    with unregistered():
        for folder, words in {**missing, "shared": "explainer is named 'shared-mask'"}.items():
            with pytest.raises(UnknownNameError, match=rf"{folder} was saved with a part .* no {words}.*install that"):
                maskhooks.load(tmp_path / folder, model, sites=["storeys.0:output"])
    assert maskhooks.load(tmp_path / "diffmask", model).recipe.optimizer == "sign-sgd"


def test_settings_of_its_parts_are_checked(plugin: ModuleType) -> None:
    with pytest.raises(SettingError, match="the gate 'gaussian': deviation must be a number above 0"):
        registry.check(GATES, {"name": "gaussian", "deviation": -1})
    with pytest.raises(SettingError, match="the optimizer 'sign-sgd': momentum must be"):
        Recipe(optimizer={"name": "sign-sgd", "momentum": 1.0})
    with pytest.raises(SettingError, match=r"the penalty 'squared' has no setting 'wieght'\. Did you mean 'weight'"):
        Recipe(penalty={"name": "squared", "wieght": 1.0})
