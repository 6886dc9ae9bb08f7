"""Every explainer checks first that the model is a function of its input, and leaves model and batch as they were."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

import maskhooks
from maskhooks import Beam, DiffMask, Erasure, Hooked, LeaveOneOut, Random
from maskhooks.checks.doctor import doctor
from maskhooks.errors import BatchError, MaskhooksWarning, NonFiniteError
from maskhooks.explainers.base import Explainer

SITE = "embed:output"
STEPS = {"name": "stable", "steps": 3}


class Strange(nn.Module):
    """A classifier of token ids that does something strange in each pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        if self.how == "draws":
            hidden = hidden + torch.randn_like(hidden)
        elif self.how == "dropout":
            hidden = nn.functional.dropout(hidden, training=True)
        elif self.how == "rounding":
            hidden = hidden * (1 + 1e-5 * torch.rand(()))
        elif self.how == "remembers":
            hidden = hidden + self.calls
        elif self.how == "nan":
            hidden = hidden * torch.nan
        elif self.how == "changes its input":
            ids.clamp_(min=5)
        self.calls += 1
        logits: Tensor = self.head(hidden.mean(1))
        return logits


def strange(how: str, **options: Any) -> Hooked:
    return maskhooks.wrap(
        Strange(how),
        sites={SITE: "batch token hidden -> batch token"},
        output=lambda logits: Categorical(logits=logits),
        **options,
    )


def ids() -> Tensor:
    return torch.arange(12).reshape(3, 4) % 10


EXPLAINERS: dict[str, Callable[[Hooked], Explainer]] = {
    "leave-one-out": lambda hooked: LeaveOneOut(hooked, SITE),
    "erasure": lambda hooked: Erasure(hooked, SITE),
    "beam": lambda hooked: Beam(hooked, SITE),
    "random": lambda hooked: Random(hooked, SITE),
    "diffmask": lambda hooked: DiffMask(hooked, SITE, amortized=False, recipe=STEPS),
}


@pytest.fixture(params=EXPLAINERS)
def make(request: pytest.FixtureRequest) -> Callable[[Hooked], Explainer]:
    return EXPLAINERS[request.param]


@pytest.mark.parametrize("how", ["draws", "dropout", "remembers"])
def test_a_model_that_draws_or_remembers_is_told_once(how: str, make: Callable[[Hooked], Explainer]) -> None:
    explainer = make(strange(how))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        explainer.explain(ids())
        explainer.explain_all([ids(), ids()])
    told = [str(one.message) for one in seen if "two passes of one batch" in str(one.message)]
    assert len(told) == 1
    assert "remembers earlier passes" in told[0]


def test_a_model_that_sums_in_another_order_is_not(make: Callable[[Hooked], Explainer]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(strange("rounding")).explain(ids())


def test_outputs_that_are_not_finite(make: Callable[[Hooked], Explainer]) -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinity in this batch"):
        make(strange("nan")).explain(ids())


def test_a_model_that_changes_its_input(make: Callable[[Hooked], Explainer]) -> None:
    explainer, batch = make(strange("changes its input")), ids()
    with pytest.raises(BatchError, match="changes its input in place, so") as caught:
        explainer.explain(batch)
    assert torch.equal(batch, ids())
    assert "copy.deepcopy(batch)" in str(caught.value)
    mended = strange("changes its input", call=lambda model, given: model(copy.deepcopy(given)))
    assert len(make(mended).explain(batch)["score"]) == 12
    assert torch.equal(batch, ids())


def test_where_in_the_batch() -> None:
    hooked = strange("changes its input", call=lambda model, batch: model(batch["text"][0]))
    with pytest.raises(BatchError, match=r"in place at \.text\[0\], so"):
        LeaveOneOut(hooked, SITE).explain({"text": [ids()]})


@pytest.mark.filterwarnings("ignore:at embed:maskhooks.errors.MarginWarning")  # of masks of noise
@pytest.mark.parametrize("how", ["plain", "draws"])
def test_buffers_and_random_state_come_back(how: str, make: Callable[[Hooked], Explainer]) -> None:
    hooked = strange(how, skip_checks=["model"])
    explainer, state = make(hooked), torch.get_rng_state()
    explainer.explain(ids())
    explainer.explain_all([ids()])
    explainer.fit([ids()])
    assert torch.equal(torch.get_rng_state(), state)
    assert hooked.model.calls == 0


def test_buffers_come_back_from_training_and_evaluation() -> None:
    hooked = strange("plain")
    state = torch.get_rng_state()
    explainer = DiffMask(hooked, SITE, recipe=STEPS).fit([ids()], [ids()], progress=False)
    explainer.evaluate([ids()], progress=False)
    doctor(hooked, ids())
    assert hooked.model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", ["draws", "nan", "changes its input"])
def test_fit_checks_the_model_too(how: str) -> None:
    explainer = DiffMask(strange(how), SITE, recipe=STEPS)
    wanted: Any = pytest.warns(MaskhooksWarning, match="two passes") if how == "draws" else pytest.raises(Exception)
    with wanted as caught:
        explainer.fit([ids()], progress=False)
    if how != "draws":
        assert caught.type is (NonFiniteError if how == "nan" else BatchError)


def test_checks_are_left_out_by_name() -> None:
    hooked = strange("draws", skip_checks=["model", "bypass", "gradients"])
    passes = []
    handle = hooked.model.register_forward_hook(lambda *_: passes.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Random(hooked, SITE).explain(ids())
    assert len(passes) == 1
    passes.clear()
    Random(strange("plain"), SITE).explain(ids())
    handle.remove()
    with pytest.raises(maskhooks.errors.SettingError, match="skip_checks"):
        strange("plain", skip_checks=["models"])


def test_the_check_costs_two_passes_once() -> None:
    hooked, passes = strange("plain"), []
    with_hook = hooked.model.register_forward_hook(lambda *_: passes.append(1))
    explainer = Random(hooked, SITE)
    explainer.explain(ids())
    assert len(passes) == 3
    explainer.explain(ids())
    assert len(passes) == 4
    with_hook.remove()


@pytest.mark.parametrize("how", ["draws", "nan", "changes its input"])
def test_doctor_names_the_one_cause(how: str) -> None:
    report = doctor(strange(how), ids())
    assert not report.healthy
    assert [note.split(":")[0] for note in report.notes()] == ["output", "model"]
    assert {"draws": "two passes", "nan": "not finite", "changes its input": "in place"}[how] in report.notes()[1]
    assert not any(finding.trouble for finding in report.findings)


@pytest.mark.parametrize("nested", [False, True])
def test_distributions_that_stand_on_others_are_compared(nested: bool) -> None:
    """A way round the site is seen in the parameters of the inner distribution too."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.head = nn.Identity(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.site(x)) + x  # type: ignore[no-any-return]

    def output(mean: Tensor) -> Any:
        return Independent(Normal(mean, 1.0), 1) if nested else Normal(mean, 1.0)

    hooked = maskhooks.wrap(Around(), sites={"site:output": "batch feature -> batch feature, feature=4"}, output=output)
    assert [one.bypassed for one in doctor(hooked, torch.randn(3, 4)).findings] == [True]
