"""Readout and Guan: noise that probes predict, and noise that is added."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

import maskhooks
from maskhooks import Guan, Readout, Recipe
from maskhooks.errors import NotFittedError
from maskhooks.model.outputs import squared_error
from tests.masks.test_masking import TOKENS, Tagger
from tests.tiny_runs import categorical, padding
from tests.training.tagger_fits import SITES, batches, wrapped

READOUT = dataclasses.replace(Recipe.named("readout"), steps=150, learning_rate=0.01, warmup_steps=10)


class Marked(nn.Module):
    """Tokens below 3 decide; the others have no effect."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return 4 * (self.head(self.embedding(ids)) * (ids < 3)[..., None]).sum(1)


def states():
    """The tagger with its states marked as hidden."""
    sites = [maskhooks.Site.parse(site, TOKENS, tags=frozenset({"hidden"}), depth=at) for at, site in enumerate(SITES)]
    return maskhooks.wrap(Tagger(), sites=sites, output=categorical, valid=padding)


class TestReadout:
    @pytest.mark.filterwarnings("ignore::maskhooks.errors.BypassedWarning")
    def test_it_learns_where_the_information_is(self):
        torch.manual_seed(0)
        output = {"output": lambda logits: Categorical(logits=logits)}
        hooked = maskhooks.wrap(Marked(), sites={"embedding:output": TOKENS}, **output)
        data = [torch.randint(0, 11, (16, 5), generator=torch.Generator().manual_seed(at)) for at in range(4)]
        readout = Readout(hooked, "embedding:output", beta=0.1, recipe=READOUT)
        with pytest.raises(NotFittedError):
            readout.explain(data[0])
        readout.fit(data[:3], data[3:], progress=False, accelerator="cpu")
        bits = torch.tensor(readout.explain(data[3])["score"]).view(16, 5)
        assert bits[data[3] < 3].mean() > 2 * bits[data[3] >= 3].mean()

    def test_it_reads_all_layers(self):
        assert {str(site) for site in Readout(states(), SITES[1]).reads} == set(SITES)
        assert {str(site) for site in Readout(states(), SITES[1], conditioned_on=SITES[0]).reads} == set(SITES[:2])

    def test_the_last_state_is_kept(self, tmp_path):
        """There is no margin by which an earlier one could be better."""
        made = Readout(states(), SITES[1], beta=1.0, recipe=dataclasses.replace(READOUT, steps=12))
        made.fit(batches(3), batches(1), progress=False, accelerator="cpu", run_dir=tmp_path)
        assert set(made.result.chosen_steps.values()) == {12}
        assert made.within_margin is None
        again = maskhooks.load(tmp_path, states())
        assert again.explain(batches(1)[0]) == made.explain(batches(1)[0])


class TestGuan:
    def test_the_loss_is_least_at_the_noise_it_finds(self):
        """For a linear model, E sum (y - y')^2 = sum_i s_i^2 |w_i|^2, so that s_i^2 = weight / (2 |w_i|^2)."""
        model = nn.Linear(3, 2, bias=False)
        hooked = maskhooks.wrap(
            nn.Sequential(nn.Identity(), model),
            sites={"0:output": "batch feature -> batch feature"},
            output=lambda y: Normal(y, 1.0),
        )
        recipe = dataclasses.replace(Recipe.named("guan"), steps=400, samples=64, logit_init=0.0, decay_fraction=0.5)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[3.0, 0.0, 0.1], [0.0, 1.0, 0.1]]))
        rows = Guan(hooked, "0:output", weight=0.2, recipe=recipe).explain(torch.randn(5, 3))
        wanted = torch.sqrt(2 * (model.weight**2).sum(0) / 0.2)
        torch.testing.assert_close(torch.tensor(rows["score"]).view(5, 3), wanted.expand(5, 3), rtol=0.15, atol=0.05)

    def test_a_probe_predicts_the_noise(self):
        recipe = dataclasses.replace(Recipe.named("guan"), steps=60, warmup_steps=5)
        made = Guan(wrapped(), SITES[1], amortized=True, weight=1e-4, recipe=recipe)
        made.fit(batches(3), batches(1), progress=False, accelerator="cpu")
        rows = made.explain(batches(1)[0])
        assert rows["score"][rows["valid"]].min() > 0
        assert rows["score"][rows["valid"]].std() > 0

    def test_save_and_load(self, tmp_path):
        made = Guan(wrapped(), SITES[1]).fit(batches(3), progress=False)
        batch = batches(1)[0]
        assert maskhooks.load(made.save(tmp_path / "saved"), wrapped()).explain(batch) == made.explain(batch)


def test_squared_errors():
    one, other = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[2.0, 2.0], [0.0, 3.0]])
    classes = squared_error(Categorical(logits=one), Categorical(logits=other))
    assert classes.tolist() == pytest.approx(((one.log_softmax(-1) - other.log_softmax(-1)) ** 2).sum(-1).tolist())
    binary = squared_error(Bernoulli(logits=one[:, 0]), Bernoulli(logits=other[:, 0]))
    assert binary.tolist() == [1.0, 0.0]
    assert squared_error(Normal(one, 2.0), Normal(other, math.e)).tolist() == [1.0, 9.0]
