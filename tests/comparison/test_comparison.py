"""What a comparison says of given values: tables, tests, times, files, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

from maskhooks import Comparison
from maskhooks.comparison.latex import escaped
from maskhooks.errors import CorruptFileError, FormatError, ResumeError, SettingError, UnknownNameError
from maskhooks.metrics.intervals import difference, holm, interval
from maskhooks.metrics.judgement import Judgement, judge
from tests.comparison.stores import METRICS, comparison, saved, store

pytest.importorskip("scipy")

DRAW = np.random.default_rng(0)
GOOD = DRAW.normal(0.6, 0.1, 20)
VALUES = {"good": GOOD, "as good": GOOD + DRAW.normal(0, 0.05, 20), "bad": GOOD - DRAW.normal(0.3, 0.1, 20)}
ODD = "a_b & 50 % of #1 ~ x^2 {$} \\ <b>"


class TestNumbers:
    def test_a_table_has_means_and_intervals(self) -> None:
        table = comparison(VALUES).table()
        assert table.index.tolist() == list(VALUES)
        for label, values in VALUES.items():
            wanted = interval(Judgement(METRICS["comprehensiveness"], "x", 0, np.arange(20), values))
            row = table.loc[label, "comprehensiveness"]
            assert row.tolist() == [wanted.mean, wanted.low, wanted.high]

    def test_tests_are_of_all_pairs_and_adjusted_for_them(self) -> None:
        found = comparison(VALUES).differences("comprehensiveness")
        judged = {
            label: Judgement(METRICS["comprehensiveness"], "x", 0, np.arange(20), values)
            for label, values in VALUES.items()
        }
        pairs = [("good", "as good"), ("good", "bad"), ("as good", "bad")]
        assert list(zip(found["first"], found["second"], strict=True)) == pairs
        p_values = {str(pair): difference(*(judged[label] for label in pair)).p_value for pair in pairs}
        assert found["p"].tolist() == list(p_values.values())
        assert found["p_adjusted"].tolist() == list(holm(p_values).values())
        assert found["tests"].tolist() == [3, 3, 3]
        assert (found["low"] <= found["difference"]).all()

    def test_a_family_against_one_method(self) -> None:
        found = comparison(VALUES).differences("comprehensiveness", against="bad")
        assert found[["first", "second"]].to_numpy().tolist() == [["bad", "good"], ["bad", "as good"]]
        assert found["tests"].tolist() == [2, 2]
        assert (found["difference"] < 0).all()

    def test_the_best_and_those_no_different_from_it(self) -> None:
        found = comparison(VALUES)
        higher, lower = (found.cells(metric) for metric in METRICS)
        means = {label: values.mean() for label, values in VALUES.items()}
        assert [cell.best for cell in higher] == [means[label] == max(means.values()) for label in means]
        assert [cell.worse for cell in higher] == [False, False, True]
        assert [cell.best for cell in lower] == [False, False, True]
        assert [cell.worse for cell in lower] == [True, True, False]

    def test_equal_means_are_both_best(self) -> None:
        assert [cell.best for cell in comparison({"a": [1, 2, 3], "b": [3, 2, 1]}).cells("comprehensiveness")] == [
            True,
            True,
        ]

    def test_values_that_are_not_defined(self) -> None:
        nan = math.nan
        found = comparison({"some": [nan, 1, 3, 2], "none": [nan] * 4, "all": [1, 2, 2, 2], "inf": [1, math.inf, 2, 2]})
        summary = found.summary().query("metric == 'comprehensiveness'").set_index("method")
        assert summary.loc["some", ["mean", "examples", "undefined"]].tolist() == [2, 3, 1]
        assert math.isnan(summary.loc["none", "mean"])
        assert math.isnan(summary.loc["inf", "low"])
        tested = found.differences("comprehensiveness")
        assert tested[["first", "second"]].to_numpy().tolist() == [["some", "all"]]
        assert "--" in found.latex()
        assert "not defined for 1" in found.page()

    def test_one_example_has_no_interval_and_no_test(self) -> None:
        found = comparison({"a": [0.5], "b": [0.25]})
        assert found.table()["comprehensiveness"]["low"].isna().all()
        assert found.differences("comprehensiveness").empty
        assert found.latex().count("[") == 0 or "scriptsize" not in found.latex()

    def test_unknown_names(self) -> None:
        with pytest.raises(UnknownNameError, match=r"no metric .* 'suficiency'.* Did you mean 'sufficiency'"):
            comparison(VALUES).cells("suficiency")
        with pytest.raises(UnknownNameError, match=r"no method is called 'god'.* Did you mean 'good'"):
            comparison(VALUES).differences("sufficiency", against="god")


class TestTime:
    SECONDS: ClassVar = {"masks": (0.01, 100.0), "slow": (0.51, None), "fast": (0.001, None)}

    def test_break_even(self) -> None:
        """n = C_fit / (c_each - c_amortised), none where the trained method is no faster."""
        found = comparison({label: [1.0, 2.0] for label in self.SECONDS}, self.SECONDS)
        rows = found.break_even().set_index("other")
        assert rows["method"].tolist() == ["masks", "masks"]
        assert rows.loc["slow", "examples"] == math.ceil(100 / 0.5)
        assert math.isnan(rows.loc["fast", "examples"])
        told = [str(one) for one in found.break_evens()]
        assert told[0].startswith("masks costs less than slow from 200 examples on: 1 min 40 s of training")
        assert told[1].startswith("masks never pays off against fast")
        assert found.table()["seconds per example"].tolist() == pytest.approx([0.01, 0.51, 0.001])

    def test_there_is_none_without_training(self) -> None:
        assert comparison(VALUES).break_even().empty


class TestFiles:
    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        found = saved(VALUES, tmp_path)
        loaded = Comparison.load(tmp_path)
        assert loaded.rows().equals(found.rows())
        assert loaded.summary().equals(found.summary())
        assert loaded.explanations == found.explanations
        assert loaded.latex() == found.latex()
        found.save(tmp_path)  # the same again is no error
        with pytest.raises(ResumeError, match="holds another comparison"):
            comparison({"other": GOOD}).save(tmp_path)
        with pytest.raises(SettingError, match="read from a comparison"):
            judge(found.explanations["good"], loaded.metrics["sufficiency"])

    def test_parquet_and_csv(self, tmp_path: Path) -> None:
        found = comparison(VALUES)
        found.to_parquet(tmp_path / "values.parquet")
        assert pd.read_parquet(tmp_path / "values.parquet").equals(found.rows())
        found.csv(tmp_path / "table.csv")
        with (tmp_path / "table.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["method"] for row in rows] == [*VALUES, *VALUES]
        assert float(rows[0]["mean"]) == GOOD.mean()

    def test_missing_and_broken_files(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptFileError, match="cannot be read"):
            Comparison.load(tmp_path)
        saved(VALUES, tmp_path)
        (path,) = tmp_path.glob("judged/00-good/part-*.parquet")
        path.write_bytes(b"PAR1")
        with pytest.raises(CorruptFileError, match=r"part-000000.parquet is not what a comparison writes"):
            Comparison.load(tmp_path)
        manifest = tmp_path / "comparison.json"
        kept = manifest.read_text()
        manifest.write_text(json.dumps({**json.loads(kept), "format": 99}))
        with pytest.raises(FormatError):
            Comparison.load(tmp_path)
        manifest.write_text(kept[:20])
        with pytest.raises(CorruptFileError, match="is not what a comparison writes"):
            Comparison.load(tmp_path)

    def test_nothing_yet(self, tmp_path: Path) -> None:
        made = store(VALUES)
        made._judged.clear()
        with pytest.raises(SettingError, match="no results yet"):
            Comparison(made)


class TestLatex:
    def test_a_table(self) -> None:
        text = comparison(VALUES).latex(digits=2)
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert rows[0] == r"Method & comprehensiveness & sufficiency & Time \\"
        assert rows[1] == r" & probability $\uparrow$ & probability $\downarrow$ & s/example $\downarrow$ \\"
        best = max(VALUES, key=lambda label: VALUES[label].mean())
        for label, row in zip(VALUES, rows[2:], strict=True):
            name, higher, lower, seconds = row.removesuffix(r" \\").split(" & ")
            assert name == label
            assert (r"\textbf" in higher) == (label == best)
            assert (r"\underline" in higher) == (label != best and label != "bad")
            assert (r"\textbf" in lower) == (label == "bad")
            assert re.search(r"\\scriptsize \[0\.\d\d, 0\.\d\d\]", higher)
            assert seconds == "1"
        assert text.count("&") == 5 * 3
        assert "all 3 tests" in text
        assert "scriptsize" not in comparison(VALUES).latex(intervals=False)

    def test_names_are_escaped(self) -> None:
        text = comparison({ODD: [0.5, 0.25], "b": [-0.5, -0.25]}).latex()
        wanted = r"a\_b \& 50 \% of \#1 \textasciitilde{} x\textasciicircum{}2 \{\$\} \textbackslash{} <b>"
        assert escaped(ODD) == wanted
        assert f"\n{wanted} & " in text
        assert "$-0.375$" in text or r"$\mathbf{-0.375}$" in text


class TestPage:
    def test_it_stands_alone_and_escapes(self, tmp_path: Path) -> None:
        text = comparison({ODD: [0.5, 0.25], "b": [0.5, 0.3]}).page(tmp_path / "page.html")
        assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
        assert "<b>" not in re.sub(r"<b>[-\d.]+</b>|<b>\w*</b>", "", text)
        assert not re.findall(r"https?:|\bsrc=|\bhref=(?!\"#)|@import|url\(", text)

    def test_it_has_numbers_times_agreement_and_examples(self) -> None:
        found = comparison(VALUES, {"good": (0.01, 10.0), "bad": (2.0, None)})
        text = found.page(examples=[3, 5])
        for heading in ("Scores", "Time", "Agreement", "Side by side"):
            assert f"<h2>{heading}</h2>" in text
        assert "<h2>Curves</h2>" not in text  # no metric of curves
        assert re.findall(r"<h3>(Example \d+)</h3>", text) == ["Example 3", "Example 5"]
        assert f"{GOOD.mean():.3f}" in text
        assert "good costs less than bad from 6 examples on" in text

    def test_examples_that_are_not_there(self) -> None:
        with pytest.raises(SettingError, match="there is no example 99"):
            comparison(VALUES).page(examples=[99])

    def test_agreement_is_that_of_scores(self) -> None:
        found = comparison(VALUES).agreement()
        assert [(one.method, other.method) for one, other, _ in found] == [
            ("good", "as good"),
            ("good", "bad"),
            ("as good", "bad"),
        ]
        assert all(-1 <= tau <= 1 for *_, tau in found)
