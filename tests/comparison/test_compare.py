"""`compare`: what it does with methods, metrics and data of each kind, what it refuses, and how it resumes."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal

import maskhooks
from maskhooks import Comparison, Explanation, Hooked
from maskhooks.comparison.digest import digest
from maskhooks.comparison.methods import default_methods, default_sites
from maskhooks.errors import (
    EmptyLoaderError,
    MissingExtraError,
    NotFittedError,
    ResumeError,
    SettingError,
    UnknownNameError,
)
from maskhooks.metrics.erasure import Comprehensiveness, curves
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.judgement import judge
from tests import tiny_runs
from tests.conftest import fingerprint
from tests.metrics import small

pytest.importorskip("scipy")

METRICS = ["comprehensiveness", "area-between"]
TWO = ["leave-one-out", "random"]


def batches(count: int = 3) -> list[Any]:
    return [small.batch(seed=number) for number in range(count)]


def compared(hooked: Hooked | None = None, methods: Any = TWO, **settings: Any) -> Comparison:
    given = {"metrics": METRICS, "sites": small.SITE, "progress": False, **settings}
    return maskhooks.compare(hooked or small.hooked(), methods, given.pop("batches", None) or batches(), **given)


def same(one: Comparison, other: Comparison) -> bool:
    return one.rows().equals(other.rows()) and one.explanations == other.explanations


class TestResults:
    def test_what_judge_says_of_all_batches(self) -> None:
        hooked = small.hooked()
        found = compared(hooked, metrics=[*METRICS, "kendall", {"name": "morf", "baseline": "mean"}])
        explainers = {
            "leave-one-out": maskhooks.LeaveOneOut(hooked, small.SITE),
            "random": maskhooks.Random(hooked, small.SITE),
        }
        explained = {label: explainer.explain_all(batches()) for label, explainer in explainers.items()}
        for label, explanation in explained.items():
            assert found.explanations[label] == explanation
            others = [other for name, other in explained.items() if name != label]
            wanted = judge(
                explanation,
                [*METRICS, "kendall", {"name": "morf", "baseline": "mean"}],
                hooked=hooked,
                batches=batches(),
                others=others,
            )
            for metric, one in zip(found.metrics, wanted, strict=True):
                (mine,) = found.judgements[label][metric]
                assert mine.values == pytest.approx(one.values, abs=1e-6, nan_ok=True)
                assert mine.examples.tolist() == one.examples.tolist()

    def test_curves_are_those_of_the_metric(self) -> None:
        hooked = small.hooked()
        found = compared(hooked)
        assert found.curve_metric == "area-between"
        explanation = maskhooks.LeaveOneOut(hooked, small.SITE).explain_all(batches())
        (evidence,) = Evidence.of(explanation, hooked=hooked, batches=batches())
        from maskhooks.metrics.erasure import AreaBetween

        wanted, mine = curves(evidence, AreaBetween()), found.curves(found.table_rows[0])
        assert mine is not None
        assert mine.highest_first == pytest.approx(wanted.highest_first)
        assert mine.lowest_first == pytest.approx(wanted.lowest_first)

    def test_each_method_is_timed_without_its_first_batch(self) -> None:
        class Slow(maskhooks.Random):
            def scores(self, clean: Any) -> Any:
                time.sleep(0.2 if not self.calls else 0.02)
                self.calls += 1
                return super().scores(clean)

            calls = 0

        import time

        hooked = small.hooked()
        timing = compared(hooked, {"slow": Slow(hooked, small.SITE)}).timings["slow"]
        assert timing.examples == 8
        assert 0.005 <= timing.seconds < 0.02
        assert timing.first_seconds > 0.05
        assert timing.fit_seconds is None

    def test_the_model_and_the_random_state_stay(self) -> None:
        hooked = small.hooked()
        before = fingerprint(hooked.model)
        compared(hooked)
        assert fingerprint(hooked.model) == before

    def test_a_seed_gives_the_same_numbers(self) -> None:
        assert same(compared(seed=3), compared(seed=3))
        assert not same(compared(seed=3), compared(seed=4))

    def test_defaults(self) -> None:
        hooked = small.hooked()
        found = maskhooks.compare(hooked, None, batches(1), sites=small.SITE, progress=False)
        assert found.methods[-2:] == TWO
        assert list(found.metrics) == ["comprehensiveness", "sufficiency", "area-between", "divergence"]
        truth = [[1] * 8] * 4
        true = compared(batches=batches(1), metrics=None, truth=truth)
        assert list(true.metrics)[-2:] == ["auroc", "average-precision"]

    def test_without_captum_methods_by_gradients_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "captum", None)
        monkeypatch.setitem(sys.modules, "captum.attr", None)
        assert default_methods(small.hooked()) == TWO

    def test_progress_has_an_estimate(self, capsys: pytest.CaptureFixture[str], early_progress: None) -> None:
        compared(batches=batches(4), progress=True)
        lines = capsys.readouterr().err
        assert re.search(r"comparing: \d+ of 16 .*", lines)
        assert "comparing: 16 of 16" in lines


class TestMethods:
    def test_objects_names_settings_runs_and_explanations(self, tmp_path: Path) -> None:
        masks = tiny_runs.explainer(["layers.0:output"])
        data = list(tiny_runs.loader(8, 4))
        masks.fit(data, steps=4, progress=False, run_dir=tmp_path / "my-run")
        loo = maskhooks.LeaveOneOut(masks.hooked, "layers.0:output")
        given = [tmp_path / "my-run", {"name": "random", "seed": 5}, loo, loo.explain_all(data)]
        with pytest.raises(SettingError, match="several methods are called 'leave-one-out'"):
            maskhooks.compare(masks.hooked, given, data, progress=False)
        labels = ["masks", "chance", "loo", "stored"]
        found = maskhooks.compare(masks.hooked, dict(zip(labels, given, strict=True)), data, progress=False)
        assert found.methods == labels
        assert found.sites == ["layers.0:output"]
        assert found.explanations["masks"] == masks.explain_all(data)
        assert found.explanations["stored"] == found.explanations["loo"]
        assert found.timings["masks"].fit_seconds == pytest.approx(masks.result.seconds)
        assert found.timings["masks"].fit_seconds > 0
        assert math.isnan(found.timings["stored"].seconds)
        assert found.explanations["chance"].provenance["seed"] == 5

    def test_a_folder_lends_its_name(self, tmp_path: Path) -> None:
        masks = tiny_runs.explainer(["layers.0:output"])
        data = list(tiny_runs.loader(8, 4))
        masks.fit(data, steps=4, progress=False, run_dir=tmp_path / "my-run")
        found = maskhooks.compare(masks.hooked, [str(tmp_path / "my-run"), "random"], data, progress=False)
        assert found.methods == ["my-run", "random"]

    def test_what_must_be_fitted_is_fitted_as_a_copy(self) -> None:
        masks, data = tiny_runs.explainer(["layers.0:output"]), list(tiny_runs.loader(8, 4))
        with pytest.raises(NotFittedError, match=r"masks must be fitted before it explains.*fit_batches"):
            maskhooks.compare(masks.hooked, {"masks": masks}, data, progress=False)
        train = list(tiny_runs.loader(16, 8))
        found = maskhooks.compare(masks.hooked, {"masks": masks}, data, fit_batches=train, progress=False)
        assert not masks.fitted
        assert found.explanations["masks"] == masks.fit(train, progress=False).explain_all(data)
        assert (found.timings["masks"].fit_seconds or 0) > 0

    def test_of_several_depths_the_last_or_all(self) -> None:
        masks = tiny_runs.explainer(["embedding:output"], conditioned_on=["layers.0:output", "layers.1:output"])
        data = list(tiny_runs.loader(8, 4))
        masks.fit(data, steps=4, progress=False)
        given = {"masks": masks, "random": "random"}
        last, every = (
            maskhooks.compare(masks.hooked, given, data, metrics=METRICS, depths=depths, progress=False)
            for depths in ("last", "all")
        )
        assert [(row.method, row.depth) for row in last.table_rows] == [("masks", 2), ("random", 0)]
        assert every.table().index.tolist() == ["masks, depth 1", "masks, depth 2", "random"]
        assert every.judgements["masks"]["area-between"][-1].values.tolist() == (
            last.judgements["masks"]["area-between"][0].values.tolist()
        )

    def test_only_explanations(self) -> None:
        hooked = small.hooked()
        given = {
            name: kind(hooked, small.SITE).explain_all(batches())
            for name, kind in {"a": maskhooks.LeaveOneOut, "b": maskhooks.Random}.items()
        }
        found = compared(hooked, given)
        assert found.explanations == given
        assert len(found.examples) == 12


@dataclasses.dataclass
class Kind:
    """A kind of data: a wrapped model, batches, and the sites to explain."""

    hooked: Callable[[], Hooked]
    batches: Callable[[], list[Any]]
    sites: Any = None


def classes(logits: torch.Tensor) -> Categorical:
    return Categorical(logits=logits)


def image() -> Hooked:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return maskhooks.wrap(net, sites={":input": "batch channel height width -> batch height width"}, output=classes)


def table(outputs: int = 3, output: Any = classes) -> Hooked:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))
    return maskhooks.wrap(net, sites={":input": "batch feature -> batch feature, feature=6"}, output=output)


def graph() -> Hooked:
    from tests.adapters.geometric_models import Pooled, batch

    return maskhooks.wrap(Pooled().eval(), example=batch())


def graphs() -> list[Any]:
    from tests.adapters.geometric_models import batch

    return [batch(), batch()]


KINDS = {
    "texts": Kind(small.hooked, lambda: batches(2), small.SITE),
    "images": Kind(image, lambda: [torch.randn(3, 1, 4, 4), torch.randn(2, 1, 4, 4)]),
    "tables": Kind(table, lambda: [torch.randn(5, 6), torch.randn(4, 6)]),
    "nodes": Kind(graph, graphs),
    "messages": Kind(graph, graphs, "message"),
    "regression": Kind(lambda: table(1, lambda x: Normal(x[:, 0], 1.0)), lambda: [torch.randn(5, 6)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_data(kind: str, tmp_path: Path) -> None:
    if kind in ("nodes", "messages"):
        pytest.importorskip("torch_geometric")
        pytest.importorskip("networkx")
    torch.manual_seed(0)
    one = KINDS[kind]
    hooked, data = one.hooked(), one.batches()
    found = maskhooks.compare(hooked, TWO, data, sites=one.sites, folder=tmp_path, progress=False)
    means = found.summary()
    assert means["mean"].notna().all()
    assert set(means["examples"]) == {len(found.examples)}
    assert len(found.examples) == sum(len(found.explanations["random"].select(example=n)) > 0 for n in found.examples)
    assert same(Comparison.load(tmp_path), found)
    assert "Side by side" in found.page()
    assert r"\begin{tabular}" in found.latex()


def test_sites_by_default() -> None:
    assert default_sites(table()) == "hidden"
    pytest.importorskip("torch_geometric")
    assert default_sites(graph()) == "input"


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "error", "words"),
        [
            ({"methods": ["leave-one-oot"]}, UnknownNameError, "neither the folder .* Did you mean 'leave-one-out'"),
            ({"metrics": ["sufficiensy"]}, UnknownNameError, "no metric is named .* Did you mean 'sufficiency'"),
            ({"metrics": []}, SettingError, "no metric to judge by"),
            ({"metrics": ["morf", "morf"]}, SettingError, "morf is given twice"),
            ({"methods": []}, SettingError, "no method to compare"),
            ({"batches": iter(())}, EmptyLoaderError, "nothing to explain"),
            ({"metrics": ["auroc"]}, SettingError, "'auroc' needs what each example needs, truth="),
            ({"metrics": ["kendall"], "methods": ["random"]}, SettingError, "'kendall' needs other explanations"),
            (
                {"metrics": [{"name": "morf", "operator": "delete"}]},
                SettingError,
                "^leave-one-out: operator='delete' leaves tokens out of the input, but",
            ),
            ({"confidence": 2.0}, SettingError, "confidence must be"),
        ],
    )
    def test_bad_arguments(self, settings: dict[str, Any], error: type[Exception], words: str) -> None:
        given = {"methods": TWO, **settings}
        with pytest.raises(error, match=words):
            maskhooks.compare(
                small.hooked(),
                given.pop("methods"),
                given.pop("batches", batches(1)),
                sites=small.SITE,
                **{"metrics": METRICS, "progress": False, **given},
            )

    def test_what_is_no_method(self, unchecked: None) -> None:
        with pytest.raises(SettingError, match=r"3 is not a method. Give an explainer, its name"):
            compared(methods=[3])

    def test_another_model(self) -> None:
        other = small.hooked(small.model(1))
        with pytest.raises(SettingError, match=r"^theirs: this explainer is of another model"):
            compared(methods={"theirs": maskhooks.Random(other, small.SITE)})
        explained = maskhooks.Random(other, small.SITE).explain_all(batches())
        with pytest.raises(SettingError, match=r"^theirs: .*of another model"):
            compared(methods={"theirs": explained})

    def test_other_sites(self) -> None:
        hooked = small.hooked()
        one, other = (maskhooks.Random(hooked, site) for site in (small.SITE, "first:output"))
        with pytest.raises(
            SettingError, match=r"different sites: a explains embedding:output; b explains first:output"
        ):
            compared(hooked, {"a": one, "b": other})
        both = maskhooks.Random(hooked, [small.SITE, "first:output"])
        with pytest.raises(SettingError, match=r"b explains embedding:output, first:output"):
            compared(hooked, {"a": one, "b": both})

    def test_scores_that_are_nan(self) -> None:
        class Broken(maskhooks.Random):
            def scores(self, clean: Any) -> Any:
                return [dataclasses.replace(one, values=one.values * math.nan) for one in super().scores(clean)]

        hooked = small.hooked()
        with pytest.raises(SettingError, match=r"^broken: 21 scores at embedding:output are NaN"):
            compared(hooked, {"fine": maskhooks.Random(hooked, small.SITE), "broken": Broken(hooked, small.SITE)})

    def test_an_example_without_positions(self) -> None:
        with pytest.raises(SettingError, match=r"^leave-one-out: example 1 has no position that counts"):
            compared(batches=[small.batch((3, 1))])

    def test_without_scipy_nothing_is_begun(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "scipy", None)
        with pytest.raises(MissingExtraError, match="scipy"):
            compared(folder=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class Noted(Comprehensiveness):
    """Notes which examples it judged, and can end the process after some."""

    def __init__(self, seen: list[int], left: int) -> None:
        super().__init__()
        self.seen, self.left = seen, left

    def settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, evidence: Evidence) -> Floats:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += evidence.examples.tolist()
        return super().__call__(evidence)


class Watched(maskhooks.Random):
    """Notes how often it explained."""

    calls = 0

    def scores(self, clean: Any) -> Any:
        Watched.calls += 1
        return super().scores(clean)


class TestResuming:
    @pytest.mark.parametrize("stop", [1, 2, 3, 5])
    def test_nothing_is_done_twice_and_all_is_the_same(self, stop: int, tmp_path: Path) -> None:
        def go_on(seen: list[int], left: int, folder: Path) -> Comparison:
            hooked = small.hooked()
            methods = {"watched": Watched(hooked, small.SITE), "loo": maskhooks.LeaveOneOut(hooked, small.SITE)}
            return compared(hooked, methods, metrics=[*METRICS, Noted(seen, left)], folder=folder)

        whole = go_on([], 99, tmp_path / "whole")
        first: list[int] = []
        Watched.calls = 0
        with pytest.raises(KeyboardInterrupt):
            go_on(first, stop, tmp_path / "cut")
        before = Watched.calls
        if stop > 1:  # the batches that are done for both can be looked at
            assert len(Comparison.load(tmp_path / "cut").examples) == 4 * (stop // 2)
        else:
            with pytest.raises(SettingError, match="no results yet"):
                Comparison.load(tmp_path / "cut")
        rest: list[int] = []
        resumed = go_on(rest, 99, tmp_path / "cut")
        assert same(resumed, whole)
        assert Watched.calls == 3
        assert before == min(stop // 2 + 1, 3)
        assert sorted(first + rest) == sorted([*range(12), *range(12)])
        again: list[int] = []
        assert same(go_on(again, 0, tmp_path / "cut"), whole)
        assert again == []

    def test_a_killed_process(self, tmp_path: Path) -> None:
        """SIGKILL while it writes; what is there is whole."""
        data = [small.batch(seed=number) for number in range(12)]
        with tiny_runs.elsewhere(lambda: compared(batches=data, folder=tmp_path / "cut")) as process:
            while len(list((tmp_path / "cut").glob("judged/*/part-*"))) < 5:
                assert process.is_alive()
            process.kill()
            process.join()
        assert process.exitcode == -9
        assert same(compared(batches=data, folder=tmp_path / "cut"), compared(batches=data))

    def test_a_broken_file_is_made_again(self, tmp_path: Path) -> None:
        whole = compared(folder=tmp_path)
        for path in tmp_path.glob("*/00-*/part-000001.parquet"):
            path.write_bytes(path.read_bytes()[:50])
        assert same(compared(folder=tmp_path), whole)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"seed": 1}, "seed was 0 and is 1"),
            ({"metrics": ["comprehensiveness"]}, "metrics.area-between was"),
            ({"methods": ["random"]}, "methods.leave-one-out was"),
            ({"batches": batches(2)}, "batches was"),
            ({"hooked": small.hooked(small.model(1))}, "model.fingerprint was"),
            ({"metrics": [{"name": "comprehensiveness", "baseline": "mean"}, "area-between"]}, "baseline was"),
        ],
    )
    def test_another_comparison_in_the_folder(self, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
        compared(folder=tmp_path)
        with pytest.raises(ResumeError, match=words):
            compared(**{**settings, "folder": tmp_path})

    def test_a_fit_is_not_repeated(self, tmp_path: Path) -> None:
        data, train = list(tiny_runs.loader(8, 4)), list(tiny_runs.loader(16, 8))

        def go_on() -> Comparison:
            masks = tiny_runs.explainer(["layers.0:output"])
            return maskhooks.compare(
                masks.hooked, {"masks": masks}, data, fit_batches=train, folder=tmp_path, progress=False
            )

        found = go_on()
        log = (tmp_path / "fitted" / "00-masks" / "log.csv").read_bytes()
        for path in tmp_path.glob("*/00-masks/part-000001.parquet"):
            path.unlink()
        again = go_on()
        assert same(again, found)
        assert (tmp_path / "fitted" / "00-masks" / "log.csv").read_bytes() == log
        assert again.timings["masks"].fit_seconds == pytest.approx(found.timings["masks"].fit_seconds)


def test_digests_tell_data_apart() -> None:
    one = {"ids": torch.arange(4), "text": ["a", "b"]}
    assert digest(one) == digest({"ids": torch.arange(4), "text": ["a", "b"]})
    different: Sequence[Any] = [
        {"ids": torch.arange(4), "text": ["a", "c"]},
        {"ids": torch.arange(4).float(), "text": ["a", "b"]},
        {"ids": torch.arange(4).reshape(2, 2), "text": ["a", "b"]},
        {"ids": torch.tensor([0, 1, 2, 4]), "text": ["a", "b"]},
        {"id": torch.arange(4), "text": ["a", "b"]},
        (torch.arange(4), ["a", "b"]),
    ]
    assert len({digest(one), *map(digest, different)}) == 7
    assert digest(np.array(["a", None], object)) != digest(np.array(["a", "b"], object))
    pytest.importorskip("torch_geometric")
    first, other = graphs()[0], graphs()[0]
    assert digest(first) == digest(other)
    other.x = other.x + 1
    assert digest(first) != digest(other)


def test_an_explanation_needs_all_examples() -> None:
    hooked = small.hooked()
    few: Explanation = maskhooks.Random(hooked, small.SITE).explain_all(batches(1))
    with pytest.raises(SettingError, match=r"^few: .*there is no example"):
        compared(hooked, {"few": few})
