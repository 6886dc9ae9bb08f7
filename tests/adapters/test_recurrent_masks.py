"""Masks on the states of a trained GRU: fitted, replayed, and seen by the doctor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from maskhooks_recurrent.adapter import RecurrentAdapter
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import maskhooks
from maskhooks.errors import BatchError
from maskhooks.hooks.replay import Replay
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.masked import onward_pass

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Classifier(nn.Module):
    """Is the largest token above 7?"""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.rnn = nn.GRU(8, 12, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        return torch.distributions.Categorical(logits=self.head(self.rnn(packed)[1][-1]))


def draw(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(10, (count, 6)), torch.randint(2, 7, (count,))


def valid(batch: Any) -> Tensor:
    return torch.arange(6)[None, : int(batch[1].max())] < batch[1][:, None]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(1)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        ids, lengths = draw(64)
        there = torch.arange(6) < lengths[:, None]
        labels = (torch.where(there, ids, 0) > 7).any(1).long()
        optimizer.zero_grad()
        (-model(ids, lengths).log_prob(labels).mean()).backward()
        optimizer.step()
    return model


def test_diffmask_learns_to_drop_states_of_a_gru(classifier: Classifier) -> None:
    hooked = maskhooks.wrap(classifier, adapter=RecurrentAdapter, valid=valid)
    batches = [draw(32) for _ in range(4)]
    kept = []
    for steps in (1, 80):
        explainer = maskhooks.DiffMask(hooked, "rnn.h_l0:output", margin=0.3)
        explainer.fit(batches, steps=steps, progress=False, accelerator="cpu")
        (row,) = [row for row in explainer.evaluate(batches) if row["site"] == "rnn.h_l0:output"]
        kept.append(row["expected_l0"])
    assert kept[1] < kept[0] - 0.2
    assert ("rnn.h_l0:output", 1) in explainer.explain(batches[0]).mean_kept()


def test_an_empty_sequence_is_named_where_masks_are_optimised(classifier: Classifier) -> None:
    hooked = maskhooks.wrap(classifier, adapter=RecurrentAdapter, valid=valid)
    explainer = maskhooks.DiffMask(hooked, "rnn.h_l0:output", amortized=False)
    with pytest.raises(BatchError, match="a sequence in the batch is empty"):
        explainer.explain((draw(3)[0], torch.tensor([6, 0, 2])))


def test_replay_skips_what_comes_before_the_module(classifier: Classifier) -> None:
    hooked = maskhooks.wrap(classifier, adapter=RecurrentAdapter, valid=valid)
    site, batch, replay = hooked.sites["rnn.h_l0:output"], draw(4), Replay(classifier)
    clean = clean_pass(hooked, batch, [site], [site], replay)
    assert replay._skippable(site) == [classifier.embed]
    onward = onward_pass(clean, {site: torch.clone})
    torch.testing.assert_close(onward.logits, clean.outputs.logits, rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]


def test_doctor_of_a_gru(classifier: Classifier) -> None:
    def perturb(batch: Any, generator: torch.Generator) -> Any:
        return torch.randint(10, batch[0].shape, generator=generator), batch[1]

    hooked = maskhooks.wrap(classifier, adapter=RecurrentAdapter, valid=valid, perturb=perturb)
    report = maskhooks.doctor(hooked, draw(8))
    assert report.healthy, str(report)
    assert [finding.bypassed for finding in report.findings] == [False, False]
