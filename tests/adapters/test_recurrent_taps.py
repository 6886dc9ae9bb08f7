"""Taps on recurrent modules: what is put back, addressed by steps, listed and refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from maskhooks_recurrent.adapter import RecurrentAdapter
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import maskhooks
from maskhooks.checks.doctor import doctor
from maskhooks.errors import BatchError, CompiledModelError, ReplacementError, SiteConflictError, SiteFiredTooOftenError
from maskhooks.hooks.frozen import frozen
from maskhooks.sites.site import Site
from tests.adapters.recurrent_models import flat
from tests.conftest import fingerprint, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def test_nothing_is_opened_while_no_state_is_tapped(unchanged: Any) -> None:
    x = torch.randn(5, 3, 4)
    model = unchanged(nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 6, 2, dropout=0.5)))
    hooked = maskhooks.wrap(model, adapter=RecurrentAdapter)
    with frozen(model):
        usual = model(x)
    with hooked.tap(read=["0:output", "1:input", "1:output[0]"]) as tap:
        assert "forward" not in vars(model[1])
        model(x)
    assert all(same_bits(one, other) for one, other in zip(flat(tap.outputs), flat(usual), strict=True))
    with hooked.tap(read="1.inputs:output") as tap:  # opened, and still one fused call
        model(x)
    assert all(same_bits(one, other) for one, other in zip(flat(tap.outputs), flat(usual), strict=True))


def test_all_is_put_back_after_errors_and_from_nested_taps(unchanged: Any) -> None:
    x = torch.randn(5, 3, 4)
    model = unchanged(nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 6)))
    first, second = (maskhooks.wrap(model, adapter=RecurrentAdapter) for _ in range(2))

    def fail(value: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), first.tap(replace={"1.h_l0:output": fail}):
        model(x)
    assert "forward" not in vars(model[1])
    with first.tap(replace={"1.h_l0:output": torch.zeros_like}):
        with second.tap(read="1.h_l0:output") as inner:
            model(x)
        assert not inner.values["1.h_l0:output"].any()
        assert not model(x)[0].any()
    one, other = first.tap(read="1.h_l0:output"), second.tap(read="1.h_l0:output")
    one.__enter__()
    tap = other.__enter__()
    model(x)
    one.__exit__(None, None, None)
    model(x)
    assert tap.values["1.h_l0:output"].shape == (3, 5, 6)
    other.__exit__(None, None, None)
    assert "forward" not in vars(model[1])


def test_wrong_input_is_refused_as_torch_or_in_words(unchecked: None) -> None:
    module = nn.GRU(4, 6)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    for wrong in (torch.randn(5, 3, 7), torch.randn(5, 3, 4, 2)):
        with pytest.raises((RuntimeError, ValueError)) as usual:
            module(wrong)
        with pytest.raises(type(usual.value)) as tapped, hooked.tap(read="h_l0:output"):
            module(wrong)
        assert str(tapped.value) == str(usual.value)
    with pytest.raises(BatchError, match="empty"), hooked.tap(read="h_l0:output"):
        module(torch.randn(0, 3, 4))
    packing = maskhooks.wrap(module, adapter=RecurrentAdapter, call=lambda model, x: model(pack_sequence(x)))
    with pytest.raises(BatchError, match="a sequence in the batch is empty"), packing.tap(read="inputs:output"):
        packing([torch.randn(3, 4), torch.randn(0, 4)])
    with pytest.raises(ReplacementError), hooked.tap(replace={"h_l0:output": lambda value: value[..., :2]}):
        module(torch.randn(5, 3, 4))
    both: Any = {"h_l0:output": torch.clone, "h_l0@1:output": torch.clone}
    with pytest.raises(SiteConflictError), hooked.tap(replace=both):
        pass


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, batch_first=True)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.rnn(one)[1][-1] - self.rnn(other)[1][-1]  # type: ignore[no-any-return]


class Last(nn.Module):
    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return given[1][-1]


def rows_of(outputs: Tensor) -> torch.distributions.Categorical:
    return torch.distributions.Categorical(logits=outputs)


@pytest.mark.parametrize("lengths", [(5, 6), (6, 5), (5, 5), (1, 2)])
def test_a_module_that_reads_two_sequences_is_tapped_by_steps(lengths: tuple[int, int]) -> None:
    both = maskhooks.wrap(Siamese(), adapter=RecurrentAdapter)
    pair = tuple(torch.randn(3, length, 4) for length in lengths)
    whole: list[dict[str, Any]] = [{"read": "rnn.h_l0:output"}, {"replace": {"rnn.h_l0:output": torch.clone}}]
    for given in whole:
        with pytest.raises(SiteFiredTooOftenError, match="Address one call"), both.tap(**given):
            both(pair)
    with both.tap(read="rnn.h_l0@*:output") as tap:
        both(pair)
    assert len(tap.values) == sum(lengths)


def test_a_copied_hooked_has_its_states() -> None:
    hooked = copy.deepcopy(maskhooks.wrap(nn.Sequential(nn.GRU(4, 6)), adapter=RecurrentAdapter))
    with hooked.tap(read="0.h_l0:output") as tap:
        hooked(torch.randn(5, 3, 4))
    assert tap.values["0.h_l0:output"].shape == (3, 5, 6)


def test_a_module_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(self.rnn(x)[0])

    model = Twice()
    hooked = maskhooks.wrap(model, adapter=RecurrentAdapter)
    with pytest.raises(SiteFiredTooOftenError), hooked.tap(read="rnn.h_l0:output"):
        model(torch.randn(5, 3, 4))


def test_scripted_and_compiled_modules_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = nn.Sequential(torch.jit.script(nn.GRU(4, 6)))
    with pytest.raises(CompiledModelError, match="'0' is compiled or scripted"):
        maskhooks.wrap(model, sites=["0.h_l0:output"])
    hooked = maskhooks.wrap(model, adapter=RecurrentAdapter)  # which claims nothing that is scripted
    with pytest.raises(CompiledModelError, match="'0' is compiled or scripted"), hooked.tap(read="0.h_l0:output"):
        pass
    with pytest.raises(CompiledModelError, match="the model is compiled or scripted"):
        maskhooks.wrap(model[0], adapter=RecurrentAdapter)
    model = nn.Sequential(torch.compile(nn.GRU(4, 6), backend="eager"))  # type: ignore[arg-type]
    with pytest.raises(CompiledModelError):
        maskhooks.wrap(model, adapter=RecurrentAdapter)


def test_a_forward_of_ones_own_is_left_alone() -> None:
    class Own(nn.GRU):
        def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
            return super().forward(x.flip(0), hx)

    assert not list(maskhooks.wrap(Own(4, 6), adapter=RecurrentAdapter).sites)


def test_a_module_that_reads_two_sequences_is_reported_and_listed() -> None:
    model, pair = Siamese(), (torch.randn(3, 5, 4), torch.randn(3, 6, 4))
    before = fingerprint(model)
    hooked = maskhooks.wrap(model, adapter=RecurrentAdapter, output=rows_of)
    report = doctor(hooked, pair)
    assert fingerprint(model) == before
    assert [(str(f.site), f.calls) for f in report.findings] == [("rnn.inputs:output", 2), ("rnn.h_l0:output", 11)]
    assert report.findings[0].trouble.endswith("address one call, rnn.inputs@0:output to rnn.inputs@1:output")
    assert report.findings[1].trouble.endswith("address one call, rnn.h_l0@0:output to rnn.h_l0@10:output")
    assert not report.healthy
    one = doctor(hooked, pair, ["rnn.inputs@1:output", "rnn.h_l0@7:output"])
    assert [(f.shape, f.trouble) for f in one.findings] == [((3, 6, 4), ""), ((3, 6), "")]
    shaped = maskhooks.wrap(model, adapter=RecurrentAdapter, example=pair)
    found = {str(site): site.shape for site in shaped.sites}
    assert found == {
        "rnn.inputs@0:output": (3, 5, 4),
        "rnn.inputs@1:output": (3, 6, 4),
        "rnn.h_l0:output": None,
    }
    assert fingerprint(model) == before
    with pytest.raises(SiteFiredTooOftenError):
        maskhooks.wrap(model, adapter=RecurrentAdapter, sites=["rnn.h_l0:output"], example=pair)


def test_one_step_is_gated_by_example() -> None:
    model = nn.Sequential(nn.GRU(4, 6, batch_first=True), Last())
    hooked = maskhooks.wrap(model, adapter=RecurrentAdapter, output=rows_of)
    (step,) = hooked.find("0.h_l0@3:output")
    assert (str(step.gating()), step.tags) == ("batch hidden -> batch", frozenset({"hidden"}))
    assert hooked.find(["0.h_l0:output", "0.inputs@0:output"])[1].gating() == hooked.sites[0].gating()
    own = Site.parse("0.h_l0@3:output", "batch hidden -> batch hidden")
    assert hooked.find(own) == [own]
    x = torch.randn(3, 5, 4)
    (finding,) = doctor(hooked, x, step).findings
    assert (finding.shape, finding.trouble) == ((3, 6), "")
    explanation = maskhooks.LeaveOneOut(hooked, "0.h_l0@3:output").explain(x)
    assert len(explanation["score"]) == 3
    split = maskhooks.wrap(model, sites={"0.h_l0:output": "batch token (part hidden) -> part token batch, part=2"})
    assert str(split.find("0.h_l0@3:output")[0].gating()) == "batch (part hidden) -> part batch, part=2"
    for arrow in ("batch token hidden -> token", "batch (token) hidden -> batch"):
        odd = maskhooks.wrap(model, sites={"0.h_l0:output": arrow})
        assert odd.find("0.h_l0@3:output")[0].pattern is not None
