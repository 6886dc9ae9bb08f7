"""Captum's metrics at any site: as Captum computes them on a plain model, and as loops do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

pytest.importorskip("captum")
pytest.importorskip("transformers")

from captum import attr, metrics
from maskhooks_captum.gradients import IntegratedGradients

import maskhooks
from maskhooks import Explanation, Hooked
from maskhooks.errors import NonFiniteError, SettingError
from maskhooks.metrics.judgement import judge
from maskhooks.seeds import generator, seeded
from tests.adapters.captum_models import HEADS, STATE, Mixed, bert, made, mixed, padded, value_at, vectors
from tests.conftest import fingerprint
from tests.metrics import small

SITE = "first:output"
SAMPLES, SHARE, SEED = 40, 0.3, 5
SETTINGS: dict[str, Any] = {"name": "infidelity", "samples": SAMPLES, "share": SHARE, "seed": SEED}


def tail(model: Mixed, hidden: Tensor) -> Tensor:
    """The model behind its first layer."""
    found: Tensor = model.last(model.relu(model.second(model.act(hidden).sum(1))))
    return found


def removed(example: int, places: int) -> Tensor:
    draws = np.random.default_rng(seeded(SEED, 330, example)).random((SAMPLES, places))
    return torch.from_numpy(draws < SHARE)


def plain() -> tuple[Any, Hooked, Tensor, Tensor, Tensor]:
    """A model, its `Hooked`, a batch, the value at the site and the predicted classes, in double precision."""
    model = Mixed().double().eval()
    hooked, batch = mixed(model), vectors().double()
    return model, hooked, batch, value_at(hooked, batch, SITE), model(batch).argmax(-1)


class TestInfidelity:
    @pytest.mark.parametrize("normalize", [False, True])
    def test_is_what_captum_gives_for_the_model_behind_the_site(self, normalize: bool) -> None:
        model, hooked, batch, value, target = plain()
        explanation = made("integrated-gradients", hooked, SITE).explain(batch)
        scores = torch.as_tensor(explanation["score"]).view(3, 4).double()
        settings = {**SETTINGS, "normalize": normalize, "relative": False}
        (found,) = judge(explanation, settings, hooked=hooked, batches=[batch])

        def perturb(values: Tensor) -> tuple[Tensor, Tensor]:
            gone = torch.stack([removed(example, 4) for example in range(3)]).flatten(0, 1)[..., None].double()
            return gone.expand_as(values), values * (1 - gone)

        wanted = metrics.infidelity(
            lambda hidden: tail(model, hidden),
            perturb,
            value,
            (scores / 6)[..., None].expand_as(value),
            target=target,
            n_perturb_samples=SAMPLES,
            normalize=normalize,
        )
        assert found.values == pytest.approx(wanted.detach().numpy())
        assert found.metric.unit == "squared output"

    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("output", ["logit", "prob", "log-prob"])
    def test_is_what_a_loop_gives(self, normalize: bool, output: str) -> None:
        model, hooked, batch, value, target = plain()
        explanation = made("feature-ablation", hooked, SITE, output=output).explain(batch)
        settings = {**SETTINGS, "normalize": normalize, "output": output}
        (found,) = judge(explanation, settings, hooked=hooked, batches=[batch])
        for example in range(3):
            scores = explanation["score"][explanation["example"] == example].astype(float)

            def number(hidden: Tensor, target: int = int(target[example])) -> float:
                logits = tail(model, hidden[None])[0].detach()
                kinds = {"logit": logits, "prob": logits.softmax(0), "log-prob": logits.log_softmax(0)}
                return float(kinds[output][target])

            said, lost = [], []
            for gone in removed(example, 4).tolist():
                hidden = value[example].clone()
                hidden[gone] = 0
                said.append(sum(score for score, one in zip(scores, gone, strict=True) if one))
                lost.append(number(value[example]) - number(hidden))
            covariance = sum(one * two for one, two in zip(said, lost, strict=True))
            best = max(0.0, covariance) / sum(one**2 for one in said) if normalize else 1.0
            wanted = sum((best * one - two) ** 2 for one, two in zip(said, lost, strict=True))
            assert found.values[example] == pytest.approx(wanted / sum(one**2 for one in lost))
        assert found.metric.unit == "ratio to scores of 0"

    def test_the_sign_counts_and_the_scale_does_not_if_normalised(self) -> None:
        _, hooked, batch, *_ = plain()
        explanation = made("integrated-gradients", hooked, SITE).explain(batch)

        def of(factor: float, normalize: bool) -> Any:
            explanation["score"][:] = before * factor
            settings = {**SETTINGS, "normalize": normalize}
            (found,) = judge(explanation, settings, hooked=hooked, batches=[batch])
            return found.values

        before = explanation["score"].copy()
        assert (of(1, True) < 0.9).all()
        assert of(100, True) == pytest.approx(of(1, True), rel=1e-4)
        assert of(-1, True) == pytest.approx(1)
        assert of(0, True) == pytest.approx(1)
        assert of(0, False) == pytest.approx(1)
        assert (of(100, False) > 100).all()

    def test_of_a_model_that_adds_is_0(self) -> None:
        class Sum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Identity()

            def forward(self, x: Tensor) -> Tensor:
                total = self.first(x).sum((1, 2))
                return torch.stack([total, -total], 1)

        hooked, batch = mixed(Sum()), vectors()
        for explainer in (made("feature-ablation", hooked, SITE), maskhooks.LeaveOneOut(hooked, SITE)):
            (found,) = judge(explainer.explain(batch), {**SETTINGS, "normalize": False}, hooked=hooked, batches=[batch])
            assert (found.values < 1e-6).all() == (explainer.name == "feature-ablation")

    def test_padding_and_special_tokens_stay_and_batches_do_not_matter(self) -> None:
        network = small.model()
        hooked, batch = small.hooked(network), small.batch()
        explanation = small.explanation(hooked, batch, small.scores())
        (found,) = judge(explanation, {**SETTINGS, "output": "log-prob"}, hooked=hooked, batches=[batch])
        halves = [tuple(part[:2] for part in batch), tuple(part[2:] for part in batch)]
        (again,) = judge(explanation, {**SETTINGS, "output": "log-prob"}, hooked=hooked, batches=halves)
        assert again.values == pytest.approx(found.values, rel=1e-4)
        (some,) = judge(
            explanation.select(example=[1, 3]), {**SETTINGS, "output": "log-prob"}, hooked=hooked, batches=[batch]
        )
        assert some.values == pytest.approx(found.values[[1, 3]], rel=1e-4)
        for example, length in enumerate(small.LENGTHS):
            ids, scores = batch[0][example, :length], small.scores()[example][1:].astype(float)
            full = small.probabilities(network, ids, [])
            said, lost = [], []
            for gone in removed(example, length - 1).tolist():
                left = small.probabilities(network, ids, [place for place, one in enumerate(gone, 1) if one])
                said.append(float(scores[gone].sum()))
                lost.append(float((full.log() - left.log())[full.argmax()]))
            best = max(0.0, np.dot(said, lost)) / np.dot(said, said)
            wanted = np.square(best * np.array(said) - lost).sum() / np.dot(lost, lost)
            assert found.values[example] == pytest.approx(wanted, rel=1e-3)

    def test_a_target_a_baseline_and_units(self) -> None:
        model, hooked, batch, value, _ = plain()
        explanation = made("integrated-gradients", hooked, SITE, target=2).explain(batch)
        settings = {**SETTINGS, "normalize": False}
        (own,) = judge(explanation, {**settings, "target": 2}, hooked=hooked, batches=[batch])
        (other,) = judge(explanation, {**settings, "target": 1}, hooked=hooked, batches=[batch])
        (mean,) = judge(explanation, {**settings, "target": 2, "baseline": "mean"}, hooked=hooked, batches=[batch])
        assert own.mean < other.mean
        assert own.mean != mean.mean
        together = mixed(model, units=lambda batch: torch.tensor([[0, 0, 1, 2]]).expand(len(batch), 4))
        scores = made("feature-ablation", together, SITE).explain(batch)
        (found,) = judge(scores, settings, hooked=together, batches=[batch])
        gone = torch.from_numpy(np.random.default_rng(seeded(SEED, 330, 0)).random((SAMPLES, 3)) < SHARE)
        unit = scores["score"][:4][[0, 2, 3]]
        logits = tail(model, value[:1])[0].detach()
        said, lost = [], []
        for row in gone.tolist():
            hidden = value[0].clone()
            hidden[[row[0], row[0], row[1], row[2]]] = 0
            said.append(sum(float(score) for score, one in zip(unit, row, strict=True) if one))
            lost.append(float((logits - tail(model, hidden[None])[0].detach())[logits.argmax()]))
        assert found.values[0] == pytest.approx(np.square(np.subtract(said, lost)).sum() / np.square(lost).sum())

    def test_an_output_that_does_not_move_is_not_defined(self) -> None:
        model, hooked, batch, *_ = plain()
        explanation = made("integrated-gradients", hooked, SITE).explain(batch)
        with torch.no_grad():
            model.last.weight.zero_()
        explanation.provenance.pop("fingerprint")
        (found,) = judge(explanation, SETTINGS, hooked=hooked, batches=[batch])
        assert found.undefined == 3

    def test_at_states_and_heads_of_bert(self) -> None:
        model = bert()
        hooked, batch = maskhooks.wrap(model), padded()
        before = fingerprint(model)
        for site in (STATE, HEADS):
            explanation = made("feature-ablation", hooked, site).explain(batch)
            (found,) = judge(explanation, {**SETTINGS, "share": 0.01}, hooked=hooked, batches=[batch])
            assert (found.values[found.defined] < 0.2).all()  # mostly one at a time, which feature ablation knows
        assert fingerprint(model) == before

    def test_what_does_not_fit(self) -> None:
        model, hooked, batch, *_ = plain()
        explanation = made("integrated-gradients", hooked, SITE).explain(batch)
        with pytest.raises(SettingError, match="'infidelity' needs the wrapped model"):
            judge(explanation, "infidelity")
        with pytest.raises(SettingError, match="share must be"):
            judge(explanation, {"name": "infidelity", "share": 1.0}, hooked=hooked, batches=[batch])
        with pytest.raises(SettingError, match="target 7 is out of range"):
            judge(explanation, {"name": "infidelity", "target": 7}, hooked=hooked, batches=[batch])
        explanation["score"][0] = math.nan
        with pytest.raises(SettingError, match="NaN"):
            judge(explanation, "infidelity", hooked=hooked, batches=[batch])
        with torch.no_grad():
            model.last.weight.mul_(2)
        with pytest.raises(SettingError, match="of another model"):
            judge(explanation, "infidelity", hooked=hooked, batches=[batch])


SENSITIVITY: dict[str, Any] = {"name": "sensitivity-max", "samples": 4, "seed": SEED}


def noise(example: int, sample: int, size: int) -> Tensor:
    return 2 * torch.rand(size, generator=generator(SEED, 331, example, sample)) - 1


class TestSensitivity:
    @pytest.mark.parametrize("relative", [False, True])
    def test_is_what_captum_gives_for_the_model_behind_the_site(self, relative: bool) -> None:
        model, hooked, batch, value, target = plain()
        explainer = made("integrated-gradients", hooked, SITE, n_steps=10)
        settings = {**SENSITIVITY, "radius": 0.3, "relative": relative}
        explanation = explainer.explain(batch)
        (found,) = judge(explanation, settings, hooked=hooked, batches=[batch], explainer=explainer)
        gradients = attr.IntegratedGradients(lambda hidden: tail(model, hidden))
        samples = iter(range(4))

        def perturb(values: Tensor, radius: float) -> Tensor:
            sample = next(samples)
            draws = torch.stack([noise(example, sample, 24) for example in range(3)]).view(values.shape)
            scale = value.square().mean((1, 2), keepdim=True).sqrt() if relative else 1.0
            return values + radius * scale * draws

        def explain(values: Any) -> tuple[Tensor]:
            given = values[0] if isinstance(values, tuple) else values
            with torch.enable_grad():
                return (gradients.attribute(given, target=target, n_steps=10).sum(-1),)

        wanted = metrics.sensitivity_max(
            explain, value, perturb, perturb_radius=0.3, n_perturb_samples=4, max_examples_per_batch=3
        )
        assert found.values == pytest.approx(wanted.numpy(), rel=1e-4)
        assert (found.values > 0.01).all()

    @pytest.mark.parametrize("name", ["leave-one-out", "erasure", "feature-ablation", "diffmask"])
    def test_is_what_a_loop_gives(self, name: str) -> None:
        class Given(nn.Module):
            """The model behind the site, so that its batch is the value."""

            def __init__(self, model: Mixed) -> None:
                super().__init__()
                self.model, self.first = model, nn.Identity()

            def forward(self, hidden: Tensor) -> Tensor:
                return tail(self.model, self.first(hidden))

        model, hooked, batch, value, _ = plain()
        behind = mixed(Given(model))

        def explainer(wrapped: Hooked) -> Any:
            if name == "diffmask":  # amortised, so that it reads the value; the same weights for both
                return maskhooks.DiffMask(wrapped, SITE, margin=0.1, baseline="zero", seed=1).fit(
                    [batch if wrapped is hooked else value], steps=3
                )
            if name == "feature-ablation":
                return made(name, wrapped, SITE)
            return {"leave-one-out": maskhooks.LeaveOneOut, "erasure": maskhooks.Erasure}[name](wrapped, SITE)

        own, theirs = explainer(hooked), explainer(behind)
        if name == "diffmask":
            for one, other in zip(own.parts, theirs.parts, strict=True):
                other.load_state_dict(one.state_dict())
        settings = {**SENSITIVITY, "radius": 0.3, "relative": False}
        explanation = own.explain(batch)
        (found,) = judge(explanation, settings, hooked=hooked, batches=[batch], explainer=own)
        before = theirs.explain(value)["score"].reshape(3, 4)
        assert before == pytest.approx(explanation["score"].reshape(3, 4), abs=1e-5)
        wanted = np.zeros(3)
        for sample in range(4):
            draws = torch.stack([noise(example, sample, 24).view(4, 6) for example in range(3)])
            after = theirs.explain(value + 0.3 * draws)["score"].reshape(3, 4)
            for example in range(3):
                size = np.linalg.norm(before[example])
                change = np.linalg.norm(after[example] - before[example]) / size if size else math.nan
                wanted[example] = max(change, wanted[example])
        assert found.values == pytest.approx(wanted, abs=1e-3, nan_ok=True)

    def test_padding_does_not_move_and_batches_do_not_matter(self) -> None:
        model = bert()
        hooked, batch, before = maskhooks.wrap(model), padded(), fingerprint(model)
        explainer = IntegratedGradients(hooked, STATE, n_steps=5)
        explanation = explainer.explain(batch)
        seen: list[Tensor] = []
        handle = model.bert.encoder.layer[2].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        arguments: dict[str, Any] = {"hooked": hooked, "explainer": explainer}
        (found,) = judge(explanation, SENSITIVITY, batches=[batch], **arguments)
        handle.remove()
        clean = value_at(hooked, batch, STATE)
        whole = [value for value in seen if value.shape == clean.shape]
        assert any(not torch.equal(value[0], clean[0]) for value in whole)
        moved = [value for value in whole if not torch.allclose(value[0], clean[0], atol=1e-4)]
        assert all(torch.allclose(value[1, 5:], clean[1, 5:], atol=1e-5) for value in moved)
        halves = [{key: rows[:2] for key, rows in batch.items()}, {key: rows[2:] for key, rows in batch.items()}]
        (again,) = judge(explanation, SENSITIVITY, batches=halves, **arguments)
        assert again.values == pytest.approx(found.values, rel=1e-2)
        assert fingerprint(model) == before
        assert type(hooked.task).__name__ == "TransformersTask"

    def test_scores_that_do_not_look_are_not_sensitive_and_zeros_have_no_change(self) -> None:
        _, hooked, batch, *_ = plain()
        random = maskhooks.Random(hooked, SITE)
        (found,) = judge(random.explain(batch), SENSITIVITY, hooked=hooked, batches=[batch], explainer=random)
        assert found.values.tolist() == [0, 0, 0]
        explainer = made("feature-ablation", hooked, SITE, baseline=torch.zeros(6))
        with torch.no_grad():
            hooked.model.last.weight.zero_()
        explanation = explainer.explain(batch)
        (none,) = judge(explanation, SENSITIVITY, hooked=hooked, batches=[batch], explainer=explainer)
        assert none.undefined == 3

    def test_the_indices_of_examples_need_not_start_at_0(self) -> None:
        _, hooked, batch, *_ = plain()
        explainer = made("input-x-gradient", hooked, SITE)
        shifted = explainer.explain(batch, start_index=4)
        arguments: dict[str, Any] = {"hooked": hooked, "batches": [batch], "explainer": explainer, "start_index": 4}
        (found,) = judge(shifted, SENSITIVITY, **arguments)
        (some,) = judge(shifted.select(example=[5]), SENSITIVITY, **arguments)
        assert found.examples.tolist() == [4, 5, 6]
        assert some.values.tolist() == found.values[1:2].tolist()

    def test_rows_that_belong_to_examples_by_an_index(self) -> None:
        class Nodes(nn.Module):
            """Sums over the nodes of two graphs, whose rows are mixed."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor, owner: Tensor) -> Tensor:
                hidden = torch.tanh(self.first(x))
                found: Tensor = self.last(hidden.new_zeros(2, 6).index_add(0, owner, hidden)).square()
                return found

        torch.manual_seed(0)
        owner = torch.tensor([0, 1, 0, 1, 1])
        batch = (torch.randn(5, 5), owner)
        hooked = maskhooks.wrap(
            Nodes(),
            sites={SITE: "node hidden -> node"},
            output=lambda logits: Categorical(logits=logits),
            example_index=lambda batch: batch[1],
        )
        explainer = made("input-x-gradient", hooked, SITE)
        explanation = explainer.explain(batch)
        arguments: dict[str, Any] = {"hooked": hooked, "batches": [batch], "explainer": explainer}
        found, infidelity = judge(explanation, [SENSITIVITY, SETTINGS], **arguments)
        value, site = value_at(hooked, batch, SITE), explanation["score"]
        original = [site[explanation["example"] == example] for example in range(2)]
        wanted = np.zeros(2)
        for sample in range(4):
            moved = value.clone()
            for example in range(2):
                rows = value[owner == example]
                scale = rows.square().mean().sqrt()
                moved[owner == example] += 0.02 * scale * noise(example, sample, rows.numel()).view(rows.shape)
            moved.requires_grad_()
            logits = hooked.model.last(torch.zeros(2, 6).index_add(0, owner, torch.tanh(moved))).square()
            target = hooked.model(*batch).argmax(-1)
            (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), moved)
            scores = (gradient * moved).sum(-1).detach()
            for example in range(2):
                change = np.linalg.norm(scores[owner == example].numpy() - original[example])
                wanted[example] = max(wanted[example], change / np.linalg.norm(original[example]))
        assert found.values == pytest.approx(wanted, rel=1e-2)
        assert infidelity.undefined == 0

    @pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
    def test_an_explainer_of_several_sites(self) -> None:
        """Each is moved by itself, and passes that begin behind it do not reach it."""
        sites = dict.fromkeys((SITE, "act:output"), "batch token hidden -> batch token")
        hooked, batch = mixed(sites=sites), vectors()
        explainer = made("input-x-gradient", hooked, list(sites))
        found = judge(explainer.explain(batch), SENSITIVITY, hooked=hooked, batches=[batch], explainer=explainer)
        assert [one.site for one in found] == list(sites)
        for one in found:
            alone = made("input-x-gradient", hooked, one.site)
            (wanted,) = judge(alone.explain(batch), SENSITIVITY, hooked=hooked, batches=[batch], explainer=alone)
            assert one.values == pytest.approx(wanted.values, rel=1e-4)
        masks = maskhooks.DiffMask(hooked, list(sites), amortized=False, recipe=maskhooks.Recipe(steps=3))
        explanation = masks.explain(batch)
        for one in judge(explanation, SENSITIVITY, hooked=hooked, batches=[batch], explainer=masks):
            assert one.undefined == 0

    def test_a_site_whose_value_comes_step_by_step(self) -> None:
        class Read(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cells, self.last = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                found: Tensor = self.last(self.cells(x)[0][:, -1])
                return found

        torch.manual_seed(0)
        hooked, batch = maskhooks.wrap(Read(), output=lambda logits: Categorical(logits=logits)), vectors()
        explainer = maskhooks.LeaveOneOut(hooked, "cells.h_l0:output")
        (found,) = judge(explainer.explain(batch), SENSITIVITY, hooked=hooked, batches=[batch], explainer=explainer)
        assert (found.values > 0).all()
        assert (found.values < 0.5).all()

    def test_an_error_leaves_the_model_and_its_task(self) -> None:
        _, hooked, batch, *_ = plain()

        class Broken(maskhooks.LeaveOneOut):
            def scores(self, clean: Any) -> Any:
                if getattr(self, "broken", False):
                    raise RuntimeError("no scores")
                return super().scores(clean)

        explainer, task = Broken(hooked, SITE), hooked.task
        explanation = explainer.explain(batch)
        explainer.broken = True  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="no scores"):
            judge(explanation, SENSITIVITY, hooked=hooked, batches=[batch], explainer=explainer)
        assert hooked.task is task
        assert not any(module._forward_hooks for module in hooked.model.modules())

    def test_what_does_not_fit(self) -> None:
        _, hooked, batch, *_ = plain()
        explainer = made("input-x-gradient", hooked, SITE)
        explanation = explainer.explain(batch)
        with pytest.raises(SettingError, match="'sensitivity-max' needs the explainer"):
            judge(explanation, "sensitivity-max", hooked=hooked, batches=[batch])
        with pytest.raises(SettingError, match="radius must be"):
            judge(explanation, {"name": "sensitivity-max", "radius": 0}, hooked=hooked, batches=[batch])
        with pytest.raises(SettingError, match="the explanation has example 2"):
            judge(explanation, "sensitivity-max", hooked=hooked, batches=[batch[:2]], explainer=explainer)
        with pytest.raises(SettingError, match="Explain the same batches"):
            judge(explanation, "sensitivity-max", hooked=hooked, batches=[batch[:, :3]], explainer=explainer)

    def test_whole_numbers_cannot_move(self) -> None:
        network = small.model()
        hooked = maskhooks.wrap(
            network,
            sites={"embedding:input": "batch token -> batch token"},
            output=lambda logits: Categorical(logits=logits),
        )
        random, batch = maskhooks.Random(hooked, "embedding:input"), small.batch()
        explanation = random.explain(batch)
        with pytest.raises(SettingError, match=r"values of type torch.int64, which have no gradient"):
            judge(explanation, "sensitivity-max", hooked=hooked, batches=[batch], explainer=random)

    def test_values_that_are_infinite(self) -> None:
        _, hooked, batch, *_ = plain()
        explainer = maskhooks.Random(hooked, SITE)
        explanation: Explanation = explainer.explain(batch)
        with torch.no_grad():
            hooked.model.first.bias[0] = math.inf
        explanation.provenance.pop("fingerprint")
        with pytest.raises(NonFiniteError):
            judge(explanation, "sensitivity-max", hooked=hooked, batches=[batch], explainer=explainer)
