"""IBA and Schulz: what they are made of, refuse and leave behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

import maskhooks
from maskhooks import IBA, Recipe, Schulz
from maskhooks.errors import GradientError, NotFittedError, SettingError, UnknownDistributionError
from tests.conftest import fingerprint
from tests.masks.test_masking import TOKENS
from tests.training.tagger_fits import SITES, batches, wrapped

QUICK = dataclasses.replace(Recipe.named("iba"), steps=3, samples=2)


def fitted(hooked=None, sites=SITES[1:3], **settings):
    explainer = IBA(wrapped() if hooked is None else hooked, sites, **{"recipe": QUICK, **settings})
    return explainer.fit(batches(3), progress=False)


def test_less_information_at_a_higher_price():
    totals = []
    for beta in (1e-4, 1.0, 100.0):
        recipe = dataclasses.replace(QUICK, steps=40, logit_learning_rate=0.3)
        rows = fitted(beta=beta, recipe=recipe).explain(batches(1)[0])
        totals.append(rows["score"][rows["valid"]].sum())
    assert totals[0] > totals[1] > totals[2] >= 0
    assert totals[2] < 0.1 * totals[0]


def test_the_price_is_that_of_text_or_of_images():
    hooked = wrapped()
    assert IBA(hooked)._make_objective().multiplier.item() == 10
    hooked.task.recipe = "language"
    assert IBA(hooked)._make_objective().multiplier.item() == pytest.approx(1e-5)
    assert Schulz(hooked)._make_objective().multiplier.item() == 10


def test_a_target_is_explained_instead_of_the_prediction():
    batch = batches(1)[0]
    rows = [fitted(target=target).explain(batch)["score"] for target in (None, 0, 1)]
    assert not (rows[1] == rows[2]).all()
    with pytest.raises(
        UnknownDistributionError, match="target=3 is a class, but the outputs, Categorical, have classes 0 to 2"
    ):
        fitted(target=3).explain(batch)


def test_a_model_that_predicts_numbers_needs_another_loss():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    hooked = maskhooks.wrap(
        model, sites={"0:output": "batch unit -> batch unit"}, output=lambda y: Normal(y[:, 0], 1.0)
    )
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(1))]
    with pytest.raises(UnknownDistributionError, match="classes"):
        IBA(hooked, recipe=QUICK).fit(data, progress=False).explain(data[0])
    rows = IBA(hooked, "0:output", divergence="kl", recipe=QUICK).fit(data, progress=False).explain(data[0])
    assert rows["score"].min() > 0


def test_statistics_come_first():
    with pytest.raises(NotFittedError, match="this IBA knows no statistics of the values that its noise replaces yet"):
        IBA(wrapped()).explain(batches(1)[0])
    one = [tuple(part[:1] for part in batches(1)[0])]
    with pytest.raises(SettingError, match="noise statistics of a single example say nothing"):
        IBA(wrapped()).fit(one, progress=False)
    with pytest.raises(SettingError, match=r"statistics='items' is not known\. Give 'data' or"):
        IBA(wrapped(), statistics="items")


def test_statistics_of_each_position():
    """An axis with a size has statistics of its own; it then cannot have padding."""
    ids = torch.cat([ids for ids, _ in batches(3)])
    sized = {"sites": {SITES[1]: f"{TOKENS}, token=6"}, "valid": lambda batch: torch.ones(len(batch[0]))}
    hooked = wrapped(**sized)
    explainer = Schulz(hooked, SITES[1], recipe={"name": "schulz", "steps": 3}).fit(batches(3), progress=False)
    noise = explainer.maskings[0].baseline
    with hooked.tap(read=SITES[1]) as tap:
        hooked((ids, torch.ones_like(ids, dtype=torch.bool)))
    torch.testing.assert_close(noise(), tap.values[SITES[1]].mean(0))
    torch.testing.assert_close(noise.deviation, tap.values[SITES[1]].std(0, unbiased=False).clamp(min=0.01))
    rows = explainer.explain(batches(1)[0])
    assert len(rows["score"]) == 8 * 6
    assert len(set(rows["score"].tolist())) > 8


def test_statistics_of_one_item_need_no_fit():
    hidden = frozenset({"hidden"})
    hooked = wrapped(sites=[maskhooks.Site.parse(one, TOKENS, tags=hidden, depth=at) for at, one in enumerate(SITES)])
    explainer = IBA(hooked, SITES[2], statistics="one-item", recipe=QUICK)
    rows = explainer.explain(batches(1)[0])
    assert rows["score"][rows["valid"]].min() > 100  # the noise is narrow
    assert [str(site) for site in explainer.reads] == [SITES[2], SITES[1]]
    with pytest.raises(SettingError, match="takes the values one layer below embedding:output"):
        IBA(hooked, SITES[0], statistics="one-item")


@pytest.mark.parametrize("kind", [IBA, Schulz])
def test_save_and_load(tmp_path, kind):
    explainer = kind(wrapped(), SITES[1:3], **({"recipe": QUICK} if kind is IBA else {})).fit(
        batches(3), progress=False
    )
    batch = batches(1)[0]
    before = explainer.explain(batch)
    again = maskhooks.load(explainer.save(tmp_path / "saved"), wrapped())
    assert again.explain(batch) == before
    assert before.provenance["score_label"] == explainer.score_label
    assert "margin" not in before.provenance


def test_examples_do_not_depend_on_their_batch():
    explainer = fitted(recipe=dataclasses.replace(QUICK, samples=1))
    ids, valid = batches(1)[0]
    whole, part = explainer.explain((ids, valid)), explainer.explain((ids[:3], valid[:3]))
    first = whole["example"] < 3
    assert abs(whole["score"][first] - part["score"]).max() < 1e-3


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


def test_no_gradient():
    model = nn.Sequential(nn.Linear(4, 8), Rounded(), nn.Linear(8, 3))
    hooked = maskhooks.wrap(
        model, sites={"0:output": "batch feature -> batch feature"}, output=lambda y: Categorical(logits=y)
    )
    with pytest.raises(GradientError, match="0:output: no gradient comes back"):
        IBA(hooked, "0:output").fit([torch.randn(8, 4)], progress=False)


def test_the_model_comes_back():
    hooked = wrapped()
    hooked.model.train()
    explainer = fitted(hooked)
    before = fingerprint(hooked.model)
    explainer.explain(batches(1)[0])
    assert fingerprint(hooked.model) == before
    with pytest.raises(UnknownDistributionError):
        fitted(hooked, target=7).explain(batches(1)[0])
    assert fingerprint(hooked.model) == before


def test_buffers_stay_when_data_of_one_batch_is_looked_at():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    hooked = maskhooks.wrap(
        model, sites={"0:output": "batch unit -> batch unit"}, output=lambda y: Categorical(logits=y)
    )
    before = fingerprint(model)
    IBA(hooked, "0:output", recipe=QUICK).fit(
        [torch.randn(8, 4, generator=torch.Generator().manual_seed(1))], progress=False
    )
    assert fingerprint(model) == before


def test_channels_of_images():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(1), nn.Linear(108, 2)
    )
    hooked = maskhooks.wrap(
        model,
        sites={"1:output": "batch channel row column -> batch row column"},
        output=lambda y: Categorical(logits=y),
    )
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    explainer = IBA(hooked, "1:output", smoothing=1.0, recipe=QUICK).fit([images], progress=False)
    rows = explainer.explain(images)
    assert len(rows["score"]) == 6 * 64
    assert explainer.maskings[0].pattern.gated == ("batch", "row", "column", "channel")
    assert rows["score"].std() > 0
