"""Every registered explainer, third-party ones too, passes one list, each part of it three ways: fine, bad, raising."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Explanation, Hooked, Recipe
from maskhooks.errors import BatchError, MaskhooksError, NotFittedError, SettingError, UnknownSiteError
from maskhooks.explainers.base import EXPLAINERS, Explainer
from maskhooks.model.fingerprint import fingerprint as digest
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import schema_of
from tests.conftest import fingerprint
from tests.contract.conftest import registered
from tests.models import Broken

pytestmark = pytest.mark.usefixtures("third_party", "unchecked")

TOKENS = "batch token hidden -> batch token"
SITES = ["embedding:output", "layers.0:output", "layers.1:output"]
COLUMNS = ["example", "site", "depth", "position", "label", "valid", "score", "kept"]
BAD = {"nonsense": torch.zeros(1)}


@dataclass(frozen=True)
class Case:
    """An explainer by its registered name, with settings that make it quick."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def make(self, hooked: Hooked, seed: int = 3, **settings: Any) -> Explainer:
        made: Explainer = registry.make(
            EXPLAINERS, self.name, {"hooked": hooked}, seed=seed, **self.settings, **settings
        )
        return made


QUICK = dataclasses.replace(Recipe(), steps=4, baseline_steps=2, warmup_steps=2, validations=2)
STARTS = dataclasses.replace(QUICK, restarts=2, logit_init_std=1.0, initial_temperature=3.0)
DIFFMASK = {"margin": 5.0, "recipe": QUICK}
FIT = {"progress": False, "accelerator": "cpu"}
# What a registered explainer needs to be quick; one that is not here is made with its defaults.
TUNED = {
    "diffmask": [
        Case("diffmask", DIFFMASK, FIT, "hidden"),
        Case("diffmask", {**DIFFMASK, "sites": SITES[0], "conditioned_on": SITES[1:]}, FIT, "conditioned"),
        Case("diffmask", {**DIFFMASK, "amortized": False}, FIT, "free"),
        Case("diffmask", {**DIFFMASK, "amortized": False, "recipe": STARTS}, FIT, "restarts"),
    ],
    "erasure": [Case("erasure", {"sites": SITES[0]}), Case("erasure", {"sites": SITES, "margin": 0.01}, {}, "margin")],
    "leave-one-out": [Case("leave-one-out", {"sites": SITES})],
    "beam": [Case("beam", {"sites": SITES, "width": 2})],
    "attention": [
        Case("attention"),
        Case("attention", {"heads": "mean", "queries": "last", "layer": 0}, {}, "a layer"),
    ],
    "rollout": [Case("rollout"), Case("rollout", {"residual": 0.2, "queries": 0, "layer": None}, {}, "all layers")],
    "reinforce": [Case("reinforce", {**DIFFMASK, "recipe": STARTS}, FIT)],
    "graphmask": [
        Case("graphmask", {"sites": SITES, **DIFFMASK}, FIT, "all layers"),
        Case("graphmask", {"sites": SITES[1:], **DIFFMASK, "tied": True, "amortized": False}, FIT, "tied, free"),
    ],
    "iba": [
        Case("iba", {"sites": SITES, "recipe": {"name": "iba", "steps": 2, "samples": 2}}, FIT),
        Case("iba", {"sites": SITES[1], "recipe": {"name": "iba", "steps": 2, "samples": 1}}, FIT, "one sample"),
    ],
    "schulz": [Case("schulz", {"sites": SITES, "recipe": {"name": "schulz", "steps": 3}}, FIT)],
    "readout": [
        Case("readout", {"sites": SITES[1:], "recipe": {"name": "readout", "steps": 4, "validations": 2}}, FIT)
    ],
    "guan": [
        Case("guan", {"sites": SITES, "recipe": {"name": "guan", "steps": 3}}, FIT),
        Case("guan", {"sites": SITES[1], "amortized": True, "recipe": {"name": "guan", "steps": 3}}, FIT, "amortised"),
    ],
    "shared-mask": [Case("shared-mask", {"sites": SITES, **DIFFMASK}, FIT)],
}
# Explainers of libraries that may be missing, made quick; scores of these are attributions, of either sign.
CAPTUM = {
    "integrated-gradients": [Case("integrated-gradients", {"sites": SITES, "n_steps": 4})],
    "input-x-gradient": [Case("input-x-gradient", {"sites": SITES})],
    "deep-lift": [Case("deep-lift", {"sites": SITES[1:]})],
    "feature-ablation": [Case("feature-ablation", {"sites": SITES, "perturbations_per_eval": 2})],
    "occlusion": [Case("occlusion", {"sites": SITES})],
    "shapley-sampling": [Case("shapley-sampling", {"sites": SITES, "n_samples": 2})],
    "kernel-shap": [Case("kernel-shap", {"sites": SITES, "n_samples": 8})],
    "lime": [Case("lime", {"sites": SITES, "n_samples": 8})],
}
MISSING = [name for name in ("captum", "sklearn") if importlib.util.find_spec(name) is None]
ABSENT = ["lime", "kernel-shap"] if MISSING == ["sklearn"] else [*CAPTUM] if MISSING else []
WITHOUT_END = ("iba", "readout", "guan")  # bits, and one over the deviation of noise
CASES = [
    case
    for name in registered(EXPLAINERS)
    if name not in ABSENT
    for case in {**TUNED, **CAPTUM}.get(name, [Case(name)])
]


