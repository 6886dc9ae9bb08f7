"""Fits of DiffMask on a small model: what is logged, learned and chosen, and the model as it was."""

from __future__ import annotations

import csv
import dataclasses
import re

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

import maskhooks
from maskhooks import DiffMask, Recipe
from maskhooks.checks.doctor import doctor
from maskhooks.errors import MarginWarning, SettingError
from maskhooks.masks.baselines import Token
from maskhooks.masks.group import by_shared_modules
from maskhooks.training.checkpoint import Checkpoint
from maskhooks.training.pace import Pace
from tests.conftest import fingerprint as state
from tests.masks.test_masking import TOKENS
from tests.training.tagger_fits import QUICK, SITES, batches, fitted, wrapped


class TestFit:
    def test_the_model_comes_back(self, hooked):
        for weight in list(hooked.model.parameters())[::2]:
            weight.requires_grad_(False)
        hooked.model.train()
        before = state(hooked.model)
        explainer = fitted(hooked)
        explainer.explain(batches(1)[0])
        explainer.evaluate(batches(1), progress=False)
        doctor(hooked, batches(1)[0])
        assert state(hooked.model) == before

    def test_the_model_comes_back_when_it_raises(self, hooked):
        def broken(batch, calls=[0]):  # noqa: B006 # counts the calls
            calls[0] += 1
            if calls[0] > 20:
                raise RuntimeError("on demand")
            return batch[1]

        hooked = wrapped(hooked.model, valid=broken)
        before = state(hooked.model)
        with pytest.raises(RuntimeError, match="on demand"):
            fitted(hooked)
        assert state(hooked.model) == before

    @pytest.mark.parametrize("length", [{"steps": 4}, {"budget": "1h"}])
    def test_a_loader_that_does_not_know_its_length(self, hooked, monkeypatch, length):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(batches())

        loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
        monkeypatch.setattr(Pace, "progress", lambda pace, done: done / 4)
        recipe = dataclasses.replace(QUICK, warm_start_batches=2)
        explainer = DiffMask(hooked, SITES[1], margin=5.0, recipe=recipe)
        explainer.fit(loader, loader, accelerator="cpu", **length)
        assert len(explainer.result.log) == 4
        assert len(explainer.evaluate(loader)) == 1

    @pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
    def test_it_masks_more_when_more_may_be_lost(self, hooked):
        loose, tight = (fitted(hooked, margin=margin, steps=150) for margin in (2.0, 0.0005))
        kept = [explainer.explain(batches(1)[0]).select().mean_kept() for explainer in (loose, tight)]
        (less,), (more,) = (list(means.values()) for means in kept)
        assert less < 0.05 < 0.15 < more

    def test_the_same_seed_gives_the_same_masks(self, hooked):
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True))),
            batch_size=8,
            shuffle=True,
        )
        found = []
        for seed in (0, 0, 1):
            explainer = DiffMask(hooked, SITES[2], margin=1.0, recipe=QUICK, seed=seed)
            explainer.fit(loader, progress=False, accelerator="cpu")
            found.append(explainer.explain(batches(1)[0])["score"].tolist())
        assert found[0] == found[1] != found[2]

    def test_logs(self, hooked, tmp_path):
        explainer = fitted(hooked, SITES[1:3], run_dir=tmp_path)
        rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
        assert len(rows) == len(explainer.result.log) == 60
        assert set(rows[0]) >= {
            "step",
            "site",
            "depth",
            "multiplier",
            "divergence",
            "expected_l0",
            "agreement",
        }
        assert {row["site"] for row in rows} == set(SITES[1:3])
        assert float(rows[7]["divergence"]) == pytest.approx(explainer.result.log[7]["divergence"])
        checks = list(csv.DictReader((tmp_path / "validation.csv").read_text().splitlines()))
        assert {row["site"] for row in checks} == set(SITES[1:3])
        assert explainer.within_margin is True
        assert explainer.result.stop_reason == "all 60 steps were done"

    def test_epochs(self, hooked):
        explainer = DiffMask(hooked, SITES[1], recipe=QUICK)
        explainer.fit(batches(), epochs=4, progress=False, accelerator="cpu")
        assert len(explainer.result.log) == 12
        with pytest.raises(SettingError, match="steps instead"):
            explainer.fit((b for b in batches()), epochs=1)

    def test_early_stop(self, hooked):
        recipe = dataclasses.replace(QUICK, patience=1, validations=30, learning_rate=0.0, baseline_learning_rate=0.0)
        explainer = fitted(hooked, recipe=recipe, steps=300)
        assert len(explainer.result.log) < 300
        assert "no better checkpoint" in explainer.result.stop_reason

    @pytest.mark.usefixtures("early_progress")
    def test_progress_on_stderr(self, hooked, capfd):
        DiffMask(hooked, SITES[1], recipe=QUICK).fit(batches(), progress=True, accelerator="cpu")
        out, err = capfd.readouterr()
        assert not out
        assert re.search(r"^training: 1 of .* elapsed, about .* left, divergence \d\.\d{3} kept \d\.\d\d$", err, re.M)

    def test_no_checkpoint_within_the_margin(self, hooked):
        recipe = dataclasses.replace(QUICK, learning_rate=0.0, baseline_learning_rate=0.0)
        with pytest.warns(MarginWarning, match=r"layers\.1:output.*closest"):
            explainer = fitted(hooked, margin=1e-9, recipe=recipe)
        assert explainer.within_margin is False

    def test_the_papers_recipe_runs(self, hooked):
        explainer = fitted(
            hooked, recipe=dataclasses.replace(Recipe.named("paper"), steps=20, warmup_steps=2, validations=2)
        )
        assert len(explainer.result.log) == 20
        assert explainer.explain(batches(1)[0])["score"].min() > 0

    def test_a_price_keeps_the_multiplier_up(self, hooked):
        recipe = dataclasses.replace(Recipe.named("language"), steps=30, warmup_steps=2, validations=2)
        cheap, dear = (
            fitted(hooked, recipe=dataclasses.replace(recipe, l0_price=l0_price), margin=5.0) for l0_price in (0.0, 0.9)
        )
        assert all(row["multiplier"] > 0.89 for row in dear.result.log)
        assert min(row["multiplier"] for row in cheap.result.log) < 0.89

    def test_masks_that_share_votes_join_one_after_another(self, hooked):
        recipe = dataclasses.replace(QUICK, layer_warmup=0.6, baseline_steps=0)
        together = DiffMask(hooked, SITES[0], conditioned_on=SITES[1:], margin=5.0, recipe=recipe)
        together.fit(batches(), steps=100, progress=False)
        first = {depth: next(r["step"] for r in together.result.log if r["depth"] == depth) for depth in (1, 2, 3)}
        assert first[1] == 0
        assert 20 <= first[2] < 40 <= first[3] < 60
        alone = DiffMask(hooked, SITES[1:], margin=5.0, recipe=recipe).fit(batches(), steps=20, progress=False)
        assert {row["site"] for row in alone.result.log} == set(SITES[1:])

    def test_several_maskings_a_step_from_one_clean_pass(self, hooked):
        runs = []
        handle = hooked.model.embedding.register_forward_hook(lambda *_: runs.append(1))
        counts, recipe = [], dataclasses.replace(QUICK, statistics_batches=1)
        for maskings_per_step, steps in ((1, 20), (2, 10)):
            runs.clear()
            explainer = DiffMask(
                hooked, SITES[2:], recipe=dataclasses.replace(recipe, maskings_per_step=maskings_per_step)
            )
            explainer.fit(batches(), steps=steps, progress=False, cache=None)
            counts.append(len(runs))
        handle.remove()
        assert counts[0] - counts[1] == 10  # as many masked passes, half of the clean ones
        assert len(explainer.result.log) == 20
        assert {row["site"] for row in explainer.result.log if row["step"] == 0} == set(SITES[2:])
        explainer.fit(batches(), progress=False)
        assert explainer.result.log[-1]["step"] == QUICK.steps - 1

    def test_all_maskings_a_step(self, hooked):
        recipe = dataclasses.replace(QUICK, maskings_per_step=None)
        explainer = DiffMask(hooked, SITES, recipe=recipe).fit(batches(), progress=False)
        assert len(explainer.result.log) == QUICK.steps * len(SITES)
        assert {row["site"] for row in explainer.result.log if row["step"] == 0} == set(SITES)

    def test_a_step_has_a_masking(self):
        with pytest.raises(SettingError, match="maskings_per_step"):
            dataclasses.replace(QUICK, maskings_per_step=0)

    def test_inputs_given_states(self, hooked):
        explainer = fitted(hooked, SITES[0], conditioned_on=SITES[:3])
        found = explainer.explain(batches(1)[0])
        assert list(found.mean_kept()) == [(SITES[0], 0), (SITES[0], 1), (SITES[0], 2)]
        by_depth = [found.select(depth=depth)["score"] for depth in range(3)]
        assert bool((by_depth[0] >= by_depth[1]).all() and (by_depth[1] >= by_depth[2]).all())
        assert len(by_shared_modules(explainer.groups)) == 1

    def test_votes_of_each_depth_alone(self, hooked, tmp_path):
        explainer = fitted(hooked, SITES[0], conditioned_on=SITES[:3], cumulative=False)
        assert [len(masking.votes) for masking in explainer.maskings] == [1, 1, 1]
        assert len(by_shared_modules(explainer.groups)) == 3
        found = explainer.explain(batches(1)[0])
        assert list(found.mean_kept()) == [(SITES[0], 0), (SITES[0], 1), (SITES[0], 2)]
        explainer.save(tmp_path)
        assert maskhooks.load(tmp_path, hooked).explain(batches(1)[0]) == found

    @pytest.mark.parametrize("product", [True, False])
    def test_states_of_one_depth_are_read_together(self, product):
        sites = [maskhooks.Site.parse(name, TOKENS, depth=min(i, 2)) for i, name in enumerate(SITES)]
        explainer = fitted(wrapped(sites=sites), SITES[0], conditioned_on=SITES[1:], cumulative=product)
        assert [masking.depth for masking in explainer.maskings] == [1, 2]
        assert [str(site) for site in explainer.maskings[1].votes[-1].reads] == [SITES[0], *SITES[2:]]
        assert list(explainer.explain(batches(1)[0]).mean_kept()) == [(SITES[0], 1), (SITES[0], 2)]

    def test_input_by_tag(self):
        sites = [
            maskhooks.Site.parse(name, TOKENS, tags=frozenset({"hidden"} | ({"input"} if not i else set())))
            for i, name in enumerate(SITES)
        ]
        explainer = DiffMask(wrapped(sites=sites), "input", recipe=QUICK)
        assert [masking.depth for masking in explainer.maskings] == [0, 1, 2, 3]
        assert {str(masking.site) for masking in explainer.maskings} == {SITES[0]}

    def test_hidden_states_are_chosen_each_by_itself(self, hooked):
        explainer = fitted(hooked, "hidden")
        assert len(by_shared_modules(explainer.groups)) == 4
        assert len(explainer.result.chosen_steps) == 4

    @pytest.mark.parametrize("baseline", ["learned", "zero", "mean"])
    @pytest.mark.parametrize("gate", ["hard-concrete", "hard-concrete-louizos", "bernoulli"])
    def test_gates_and_baselines(self, hooked, gate, baseline):
        recipe = dataclasses.replace(QUICK, steps=5)
        explainer = fitted(hooked, gate=gate, baseline=baseline, recipe=recipe)
        assert len(explainer.explain(batches(1)[0])) == 48

    def test_token_baseline(self, hooked):
        token = hooked.model.embedding.weight[3]
        explainer = fitted(hooked, SITES[0], baseline=Token(token))
        assert torch.equal(explainer.maskings[0].baseline(), token.detach())

    @pytest.mark.parametrize(
        "distribution",
        [
            lambda o: Bernoulli(logits=o),
            lambda o: Normal(o, 1.0),
            lambda o: {"first": Categorical(logits=o), "second": Bernoulli(logits=o[:, 0])},
        ],
    )
    def test_distributions(self, distribution):
        explainer = fitted(wrapped(output=distribution))
        assert explainer.result.log[-1]["divergence"] >= 0

    def test_a_divergence_of_ones_own(self, hooked):
        def total_variation(original, masked):
            return (original.probs - masked.probs).abs().sum(-1) / 2

        explainer = fitted(hooked, divergence=total_variation)
        assert all(0 <= row["divergence"] <= 1 for row in explainer.result.log)


