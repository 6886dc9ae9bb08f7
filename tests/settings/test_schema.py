"""The schema of settings: words, checks, names, and that every setting of every explainer refuses wrong values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import maskhooks
from maskhooks import Hooked, Recipe
from maskhooks.errors import SettingError, UnknownNameError, UnknownSiteError
from maskhooks.explainers.base import EXPLAINERS, Explainer
from maskhooks.masks.gates import HardConcrete
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import REQUIRED, checked, schema_of
from maskhooks.settings.types import Count, Decay, Folder, Positive, Seed

pytestmark = pytest.mark.usefixtures("unchecked")


def train(
    steps: Count,
    rate: Positive = 0.1,
    decay: Decay = 0.5,
    *,
    how: Literal["fast", "slow"] = "fast",
    on: bool = True,
    folder: Folder | None = None,
    seed: Seed = 0,
    judge: Callable[..., Any] | None = None,
    sizes: Sequence[int] = (1,),
) -> dict[str, Any]:
    """Trains.

    Args:
        steps: how many steps.
        rate, decay: two numbers.
    """
    return {"steps": steps, "rate": rate, "sizes": sizes}


WRONG: dict[str, list[Any]] = {
    "steps": [0, -1, 1.5, "5", True, None, [1], math.nan],
    "rate": [0, -1, "1", True, None, math.inf, math.nan, object()],
    "decay": [1, 1.0, -0.1, "0.5", False],
    "how": ["medium", 1, None, True],
    "on": [1, 0, "yes", None, [True]],
    "folder": ["", 5, True, [Path()]],
    "seed": [-1, 2**63, "x", None, [], 0.0],
    "judge": [5, "agreement", True, []],
    "sizes": [5, "12", [1.5], [True], None],
}


class TestChecked:
    @pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
    def test_wrong_values_are_refused_by_name_value_and_range(self, name: str, value: Any) -> None:
        with pytest.raises(SettingError) as caught:
            checked(train)(**{"steps": 1, name: value})
        text = str(caught.value)
        assert text.startswith(f"train: {name} must be {schema_of(train)[name].words}, got ")
        assert len(text) < 250

    def test_right_values_pass_unchanged(self) -> None:
        sizes = [1, 2]
        found = checked(train)(3, 2, how="slow", folder=Path("x"), judge=len, sizes=sizes)
        assert found == {"steps": 3, "rate": 2.0, "sizes": [1, 2]}
        assert type(found["rate"]) is float
        assert found["sizes"] is sizes

    def test_numpy_numbers_count_as_numbers(self) -> None:
        found = checked(train)(np.int64(3), np.float32(0.5))
        assert found["steps"] == 3
        assert type(found["steps"]) is int
        assert found["rate"] == 0.5

    def test_unknown_names_list_near_ones(self) -> None:
        with pytest.raises(
            SettingError, match=r"train has no setting 'stepps'\. Did you mean 'steps' or 'sizes'\? The settings are"
        ):
            checked(train)(1, stepps=2)  # type: ignore[call-arg]

    def test_python_says_what_is_missing(self) -> None:
        with pytest.raises(TypeError, match=r"missing (a|1) required"):
            checked(train)()  # type: ignore[call-arg]

    def test_words(self) -> None:
        words = {name: setting.words for name, setting in schema_of(train).items()}
        assert words["steps"] == "a whole number from 1"
        assert words["rate"] == "a number above 0"
        assert words["decay"] == "a number from 0 and below 1"
        assert words["how"] == "one of 'fast', 'slow'"
        assert words["folder"] == "a string that is not empty, a Path or None"
        assert words["judge"] == "a function or None"

    def test_meanings_come_from_the_docstring(self) -> None:
        meanings = {name: setting.description for name, setting in schema_of(train).items()}
        assert meanings["steps"] == "how many steps."
        assert meanings["rate"] == meanings["decay"] == "two numbers."


class Size(Explainer):
    """A third party's explainer, checked without doing anything for it."""

    name = "size"

    def __init__(self, hooked: Hooked, *, power: Positive = 1.0, seed: Seed = 0) -> None:
        super().__init__(hooked, seed=seed)
        self.power = power

    @property
    def reads(self) -> list[Any]:
        return self.hooked.find("hidden")

    def scores(self, clean: Any) -> list[Any]:
        return []


@pytest.fixture(scope="module")
def hooked() -> Hooked:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    sites = {"0:output": "batch feature -> batch feature", "1:output": "batch feature -> batch feature"}
    return maskhooks.wrap(model, sites=sites, output=lambda logits: Categorical(logits=logits))