class Net(nn.Module):
    """Draws random numbers in training mode, and keeps batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.tanh = nn.ModuleList([nn.Tanh() for _ in range(2)])
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        states = self.embedding(ids)
        for layer, tanh in zip(self.layers, self.tanh, strict=True):
            states = tanh(layer(self.drop(states)))
        return 3 * self.head(self.norm((states * valid[..., None]).sum(1)))


def attention(model: Any, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Attention weights as from two layers, of one head each."""
    ids, valid = batch
    states, found = model.embedding(ids), []
    for layer in model.layers:
        states = torch.tanh(layer(states))
        found.append((states @ states.mT).masked_fill(~valid[:, None, :], -torch.inf).softmax(-1))
    return found


class Fuse:
    """A hook of another library, which counts the model's passes and raises on demand half way through one."""

    def __init__(self) -> None:
        self.calls = 0
        self.at: int | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise Broken("on demand")


@pytest.fixture
def fuse() -> Fuse:
    return Fuse()


@pytest.fixture
def model(fuse: Fuse) -> Net:
    """In training mode but for one part, every other weight frozen, with a foreign hook in the middle."""
    net = Net()
    net.norm.eval()
    for weight in list(net.parameters())[::2]:
        weight.requires_grad_(False)
    net.layers[1].register_forward_hook(fuse)
    return net


@pytest.fixture
def hooked(model: Net) -> Hooked:
    return maskhooks.wrap(
        model,
        sites=dict.fromkeys(SITES, TOKENS),
        output=lambda logits: Categorical(logits=logits),
        valid=lambda batch: batch[1],
        names=lambda batch: [[f"t{index}" for index in row[mask]] for row, mask in zip(*batch, strict=True)],
        attention=attention,
    )


