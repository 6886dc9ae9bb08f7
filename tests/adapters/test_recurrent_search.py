"""Exact search on recurrent networks: the tree of states finds what running every set finds, or is not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from maskhooks_recurrent.adapter import RecurrentAdapter
from maskhooks_recurrent.recurrence import Recurrent
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import maskhooks
from maskhooks.errors import MaskhooksWarning, ResumeError, SearchLimitError, SearchLimitWarning
from maskhooks.explainers.erasure import Erasure
from maskhooks.masks.baselines import Zero
from maskhooks.model.outputs import kl
from maskhooks.passes.clean import clean_pass
from maskhooks.search.exact import SearchResult
from maskhooks.search.repeated import Repeated
from maskhooks.search.shared import tree
from maskhooks.search.tree import Tree
from tests.conftest import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

LENGTHS = torch.tensor([4, 6])
KINDS: dict[str, Any] = {
    "gru": lambda: nn.GRU(5, 8, batch_first=True),
    "gru without bias": lambda: nn.GRU(5, 8, batch_first=True, bias=False),
    "two layers": lambda: nn.GRU(5, 8, 2, batch_first=True, dropout=0.5),
    "lstm": lambda: nn.LSTM(5, 8, batch_first=True),
    "lstm of two layers": lambda: nn.LSTM(5, 8, 2, batch_first=True),
    "projected": lambda: nn.LSTM(5, 11, batch_first=True, proj_size=8),
    "relu": lambda: nn.RNN(5, 8, batch_first=True, nonlinearity="relu"),
    "token first": lambda: nn.GRU(5, 8),
}
ENDS = {
    "last state": lambda output, h, lengths: h,
    "last output": lambda output, h, lengths: output[torch.arange(len(output)), lengths - 1],
}


class Reader(nn.Module):
    """Words, a module between, a recurrent one, and dense layers on what `end` takes of its states."""

    def __init__(self, rnn: nn.RNNBase, end: Any = ENDS["last state"], packed: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.between = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.rnn = rnn
        self.head = nn.Sequential(nn.Linear(8 * (1 + rnn.bidirectional), 8), nn.ReLU(), nn.Linear(8, 3))
        self.end, self.packed = end, packed

    def forward(self, ids: Tensor, lengths: Tensor) -> Categorical:
        x = self.between(3 * self.embed(ids))
        first = self.rnn.batch_first
        x = x if first else x.transpose(0, 1)
        if self.packed:
            output, states = self.rnn(pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False))
            output = pad_packed_sequence(output, batch_first=True)[0]
        else:
            output, states = self.rnn(x)
            output = output if first else output.transpose(0, 1)
        h = states[0] if isinstance(states, tuple) else states
        last = torch.cat([h[-2], h[-1]], -1) if self.rnn.bidirectional else h[-1]
        return Categorical(logits=4 * self.head(self.end(output, last, lengths)))


def hooked_of(model: Reader) -> maskhooks.Hooked:
    def valid(batch: Any) -> Tensor:
        return torch.arange(6) < batch[1][:, None]

    return maskhooks.wrap(
        model, sites={"embed:output": "batch token hidden -> batch token"}, adapter=RecurrentAdapter, valid=valid
    )


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(20, (2, 6)), LENGTHS


def both(
    hooked: maskhooks.Hooked, batch: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> list[list[SearchResult]]:
    """What is found with shared beginnings, and without."""
    erasure = Erasure(hooked, "embed:output", **settings)
    found = [erasure.search(batch, progress=False)]
    with monkeypatch.context() as patch:
        patch.setattr(RecurrentAdapter, "recurrence", lambda *_: None)
        found.append(erasure.search(batch, progress=False))
    return found


def used(hooked: maskhooks.Hooked, batch: Any, example: int = 0) -> Tree | None:
    site = hooked.sites["embed:output"]
    clean = clean_pass(hooked, batch, [site])
    with tree(Repeated(clean, site, example, Zero()), lambda one, other: kl(one, other) < 1) as found:
        return found


def test_packed_inputs_may_be_shorter_than_the_mask_of_their_batch() -> None:
    model = Reader(nn.GRU(5, 8, 2, batch_first=True, bidirectional=True))
    hooked = maskhooks.wrap(model, valid=lambda batch: torch.arange(6) < batch[1][:, None])
    words = torch.randint(20, (3, 6)), torch.tensor([4, 5, 2])
    assert [found.positions for found in Erasure(hooked, "rnn.inputs:output").search(words, progress=False)] == [
        4,
        5,
        2,
    ]
    for kind in (maskhooks.Beam, maskhooks.LeaveOneOut, maskhooks.Erasure):
        rows = kind(hooked, "rnn.inputs:output").explain(words).select(valid=True)
        assert [int((rows["example"] == number).sum()) for number in range(3)] == [4, 5, 2]


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_finds_what_all_sets_find(kind: str, end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for packed in (True, False):
        model = Reader(KINDS[kind](), end, packed)
        hooked, words = hooked_of(model), batch()
        assert used(hooked, words) is not None
        before = fingerprint(model)
        for settings in ({"margin": 0.05}, {"margin": 0.002, "memory_limit": 2e9 if packed else 1.0}):
            one, other = both(hooked, words, monkeypatch, **settings)
            assert [found.solutions for found in one] == [found.solutions for found in other]
            assert [found.tried for found in one] == [found.tried for found in other]
        assert fingerprint(model) == before
        assert "forward" not in vars(model.rnn)


OTHER = {
    "pooled": (nn.GRU(5, 8, batch_first=True), lambda output, h, lengths: output.mean(1)),
    "largest": (nn.GRU(5, 8, batch_first=True), lambda output, h, lengths: output.amax(1)),
    "first": (nn.GRU(5, 8, batch_first=True), lambda output, h, lengths: h + output[:, 0]),
    "two ways": (nn.GRU(5, 8, batch_first=True, bidirectional=True), ENDS["last state"]),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_is_no_recurrence_to_a_last_state_runs_set_by_set(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rnn, end = OTHER[what]
    hooked, words = hooked_of(Reader(rnn, end, packed=False)), batch()
    assert used(hooked, words) is None
    one, other = both(hooked, words, monkeypatch, margin=0.01)
    assert [found.solutions for found in one] == [found.solutions for found in other]


def test_a_model_that_fails_on_final_states_alone_runs_set_by_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def moving(output: Tensor, h: Tensor, lengths: Tensor) -> Tensor:
        if torch.equal(output[:, 0], output[:, -1]):
            raise ValueError("nothing moves")
        return h

    hooked, words = hooked_of(Reader(nn.GRU(5, 8, batch_first=True), moving, packed=False)), batch()
    before = fingerprint(hooked.model)
    with pytest.warns(
        MaskhooksWarning, match=r"at embed:output .*\(ValueError: nothing moves\). The results are the same"
    ):
        one, other = both(hooked, words, monkeypatch, margin=1e-6)
    assert [found.solutions for found in one] == [found.solutions for found in other]
    assert fingerprint(hooked.model) == before


@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_a_mistake_in_code_is_not_taken_for_a_model_without_a_recurrence(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*args: Any) -> Any:
        raise error("mistaken")

    hooked, words = hooked_of(Reader(nn.GRU(5, 8, batch_first=True))), batch()
    before = fingerprint(hooked.model)
    monkeypatch.setattr(Recurrent, "answering", mistaken)
    with pytest.raises(error, match="mistaken"):
        used(hooked, words)
    assert fingerprint(hooked.model) == before


def test_the_model_is_put_back_when_it_raises() -> None:
    class Limited(Reader):
        left = 10**9

        def forward(self, ids: Tensor, lengths: Tensor) -> Categorical:
            Limited.left -= 1
            if not Limited.left:
                raise ZeroDivisionError
            return super().forward(ids, lengths)

    model = Limited(nn.GRU(5, 8, batch_first=True))
    hooked, words = hooked_of(model), batch()
    erasure, before = Erasure(hooked, "embed:output", margin=1e-9), fingerprint(model)
    erasure.search(words, progress=False)
    Limited.left = 10**9
    erasure.search(words, progress=False)
    passes = 10**9 - Limited.left
    for stop in range(1, passes, max(1, passes // 9)):
        Limited.left = stop
        with pytest.raises(ZeroDivisionError):
            erasure.search(words, progress=False)
        assert Limited.left <= 0
        assert fingerprint(model) == before
        assert "forward" not in vars(model.rnn)


def test_a_stopped_search_goes_on_from_a_file(tmp_path: Path) -> None:
    hooked, words = hooked_of(Reader(nn.GRU(5, 8, batch_first=True))), batch()
    state = tmp_path / "deep" / "state.json"
    wanted = Erasure(hooked, "embed:output", margin=1e-9).search(words, progress=False)
    with pytest.warns(SearchLimitWarning, match="stopped by max_sets"):
        found = Erasure(hooked, "embed:output", margin=1e-9, max_sets=20).search(words, state=state, progress=False)
    assert all(one.stopped == "max_sets" for one in found if not one.solutions)
    tried = [search["tried"] for search in json.loads(state.read_text())["searches"]]
    found = Erasure(hooked, "embed:output", margin=1e-9).search(words, state=state, progress=False)
    assert [(one.solutions, one.tried) for one in found] == [(one.solutions, one.tried) for one in wanted]
    assert any(0 < one < other.tried for one, other in zip(tried, wanted, strict=True))
    with pytest.raises(ResumeError, match="margin differ"):
        Erasure(hooked, "embed:output", margin=1e-8).search(words, state=state, progress=False)
    with pytest.raises(ResumeError, match="values differ"):
        Erasure(hooked, "embed:output", margin=1e-9).search(batch(), state=state, progress=False)


def test_a_length_over_the_limit_says_how_long_it_would_take() -> None:
    model = Reader(nn.GRU(5, 8, batch_first=True))
    hooked = maskhooks.wrap(
        model, sites={"embed:output": "batch token hidden -> batch token"}, adapter=RecurrentAdapter
    )
    words = torch.randint(20, (1, 40)), torch.tensor([40])
    with pytest.raises(SearchLimitError, match=f"all {2**40:,} sets take .* (h|d|y) at "):
        Erasure(hooked, "embed:output").search(words, progress=False)
    erasure = Erasure(hooked, "embed:output", max_positions=40, max_set_size=2, margin=1e-9)
    with pytest.warns(SearchLimitWarning, match="stopped by max_set_size"):
        explanation = erasure.explain(words)
    assert explanation["kept"].all()
    assert "no 2 of 40 positions are enough" in explanation.metadata[0]["search"]