# Six values of six wrong kinds for each type of setting, whatever its range is.
KINDS: dict[str, list[Any]] = {
    "number": ["5", True, [1.0], {"a": 1}, math.nan, -1],
    "count": ["5", True, 1.5, 0, -3, [1]],
    "flag": [1, 0.0, "yes", None, [], {}],
    "part": ["no such part", 5, True, [], object(), {"settings": 1}],
    "function": ["no such part", 5, True, [], {"name": "no such part"}, 1.5],
    "sites": ["no such site", 5, None, [], {"0:output": "x"}, b"input"],
}
SETTINGS = {
    **dict.fromkeys(("margin", "time_limit", "memory_limit", "beta", "smoothing", "weight", "residual"), "number"),
    **dict.fromkeys(("batch_size", "max_positions", "max_set_size", "max_sets", "width"), "count"),
    **dict.fromkeys(("amortized", "cumulative", "tied", "replay"), "flag"),
    **dict.fromkeys(("gate", "baseline", "recipe", "divergence"), "part"),
    "criterion": "function",
    **dict.fromkeys(("sites", "conditioned_on"), "sites"),
}
OWN: dict[str, list[Any]] = {
    "seed": ["5", True, 1.5, -1, None, [1]],
    "ema_decay": ["5", True, 1.0, -0.1, None, math.nan],
    "heads": ["least", True, 5, None, [], {}],
    "queries": ["middle", True, 1.5, None, [], {}],
    "layer": ["5", True, 1.5, [1], {}, b"5"],
    "target": ["5", True, 1.5, -1, [1], {}],
    "statistics": ["items", True, 5, None, [], ""],
}
# None stands for a default here: the sixth wrong kind is another one.
OPTIONAL = {"conditioned_on": 1.5}
OURS = sorted(name for name, kind in registry.parts(EXPLAINERS).items() if kind.__module__.startswith("maskhooks."))


def wrong(name: str) -> list[Any]:
    values = OWN[name] if name in OWN else KINDS[SETTINGS[name]]
    return [OPTIONAL[name] if value is None and name in OPTIONAL else value for value in values]


@pytest.mark.parametrize("explainer", OURS)
def test_every_setting_of_every_explainer_refuses_six_wrong_kinds(explainer: str, hooked: Hooked) -> None:
    kind = registry.part(EXPLAINERS, explainer)
    valid = {"sites": "0:output"}
    kind(hooked, **valid)
    for name in schema_of(kind):
        values = wrong(name)
        assert len(values) == 6
        for value in values:
            with pytest.raises((SettingError, UnknownNameError, UnknownSiteError)) as caught:
                kind(hooked, **{**valid, name: value})
            if isinstance(caught.value, SettingError) and not isinstance(value, (dict, list)):
                assert name in str(caught.value), (name, value, caught.value)


def test_every_setting_of_a_recipe_refuses_six_wrong_kinds() -> None:
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    for name, setting in schema_of(Recipe).items():
        if isinstance(setting.default, bool):
            values: list[Any] = KINDS["flag"]
        elif isinstance(setting.default, str):
            values = [5, True, None, [], 1.5, b"adam"]
        else:
            values = ["5", True, [1], math.nan, {"a": 1}, math.inf]
        for value in values:
            with pytest.raises((SettingError, UnknownNameError)):
                Recipe(**{name: value})
        assert fields[name].default == setting.default


def test_every_setting_of_fit_refuses_wrong_values(hooked: Hooked) -> None:
    batches = [torch.randn(4, 4)]
    explainer = maskhooks.DiffMask(hooked, "0:output")
    values: dict[str, list[Any]] = {
        "steps": KINDS["count"],
        "epochs": KINDS["count"],
        "budget": ["5 m 3", "", True, 0, {}, math.nan],
        "run_dir": ["", 5, True, [], {}, 1.5],
        "progress": KINDS["flag"],
        "cache": ["", 5, True, [], {}, 1.5],
        "resume": KINDS["flag"],
        "save_every": ["5", True, None, math.nan, -1, [1]],
        "tensorboard": [5, 1.5, None, [], {}, ""],
        "accelerator": [5, True, [], {}, 1.5, ""],
        "devices": [True, 1.5, {}, -1, object(), ""],
        "num_nodes": KINDS["count"],
        "precision": [5, True, [], {}, 1.5, ""],
    }
    assert set(values) == set(schema_of(maskhooks.DiffMask.fit)) - {"train", "validation", "strategy"}
    for name, wrong_ones in values.items():
        for value in wrong_ones:
            with pytest.raises(SettingError, match=f"DiffMask.fit: {name} must be"):
                explainer.fit(batches, **{name: value})
    assert not explainer.fitted


