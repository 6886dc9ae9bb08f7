"""Training, DiffMask, storage and doctor, end to end on a small model."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

import maskhooks
from maskhooks import DiffMask, Random, Recipe
from maskhooks.checks.doctor import bypassed, examine
from maskhooks.errors import (
    BatchError,
    BypassedWarning,
    CorruptFileError,
    EmptyLoaderError,
    FingerprintError,
    FingerprintWarning,
    MarginWarning,
    MaskhooksError,
    NonFiniteError,
    NotATensorError,
    NotFittedError,
    PatternError,
    SettingError,
    UnknownDistributionError,
    UnknownNameError,
    UnknownSiteError,
)
from maskhooks.masks.baselines import Token
from maskhooks.model.fingerprint import differences, fingerprint
from maskhooks.seeds import generator
from maskhooks.training.checkpoint import Checkpoint, by_shared_modules
from tests.conftest import fingerprint as state
from tests.masks.test_masking import TOKENS, Tagger

QUICK = dataclasses.replace(Recipe(), steps=30, baseline_steps=5, warmup=5, validations=3)
SITES = ["embedding:output", "layers.0:output", "layers.1:output", "layers.2:output"]


def output(logits):
    return Categorical(logits=3 * logits)


def batches(count=3, size=8):
    source = generator(5)
    length = torch.randint(2, 7, (count, size, 1), generator=source)
    return [(torch.randint(0, 11, (size, 6), generator=source), torch.arange(6) < length[i]) for i in range(count)]


def wrapped(model=None, **settings):
    model = Tagger() if model is None else model
    given = {"sites": dict.fromkeys(SITES, TOKENS), "output": output, "real": lambda b: b[1], **settings}
    return maskhooks.wrap(model, **given)


@pytest.fixture
def hooked():
    return wrapped()


def fitted(hooked, sites="layers.1:output", **settings):
    fit = {key: settings.pop(key) for key in ("steps", "run_dir") if key in settings}
    explainer = DiffMask(hooked, sites, **{"margin": 5.0, "recipe": QUICK, **settings})
    return explainer.fit(batches(), batches(1), progress=False, accelerator="cpu", **fit)


class TestFit:
    def test_the_model_comes_back(self, hooked):
        for weight in list(hooked.model.parameters())[::2]:
            weight.requires_grad_(False)
        hooked.model.train()
        before = state(hooked.model)
        explainer = fitted(hooked)
        explainer.explain(batches(1)[0])
        explainer.evaluate(batches(1), progress=False)
        examine(hooked, batches(1)[0])
        assert state(hooked.model) == before

    def test_the_model_comes_back_when_it_raises(self, hooked):
        def broken(batch, calls=[0]):  # noqa: B006 # counts the calls
            calls[0] += 1
            if calls[0] > 20:
                raise RuntimeError("on demand")
            return batch[1]

        hooked = wrapped(hooked.model, real=broken)
        before = state(hooked.model)
        with pytest.raises(RuntimeError, match="on demand"):
            fitted(hooked)
        assert state(hooked.model) == before

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
        assert explainer.result.stopped == "all 60 steps were made"

    def test_epochs(self, hooked):
        explainer = DiffMask(hooked, SITES[1], recipe=QUICK)
        explainer.fit(batches(), epochs=4, progress=False, accelerator="cpu")
        assert len(explainer.result.log) == 12
        with pytest.raises(SettingError, match="steps instead"):
            explainer.fit((b for b in batches()), epochs=1)

    def test_early_stop(self, hooked):
        recipe = dataclasses.replace(QUICK, patience=1, validations=30, learning_rate=0.0, baseline_rate=0.0)
        explainer = fitted(hooked, recipe=recipe, steps=300)
        assert len(explainer.result.log) < 300
        assert "no better checkpoint" in explainer.result.stopped

    def test_a_progress_bar_on_stderr(self, hooked, capfd):
        DiffMask(hooked, SITES[1], recipe=QUICK).fit(batches(), progress=True, accelerator="cpu")
        out, err = capfd.readouterr()
        assert not out
        assert "training" in err
        assert "divergence" in err

    def test_no_checkpoint_within_the_margin(self, hooked):
        recipe = dataclasses.replace(QUICK, learning_rate=0.0, baseline_rate=0.0)
        with pytest.warns(MarginWarning, match=r"layers\.1:output.*nearest"):
            explainer = fitted(hooked, margin=1e-9, recipe=recipe)
        assert explainer.within_margin is False

    def test_the_papers_recipe_runs(self, hooked):
        explainer = fitted(hooked, recipe=dataclasses.replace(Recipe.named("paper"), steps=20, warmup=2, validations=2))
        assert len(explainer.result.log) == 20
        assert explainer.explain(batches(1)[0])["score"].min() > 0

    def test_a_price_keeps_the_multiplier_up(self, hooked):
        recipe = dataclasses.replace(Recipe.named("language"), steps=30, warmup=2, validations=2)
        cheap, dear = (
            fitted(hooked, recipe=dataclasses.replace(recipe, price=price), margin=5.0) for price in (0.0, 0.9)
        )
        assert all(row["multiplier"] > 0.89 for row in dear.result.log)
        assert min(row["multiplier"] for row in cheap.result.log) < 0.89

    def test_masks_that_share_votes_join_one_after_another(self, hooked):
        recipe = dataclasses.replace(QUICK, stagger=0.6, baseline_steps=0)
        together = DiffMask(hooked, SITES[0], given=SITES[1:], margin=5.0, recipe=recipe)
        together.fit(batches(), steps=100, progress=False)
        first = {depth: next(r["step"] for r in together.result.log if r["depth"] == depth) for depth in (1, 2, 3)}
        assert first[1] == 0
        assert 20 <= first[2] < 40 <= first[3] < 60
        alone = DiffMask(hooked, SITES[1:], margin=5.0, recipe=recipe).fit(batches(), steps=20, progress=False)
        assert {row["site"] for row in alone.result.log} == set(SITES[1:])

    def test_several_maskings_a_step_from_one_clean_pass(self, hooked):
        runs = []
        handle = hooked.model.embedding.register_forward_hook(lambda *_: runs.append(1))
        counts, recipe = [], dataclasses.replace(QUICK, statistics=1)
        for per_step, steps in ((1, 20), (2, 10)):
            runs.clear()
            explainer = DiffMask(hooked, SITES[2:], recipe=dataclasses.replace(recipe, per_step=per_step))
            explainer.fit(batches(), steps=steps, progress=False)
            counts.append(len(runs))
        handle.remove()
        assert counts[0] - counts[1] == 10  # as many masked passes, half of the clean ones
        assert len(explainer.result.log) == 20
        assert {row["site"] for row in explainer.result.log if row["step"] == 0} == set(SITES[2:])
        explainer.fit(batches(), progress=False)
        assert explainer.result.log[-1]["step"] == QUICK.steps - 1

    def test_a_step_has_a_masking(self):
        with pytest.raises(SettingError, match="per_step"):
            dataclasses.replace(QUICK, per_step=0)

    def test_inputs_given_states(self, hooked):
        explainer = fitted(hooked, SITES[0], given=SITES[:3])
        found = explainer.explain(batches(1)[0])
        assert list(found.mean_kept()) == [(SITES[0], 0), (SITES[0], 1), (SITES[0], 2)]
        by_depth = [found.select(depth=depth)["score"] for depth in range(3)]
        assert bool((by_depth[0] >= by_depth[1]).all() and (by_depth[1] >= by_depth[2]).all())
        assert len(by_shared_modules(explainer.groups)) == 1

    def test_votes_of_each_depth_alone(self, hooked, tmp_path):
        explainer = fitted(hooked, SITES[0], given=SITES[:3], product=False)
        assert [len(masking.votes) for masking in explainer.maskings] == [1, 1, 1]
        assert len(by_shared_modules(explainer.groups)) == 3
        found = explainer.explain(batches(1)[0])
        assert list(found.mean_kept()) == [(SITES[0], 0), (SITES[0], 1), (SITES[0], 2)]
        explainer.save(tmp_path)
        assert maskhooks.load(tmp_path, hooked).explain(batches(1)[0]) == found

    @pytest.mark.parametrize("product", [True, False])
    def test_states_of_one_depth_are_read_together(self, product):
        sites = [maskhooks.Site.parse(name, TOKENS, depth=min(i, 2)) for i, name in enumerate(SITES)]
        explainer = fitted(wrapped(sites=sites), SITES[0], given=SITES[1:], product=product)
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
        assert len(explainer.result.chosen) == 4

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


def test_nan_that_no_distribution_takes_names_the_site():
    hooked = wrapped(Explodes(), output=lambda o: Categorical(logits=o, validate_args=True))
    explainer = DiffMask(hooked, SITES[2], margin=1.0, recipe=QUICK)
    with pytest.raises(NonFiniteError, match=r"masked output is not finite at step 19 on layers\.1:output"):
        explainer.fit(batches(), progress=False, accelerator="cpu")
    assert bool(torch.from_numpy(explainer.explain(batches(1)[0])["score"]).isfinite().all())


def test_nan_in_the_data():
    hooked = wrapped(output=lambda o: Categorical(logits=o, validate_args=True))
    explainer = fitted(hooked)
    hooked.model.embedding.weight.data[:] = float("nan")
    with pytest.raises(NonFiniteError, match="outputs are not finite"):
        explainer.explain(batches(1)[0])


def test_padding_is_never_kept(hooked):
    found = fitted(hooked).explain(batches(1)[0])
    assert not found["kept"][~found["real"]].any()
    assert found["kept"][found["real"]].any()


class TestNotAmortized:
    def test_each_batch_has_logits_of_its_own(self, hooked):
        explainer = DiffMask(
            hooked, SITES[2], margin=0.05, amortized=False, recipe=dataclasses.replace(QUICK, steps=80)
        )
        before = state(hooked.model)
        one, again = (explainer.explain(batches(1)[0]) for _ in range(2))
        assert state(hooked.model) == before
        assert one == again
        assert 0.0 < one.select().mean_kept()[SITES[2], 2] < 0.95

    def test_a_learned_baseline_is_fitted_first(self, hooked):
        explainer = DiffMask(hooked, SITES[2], baseline="learned", amortized=False, recipe=QUICK)
        with pytest.raises(NotFittedError, match="fit"):
            explainer.evaluate(batches(1), progress=False)
        explainer.fit(batches(), progress=False)
        assert bool((explainer.maskings[0].baseline().abs() > 0).any())

    def test_free_logits_read_nothing(self, hooked):
        with pytest.raises(SettingError, match="read no states"):
            DiffMask(hooked, SITES[0], given=SITES[1], amortized=False)


class TestBadInput:
    @pytest.mark.parametrize("margin", [0.0, -0.1, float("nan")])
    def test_margin(self, hooked, margin):
        with pytest.raises(SettingError, match="margin"):
            DiffMask(hooked, margin=margin)

    @pytest.mark.parametrize("margin", [True, "0.1", None, float("inf")])
    def test_margins_that_are_no_numbers(self, hooked, margin, unchecked):
        with pytest.raises(SettingError, match="margin"):
            DiffMask(hooked, margin=margin)

    @pytest.mark.parametrize("setting", [{"steps": 0}, {"steps": -5}, {"epochs": 0}])
    def test_steps(self, hooked, setting):
        with pytest.raises(SettingError, match="whole number from 1"):
            DiffMask(hooked, SITES[1], recipe=QUICK).fit(batches(), progress=False, **setting)

    def test_no_site(self, hooked):
        with pytest.raises(SettingError, match="no site is named"):
            DiffMask(hooked, sites=[])

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested_tensors(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        padding = torch.arange(5) >= torch.tensor([[5], [3]])
        hooked = maskhooks.wrap(encoder, call=lambda model, x: model(x, src_key_padding_mask=padding))
        read = hooked.tap(read=["layers.0:output"])
        with torch.no_grad(), pytest.raises(NotATensorError, match="enable_nested_tensor=False"), read:
            hooked(torch.randn(2, 5, 8))

    def test_unknown_site(self, hooked):
        with pytest.raises(UnknownSiteError, match=r"layers\.1:output"):
            DiffMask(hooked, "layers.1:outptu")

    def test_unknown_names(self, hooked):
        with pytest.raises(UnknownNameError, match="hard-concrete"):
            DiffMask(hooked, gate="hard-concret")
        with pytest.raises(UnknownNameError, match="learned"):
            DiffMask(hooked, baseline="learnt")

    def test_no_pattern(self):
        with pytest.raises(PatternError, match="has no pattern"):
            DiffMask(maskhooks.wrap(Tagger()), "layers.1:output")

    def test_a_pattern_that_does_not_fit(self):
        hooked = wrapped(sites={"layers.1:output": "batch feature -> batch feature"})
        with pytest.raises(PatternError, match=r"2 axes.*shape \[8, 6, 12\]"):
            fitted(hooked)

    def test_loaders(self, hooked):
        explainer = DiffMask(hooked, SITES[1], recipe=QUICK)
        with pytest.raises(EmptyLoaderError, match="training loader yields no batch"):
            explainer.fit([])
        with pytest.raises(EmptyLoaderError, match="validation loader yields no batch"):
            explainer.fit(batches(), [])
        with pytest.raises(EmptyLoaderError, match="read just once"):
            explainer.fit(b for b in batches())

    def test_outputs_without_a_distribution(self):
        before = state((hooked := wrapped(output=None)).model)
        with pytest.raises(UnknownDistributionError, match="output="):
            fitted(hooked)
        assert state(hooked.model) == before

    def test_a_batch_without_the_expected_keys(self, hooked):
        with pytest.raises(BatchError, match="call="):
            hooked({"text": torch.zeros(2, 3)})

    def test_precision_that_rewrites_weights(self, hooked):
        with pytest.raises(SettingError, match="16-mixed"):
            DiffMask(hooked, SITES[1], recipe=QUICK).fit(batches(), precision="bf16-true")

    def test_not_fitted(self, hooked, tmp_path):
        explainer = DiffMask(hooked, SITES[1])
        with pytest.raises(NotFittedError):
            explainer.explain(batches(1)[0])
        with pytest.raises(NotFittedError):
            explainer.save(tmp_path)

    def test_a_state_before_the_masked_site(self, hooked):
        with pytest.raises(SettingError, match="given"):
            DiffMask(hooked, SITES[2], given=SITES[0])


class Explodes(Tagger):
    """Gives NaN from a certain masked pass on."""

    def forward(self, ids, real):
        logits = super().forward(ids, real)
        return logits * float("nan") if torch.is_grad_enabled() and logits.requires_grad and self.after() else logits

    def after(self):
        self.passes = getattr(self, "passes", 0) + 1
        return self.passes > 20


def test_nan_stops_and_keeps_the_last_good_state():
    hooked = wrapped(Explodes(), output=lambda o: Categorical(logits=o, validate_args=False))
    explainer = DiffMask(hooked, SITES[2], margin=1.0, recipe=QUICK)
    with pytest.raises(NonFiniteError, match=r"step 19 on layers\.2:output".replace("2:", "1:")) as caught:
        explainer.fit(batches(), progress=False, accelerator="cpu")
    assert str(caught.value.site) == SITES[2]
    found = explainer.explain(batches(1)[0])
    assert bool(torch.from_numpy(found["score"]).isfinite().all())
    weights = [weight for group in explainer.groups for module in group.modules for weight in module.parameters()]
    assert all(bool(weight.isfinite().all()) for weight in weights)


class TestStorage:
    def test_round_trip(self, hooked, tmp_path):
        explainer = fitted(hooked, "hidden")
        explainer.save(tmp_path)
        batch = batches(1)[0]
        for model in (hooked, hooked.model):
            given = {} if model is hooked else {"output": output, "real": lambda b: b[1]}
            again = maskhooks.load(tmp_path, model, **given)
            assert again.explain(batch) == explainer.explain(batch)
            assert again.within_margin == explainer.within_margin
        assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".csv", ".json", ".safetensors"]

    def test_another_model(self, hooked, tmp_path):
        fitted(hooked, run_dir=tmp_path)
        other = Tagger()
        other.head.weight.data += 1
        with pytest.raises(FingerprintError, match=r"head\.weight has other values") as caught:
            maskhooks.load(tmp_path, wrapped(other))
        assert caught.value.differences == ["head.weight has other values"]
        with pytest.warns(FingerprintWarning, match=r"head\.weight"):
            assert maskhooks.load(tmp_path, wrapped(other), strict=False).fitted

    def test_broken_files(self, hooked, tmp_path):
        explainer = fitted(hooked)
        for name in ("explainer.json", "weights.safetensors"):
            for data in (b"", b"\x00" * 40, pickle.dumps({"format": 1})):
                explainer.save(tmp_path)
                (tmp_path / name).write_bytes(data)
                with pytest.raises(CorruptFileError, match=name):
                    maskhooks.load(tmp_path, hooked)
            (tmp_path / name).unlink()
            with pytest.raises(CorruptFileError, match="cannot be read"):
                maskhooks.load(tmp_path, hooked)

    def test_another_format(self, hooked, tmp_path):
        fitted(hooked, run_dir=tmp_path)
        saved = json.loads((tmp_path / "explainer.json").read_text())
        (tmp_path / "explainer.json").write_text(json.dumps({**saved, "format": 99}))
        with pytest.raises(CorruptFileError, match="format 99"):
            maskhooks.load(tmp_path, hooked)

    def test_what_cannot_be_saved_is_passed_again(self, hooked, tmp_path):
        def own(original, masked):
            return (original.probs - masked.probs).abs().sum(-1)

        fitted(hooked, divergence=own, run_dir=tmp_path)
        with pytest.raises(SettingError, match="divergence="):
            maskhooks.load(tmp_path, hooked)
        assert maskhooks.load(tmp_path, hooked, divergence=own).divergence is own

    def test_a_halved_model_passes_for_itself(self):
        model = Tagger()
        again = Tagger()
        again.load_state_dict({name: t.to(torch.bfloat16).float() for name, t in model.state_dict().items()})
        assert not differences(fingerprint(model), fingerprint(again))
        grown = nn.Sequential(model)
        assert any("missing" in line for line in differences(fingerprint(model), fingerprint(grown)))


class Skips(Tagger):
    """Adds the embedding's mean to the last state: information goes around the layers."""

    def forward(self, ids, real):
        return super().forward(ids, real) + self.embedding(ids).mean((1, 2))[:, None] * torch.tensor([1.0, 0, 0])