def test_padding_is_never_kept(hooked):
    found = fitted(hooked).explain(batches(1)[0])
    assert not found["kept"][~found["valid"]].any()
    assert found["kept"][found["valid"]].any()


def test_the_sparsest_checkpoint_within_the_margin(hooked):
    explainer = fitted(hooked)
    checkpoint = Checkpoint(explainer.groups, margin=0.1)
    rows = [(0.30, 0.1), (0.09, 0.8), (0.08, 0.5), (0.05, 0.6), (0.11, 0.0)]
    better = [checkpoint.compare(i, [{"divergence": d, "expected_l0": k}]) for i, (d, k) in enumerate(rows)]
    assert better == [True, True, True, False, False]
    assert checkpoint.step == 2
    assert checkpoint.within


def test_a_fit_begins_anew(hooked):
    explainer = fitted(hooked)
    once = explainer.explain(batches(1)[0])
    explainer.fit(batches(), batches(1), progress=False, accelerator="cpu")
    assert explainer.explain(batches(1)[0]) == once


def test_shuffling_loaders_leave_the_global_random_state(hooked):
    data = torch.utils.data.TensorDataset(*batches(1, size=16)[0])
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    before = torch.get_rng_state()
    DiffMask(hooked, SITES[1], recipe=QUICK).fit(loader, loader, progress=False, accelerator="cpu")
    assert torch.equal(before, torch.get_rng_state())
