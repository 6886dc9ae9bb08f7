"""`maskhooks fit` and `maskhooks explain` on a graph network by `package.module:factory`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

pytest.importorskip("torch_geometric")

from maskhooks.explanations.explanation import Explanation

Run = Callable[..., Result]

NETWORK = """
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, global_mean_pool
from torch_geometric.utils import to_undirected


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = GCNConv(3, 8), GCNConv(8, 8), nn.Linear(8, 2)

    def forward(self, x, edge_index, batch=None):
        x = self.first(x, edge_index).relu()
        return self.last(global_mean_pool(self.second(x, edge_index).relu(), batch))


def make():
    torch.manual_seed(0)
    graphs = [
        Data(x=torch.randn(n, 3), edge_index=to_undirected(torch.randint(0, n, (2, 2 * n))), y=torch.tensor([n % 2]))
        for n in range(3, 11)
    ]
    return Net(), DataLoader(graphs, batch_size=4), DataLoader(graphs[:3], batch_size=3)
"""


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    name = f"graphs_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETWORK)
    return f"{name}:make"


@pytest.mark.parametrize("explainer", ["diffmask", "graphmask"])
def test_a_graph_network_from_its_batches_to_page(explainer: str, run: Run, graphs: str, tmp_path: Path) -> None:
    sites = ["--sites", "message"] if explainer == "diffmask" else []
    fitted = run("fit", graphs, "--out", "run", "--steps", 6, "--explainer", explainer, *sites)
    assert fitted.exit_code == 0, fitted.stderr
    saved = json.loads((tmp_path / "run" / "explainer.json").read_text())
    assert [site["address"] for site in saved["settings"]["sites"]] == ["first.message:output", "second.message:output"]
    explained = run("explain", "run", graphs, "--out", "explained")
    assert explained.exit_code == 0, explained.stderr
    rows = Explanation.from_parquet(tmp_path / "explained" / "explanation.parquet")
    assert {"source", "target", "edge"} <= rows.columns.keys()
    assert sorted(set(rows["example"].tolist())) == [0, 1, 2]
    assert (tmp_path / "explained" / "explanation.html").exists()


def test_both_directions_of_an_edge_together(run: Run, graphs: str, tmp_path: Path) -> None:
    given = [graphs, "--units", "undirected"]
    fitted = run("fit", *given, "--out", "run", "--steps", 2, "--explainer", "graphmask")
    assert fitted.exit_code == 0, fitted.stderr
    for told in (["run", graphs], ["random", *given, "--set", "sites=message"]):
        explained = run("explain", *told, "--out", told[0] + "-out", "--plots", 0)
        assert explained.exit_code == 0, explained.stderr
        rows = Explanation.from_parquet(tmp_path / f"{told[0]}-out" / "explanation.parquet").select(example=2)
        first = rows["site"] == rows["site"][0]
        sent = zip(*(rows[name][first].tolist() for name in ("source", "target", "score")), strict=True)
        scores = {(source, target): score for source, target, score in sent}
        between = {pair for pair in scores if pair[0] < pair[1]}
        assert between
        assert all(scores[pair] == scores[pair[::-1]] for pair in between)
        assert len({scores[pair] for pair in between}) == len(between)


@pytest.mark.parametrize("name", ["leave-one-out", "erasure", "beam"])
def test_what_learns_nothing(name: str, run: Run, graphs: str, tmp_path: Path) -> None:
    given = ["explain", name, graphs, "--out", "out", "--units", "undirected", "--plots", 1, "--set", "sites=edge"]
    explained = run(*given)
    assert explained.exit_code == 0, explained.stderr
    rows = Explanation.from_parquet(tmp_path / "out" / "explanation.parquet")
    assert rows.provenance["explainer"] == name
    assert rows.sites == ("edge:output",)
    assert sorted(set(rows["example"].tolist())) == [0, 1, 2]
    assert ("search" in rows.metadata[0]) == (name == "erasure")
    assert (tmp_path / "out" / "example-0.png").exists()


def test_a_graph_of_too_many_edges(run: Run, graphs: str) -> None:
    explained = run("explain", "erasure", graphs, "--out", "out", "--set", "sites=edge", "--set", "max_positions=3")
    assert explained.exit_code == 2
    assert re.search(r"example 0 at edge:output has \d+ positions, more than max_positions=3", explained.stderr)


def test_sites_and_doctor_of_a_graph_network(run: Run, graphs: str) -> None:
    listed = run("sites", graphs)
    assert re.search(r"first\.message:output +edge feature -> edge +message +0 +\[\d+, 8\]", listed.stdout)
    examined = run("doctor", graphs)
    assert examined.exit_code == 0, examined.stdout


def test_an_explainer_that_is_not_trained(run: Run, graphs: str) -> None:
    result = run("fit", graphs, "--out", "run", "--explainer", "random")
    assert result.exit_code == 2
    assert "--explainer random needs no training. Give one of diffmask, graphmask" in " ".join(result.stderr.split())