class TestDoctor:
    def test_sound_sites(self, hooked):
        report = examine(hooked, batches(1)[0])
        assert report.healthy
        assert [f.calls for f in report.findings] == [1] * 4
        assert all(f.bypassed is False for f in report.findings)
        assert "Categorical over batch [8]" in str(report)
        assert "layers.1:output" in report._repr_html_()

    def test_a_way_around(self):
        names = SITES[1:]
        hooked = wrapped(Skips(), sites={**dict.fromkeys(names, TOKENS)})
        report = examine(hooked, batches(1)[0])
        assert all(f.bypassed for f in report.findings)
        assert not report.healthy
        with pytest.warns(BypassedWarning, match=r"layers\.1:output"):
            fitted(hooked)

    def test_nothing_to_tell(self, hooked):
        constant = wrapped(output=lambda o: Categorical(logits=torch.zeros_like(o)))
        site = hooked.find(SITES[1])[0]
        assert bypassed(constant, batches(1)[0], [site]) == {site: None}

    def test_troubles(self):
        class Twice(Tagger):
            def forward(self, ids, real):
                self.layers[0](self.embedding(ids))
                return super().forward(ids, real)

        model = Twice()
        model.unused = nn.Linear(2, 2)
        hooked = wrapped(model, sites=dict.fromkeys(["layers.0:output", "unused:output", "layers.1:output"], TOKENS))
        report = examine(hooked, batches(1)[0])
        assert [bool(f.trouble) for f in report.findings] == [True, True, False]
        assert "fires 2 times" in report.findings[0].trouble
        assert "never fired" in report.findings[1].trouble