def batches(count: int = 2, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(5 + first)
    ids = torch.randint(0, 11, (count, 4, 5), generator=source)
    return [(row, torch.arange(5) < torch.tensor([[5], [3], [1], [4]])) for row in ids]


BATCH = batches(1, first=9)[0]


def fit(case: Case, hooked: Hooked, train: Any = None, **settings: Any) -> Explainer:
    explainer = case.make(hooked, **settings)
    explainer.fit(batches() if train is None else train, batches(1, first=1), **case.fit)
    return explainer


@pytest.fixture(params=CASES, ids=lambda case: f"{case.name} {case.label}".strip())
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def explainer(case: Case, hooked: Hooked) -> Explainer:
    return fit(case, hooked)


@pytest.fixture
def explanation(explainer: Explainer) -> Explanation:
    return explainer.explain(BATCH)


def breaks_everywhere(fuse: Fuse, model: nn.Module, action: Callable[[], object]) -> None:
    """Runs an action, then again and again with the model raising in its first, a middle and its last pass."""
    action()  # later runs may need fewer passes, where a replay knows the model by then
    fuse.calls = 0
    action()
    before = fingerprint(model)
    for at in sorted({0, fuse.calls // 3, 2 * fuse.calls // 3, fuse.calls - 1} if fuse.calls else ()):
        fuse.calls, fuse.at = 0, at
        with pytest.raises(Broken, match="on demand"):
            action()
        assert fingerprint(model) == before, f"pass {at}"
    fuse.at = None


class TestTheModelComesBack:
    """Bit for bit, with the foreign hook, and the global random state too."""

    def test_from_fit(self, case: Case, hooked: Hooked, model: Net) -> None:
        before = fingerprint(model)
        fit(case, hooked)
        assert fingerprint(model) == before

    @pytest.mark.parametrize("train", [[], [BAD], [BATCH[:1]]], ids=["empty", "no batch", "half a batch"])
    def test_from_a_fit_on_bad_batches(
        self, case: Case, hooked: Hooked, model: Net, fuse: Fuse, train: list[Any]
    ) -> None:
        fit(case, hooked)
        learns, before = fuse.calls > 0, fingerprint(model)
        if learns:  # one that never runs the model has nothing to complain of
            with pytest.raises(MaskhooksError):
                fit(case, hooked, train)
        else:
            fit(case, hooked, train)
        assert fingerprint(model) == before

    def test_from_a_fit_in_which_the_model_raises(self, case: Case, hooked: Hooked, model: Net, fuse: Fuse) -> None:
        breaks_everywhere(fuse, model, lambda: fit(case, hooked))

    def test_from_explain(self, explainer: Explainer, model: Net) -> None:
        before = fingerprint(model)
        explainer.explain(BATCH)
        explainer.explain_all(batches())
        assert fingerprint(model) == before

    @pytest.mark.parametrize("batch", [BAD, BATCH[:1], ()], ids=["no batch", "half a batch", "nothing"])
    def test_from_explaining_a_bad_batch(self, explainer: Explainer, model: Net, batch: Any) -> None:
        before = fingerprint(model)
        with pytest.raises(BatchError):
            explainer.explain(batch)
        assert fingerprint(model) == before

    def test_from_an_explain_in_which_the_model_raises(self, explainer: Explainer, model: Net, fuse: Fuse) -> None:
        breaks_everywhere(fuse, model, lambda: explainer.explain(BATCH))
        assert fuse.calls > 0

    def test_from_sites_that_are_not_there(self, case: Case, hooked: Hooked, model: Net) -> None:
        before, other = fingerprint(model), dataclasses.replace(case, settings={})
        with pytest.raises(UnknownSiteError, match="embeddign"):
            other.make(hooked, sites="embeddign:output")
        assert fingerprint(model) == before


class TestSeed:
    def test_the_same_seed_gives_the_same_explanation(self, case: Case, hooked: Hooked) -> None:
        """Whatever the global generator says."""
        found = []
        for state in (1, 2):
            torch.manual_seed(state)
            found.append(fit(case, hooked).explain(BATCH))
        assert found[0] == found[1]

    def test_explaining_again_changes_nothing(self, explainer: Explainer, explanation: Explanation) -> None:
        explainer.explain(batches(1, first=4)[0])
        assert explainer.explain(BATCH) == explanation


class TestSettings:
    def test_each_is_kept_as_an_attribute(self, case: Case, hooked: Hooked) -> None:
        """So that it is saved, and stands in the provenance."""
        explainer = case.make(hooked)
        schema = schema_of(type(explainer))
        assert [name for name in schema if not hasattr(explainer, name)] == []
        assert set(schema) <= set(explainer.settings())
        assert json.loads(json.dumps(explainer.settings())) == explainer.settings()

    def test_each_has_a_type_and_a_meaning(self, case: Case, hooked: Hooked) -> None:
        for setting in schema_of(type(case.make(hooked))).values():
            assert setting.annotation is not Any, setting.name
            assert setting.description, setting.name

    def test_what_is_not_a_setting(self, case: Case, hooked: Hooked) -> None:
        with pytest.raises(SettingError, match="no setting 'colour'"):
            case.make(hooked, colour=1)


class TestRows:
    def test_the_columns(self, explanation: Explanation) -> None:
        assert sorted(explanation.columns) == sorted(COLUMNS)
        assert {len(column) for column in explanation.columns.values()} == {len(explanation)}
        kinds = {name: explanation[name].dtype for name in ("score", "valid", "kept")}
        assert kinds == {"score": np.float32, "valid": bool, "kept": bool}
        assert all(explanation[name].dtype.kind == "i" for name in ("example", "depth", "position"))

    def test_a_row_for_each_position_of_each_site_and_depth(self, explanation: Explanation) -> None:
        layers = set(zip(explanation["site"], explanation["depth"], strict=True))
        assert set(explanation["site"]) <= set(SITES)
        rows = list(zip(*(explanation[name] for name in ("site", "depth", "example", "position")), strict=True))
        places = [(example, position) for example in range(4) for position in range(5)]
        assert sorted(rows) == sorted((*layer, *place) for layer in layers for place in places)

    def test_scores_and_what_is_kept(self, case: Case, explanation: Explanation) -> None:
        score = explanation["score"]
        assert np.isfinite(score).all()
        if case.name not in CAPTUM:
            assert score.min() >= 0
        if case.name not in (*CAPTUM, *WITHOUT_END):
            assert score.max() <= 1
        assert np.array_equal(explanation["kept"], (score > 0.5) & explanation["valid"])

    def test_padding_is_not_real(self, explanation: Explanation) -> None:
        valid = BATCH[1].numpy()[explanation["example"], explanation["position"]]
        assert not valid.all()
        assert np.array_equal(explanation["valid"], valid)
        assert explanation.select()["valid"].all()

    def test_positions_have_the_names_of_the_task(self, explanation: Explanation) -> None:
        kept = explanation.select()
        tokens = BATCH[0].numpy()[kept["example"], kept["position"]]
        assert kept["label"].tolist() == [f"t{token}" for token in tokens]

    def test_examples_are_numbered_on(self, explainer: Explainer, explanation: Explanation) -> None:
        both = explainer.explain_all([BATCH, BATCH])
        assert sorted(set(both["example"])) == list(range(8))
        assert explainer.explain(BATCH, start_index=4) == both.select(example=range(4, 8), valid=None)
        assert both.select(example=range(4), valid=None) == explanation


class TestProvenance:
    def test_it_says_what_made_the_explanation(self, case: Case, hooked: Hooked, explanation: Explanation) -> None:
        said = explanation.provenance
        python = platform.python_version()
        assert said["explainer"] == case.name
        assert said["seed"] == 3
        assert said["fingerprint"] == digest(hooked.model)["digest"]
        assert said["versions"] == {"maskhooks": version("maskhooks"), "torch": torch.__version__, "python": python}
        assert json.loads(json.dumps(said)) == said

    def test_another_model_has_another_fingerprint(
        self, explainer: Explainer, explanation: Explanation, model: Net
    ) -> None:
        with torch.no_grad():
            model.head.bias.add_(1)
        assert explainer.explain(BATCH).provenance["fingerprint"] != explanation.provenance["fingerprint"]

    def test_it_survives_files(self, explanation: Explanation, tmp_path: Path) -> None:
        explanation.save(tmp_path)
        assert Explanation.load(tmp_path) == explanation


LEARNED = {*TUNED} - {"erasure", "leave-one-out", "beam", "attention", "rollout"}
SAVED = [case for case in CASES if case.name in LEARNED]


@pytest.mark.parametrize("case", SAVED, ids=lambda case: f"{case.name} {case.label}".strip(), indirect=True)
class TestStorage:
    def test_what_is_loaded_explains_alike(
        self, explainer: Any, explanation: Explanation, hooked: Hooked, model: Net, tmp_path: Path
    ) -> None:
        explainer.save(tmp_path)
        before = fingerprint(model)
        loaded = maskhooks.load(tmp_path, hooked)
        assert fingerprint(model) == before
        assert type(loaded) is type(explainer)
        assert loaded.explain(BATCH) == explanation
        assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".csv"}

    def test_saved_again_it_is_the_same_file(self, explainer: Any, hooked: Hooked, tmp_path: Path) -> None:
        explainer.save(tmp_path / "one")
        maskhooks.load(tmp_path / "one", hooked).save(tmp_path / "two")
        for path in [*(tmp_path / "one").glob("*.safetensors"), *(tmp_path / "one").glob("*.json")]:
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()

    def test_nothing_is_saved_before_fit(self, case: Case, hooked: Hooked, tmp_path: Path) -> None:
        with pytest.raises(NotFittedError, match="call fit"):
            case.make(hooked).save(tmp_path / "none")  # type: ignore[attr-defined]
        assert not (tmp_path / "none").exists()


def test_the_storage_list_is_not_empty() -> None:
    assert SAVED