def test_steps_and_epochs_exclude_each_other(hooked: Hooked) -> None:
    with pytest.raises(SettingError, match="steps or epochs, not both"):
        maskhooks.DiffMask(hooked, "0:output").fit([torch.randn(4, 4)], steps=1, epochs=1)


@pytest.mark.parametrize("explainer", ["erasure", "random", "leave-one-out", "beam"])
def test_what_learns_nothing_has_no_settings_of_fit(explainer: str, hooked: Hooked) -> None:
    made = registry.part(EXPLAINERS, explainer)(hooked, "0:output")
    assert made.fit([torch.randn(4, 4)]) is made
    with pytest.raises(SettingError, match="fit has no setting 'nonsense'"):
        made.fit([torch.randn(4, 4)], nonsense=1)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "sites": [5, "0:output", True, 1.5, b"x", object()],
        **dict.fromkeys(("call", "output", "valid", "names", "perturb", "example_index", "edges"), KINDS["function"]),
        "units": [5, True, [], {}, 1.5, b"words"],
        "task": [5, "transformers", True, [], {}, 1.5],
        "tokeniser": [3],
    }.items(),
)
def test_wrap_refuses_wrong_values(name: str, values: list[Any], hooked: Hooked) -> None:
    for value in values:
        with pytest.raises(SettingError, match=name):
            maskhooks.wrap(hooked.model, **{name: value})


def test_a_third_partys_explainer_is_checked_alike(hooked: Hooked) -> None:
    assert Size(hooked, power=2).settings() == {"power": 2.0, "seed": 0}
    with pytest.raises(SettingError, match="Size: power must be a number above 0, got -1"):
        Size(hooked, power=-1)
    with pytest.raises(SettingError, match=r"Size has no setting 'powr'\. Did you mean 'power'"):
        Size(hooked, powr=1)  # type: ignore[call-arg]


def test_a_part_with_settings_as_a_mapping(hooked: Hooked) -> None:
    explainer = maskhooks.DiffMask(
        hooked,
        "0:output",
        gate={"name": "hard-concrete", "temperature": 0.5},
        recipe={"name": "language", "steps": 7, "probe": {"name": "mlp", "hidden": 5}},
    )
    assert explainer.gate == HardConcrete(temperature=0.5)
    assert (explainer.recipe.name, explainer.recipe.steps) == ("language", 7)
    assert explainer.recipe.objective == maskhooks.Recipe.named("language").objective
    assert explainer.recipe.make_probe().hidden == 5
    for gate in ({"name": "hard-concrete", "temperature": -1.0}, {"name": "hard-concrete", "temprature": 1.0}):
        with pytest.raises(SettingError, match="temp"):
            maskhooks.DiffMask(hooked, "0:output", gate=gate)
    with pytest.raises(SettingError, match="probe 'mlp': hidden must be a whole number from 1"):
        Recipe(probe={"name": "mlp", "hidden": 0})


class Partly:
    """Annotated with a name that does not exist at run time, as under TYPE_CHECKING."""

    def __init__(self, other: Unknown, size: Count = 1) -> None:  # type: ignore[name-defined]
        self.size = size


def test_an_annotation_that_cannot_be_resolved_leaves_the_others_checked() -> None:
    assert schema_of(Partly)["size"].words == "a whole number from 1"
    assert schema_of(Partly)["other"].check(object(), "Partly")


def test_every_part_of_ours_has_annotations_that_can_be_resolved() -> None:
    for kind in registry.kinds():
        for name, part in ({} if kind.listed or kind.made else registry.parts(kind)).items():
            for setting in schema_of(part).values():
                assert setting.annotation is not Any or (name, setting.name) == ("pyg", "algorithm"), (
                    name,
                    setting.name,
                )


def test_each_setting_has_a_type_a_meaning_and_a_default() -> None:
    for name in OURS:
        for setting in schema_of(registry.part(EXPLAINERS, name)).values():
            assert setting.description, f"{name}: {setting.name}"
            assert setting.default is not REQUIRED, f"{name}: {setting.name}"
            assert setting.words