def test_random_scores(hooked):
    explainer = Random(hooked, SITES[1:3], seed=4)
    one = explainer.explain(batches(1)[0])
    assert one == explainer.explain(batches(1)[0])
    assert one != Random(hooked, SITES[1:3], seed=5).explain(batches(1)[0])
    assert 0.3 < one["score"].mean() < 0.7


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


def test_a_fit_that_fails_at_the_start_leaves_nothing_to_explain(hooked):
    explainer = DiffMask(wrapped(output=None), SITES[1], recipe=QUICK)
    with pytest.raises(UnknownDistributionError):
        explainer.fit(batches(), progress=False, accelerator="cpu")
    with pytest.raises(NotFittedError):
        explainer.explain(batches(1)[0])


class TestRecipe:
    @pytest.mark.parametrize(
        ("setting", "found"),
        [
            ({"objective": "ratioo"}, r"no objective of a recipe is named 'ratioo'.*Did you mean 'ratio'"),
            ({"optimizer": "adamw"}, r"no optimizer of a recipe is named 'adamw'"),
            ({"probe": "x"}, r"There are: mlp, summed, paper"),
            ({"validations": 0}, r"validations is a whole number from 1, got 0"),
            ({"stagger": 1.5}, r"stagger is a fraction of the steps"),
        ],
    )
    def test_settings_that_no_recipe_has(self, setting: dict[str, Any], found: str) -> None:
        with pytest.raises(MaskhooksError, match=found):
            Recipe(**setting)
