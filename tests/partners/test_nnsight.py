"""nnsight: its models can be wrapped; values agree with what it reads, gates act, its own traces go on as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskhooks
from maskhooks.errors import ModelError
from tests.conftest import fingerprint, same_bits
from tests.partners.gates import act, last_token, trained

pytest.importorskip("transformers")
nnsight = pytest.importorskip(
    "nnsight"
)  # after beartype, which cannot be imported once nnsight gave all objects `save`

from tests.adapters.transformers_models import batch, make  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:nnsight")  # parts named `output` get another name there


class Cells(nn.Module):
    """A cell in a loop, structured values, and arguments by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(40, 6), nn.GRUCell(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        state, states = None, []
        for step in self.embed(ids).unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return {"logits": self.head(torch.stack(states, 1)) * scale, "last": (state, None)}


def logits(outputs: Any) -> Tensor:
    found: Tensor = outputs["logits"]
    return found


def changed() -> dict[str, Tensor]:
    """The same batch with other words."""
    found = batch()
    found["input_ids"] = torch.where(found["input_ids"] > 3, 43 - found["input_ids"], found["input_ids"])
    return found


@pytest.fixture(params=["bert", "gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model_of(family: str) -> Any:
    return make(family, "SequenceClassification" if family == "bert" else "CausalLM", attn_implementation="eager")


@pytest.mark.parametrize("order", ["nnsight first", "maskhooks first"])
def test_values_agree_and_gates_act(family: str, order: str) -> None:
    model = model_of(family)
    bare = copy.deepcopy(model).eval()
    if order == "maskhooks first":
        hooked = maskhooks.wrap(model)
        seen = nnsight.NNsight(model)
    else:
        seen = nnsight.NNsight(model)
        hooked = maskhooks.wrap(seen)
    assert hooked.model is model
    before = fingerprint(model)
    assert hooked.sites.rows() == maskhooks.wrap(bare).sites.rows()
    with hooked.tap(read="hidden") as tap:
        outputs = hooked(batch())
    assert same_bits(outputs.logits, bare(**batch()).logits)
    model.eval()
    for site in hooked.sites.tagged("hidden"):
        envoy = seen.get(site.module)
        with torch.no_grad(), seen.trace(**batch()):
            value = (envoy.input if site.port == "input" else envoy.output).save()
        assert same_bits(tap.values[site], value)
        if site.depth:  # a decoder's word embedding is not all that its first layer takes
            act(hooked, batch(), changed(), str(site), logits)
    model.train()
    assert fingerprint(model) == before


def test_learns_what_it_learns_without_nnsight(family: str) -> None:
    model = model_of(family)
    bare = copy.deepcopy(model)
    hooked = maskhooks.wrap(nnsight.NNsight(model))
    before = fingerprint(model)
    sites = [str(site) for site in hooked.sites.tagged("hidden")[1:3]]
    batches = [batch(), changed()]
    found, expected = (trained(one, sites, batches) for one in (hooked, maskhooks.wrap(bare)))
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], expected[key]) for key in found)
    assert fingerprint(model) == before


def test_calls_structured_values_and_keywords() -> None:
    model = Cells().eval()
    seen = nnsight.NNsight(model)
    ids = torch.randint(0, 40, (2, 4))
    hooked = maskhooks.wrap(seen, sites={"cell@2:output": "batch hidden -> batch"}, output=last_token)
    before = fingerprint(model)
    with hooked.tap(
        read=["cell@*:output", "cell@2:input[1]", ":output.last[0]", ":input.ids", "head:input.input"]
    ) as t:
        whole = hooked({"ids": ids, "scale": 2.0})
        assert torch.equal(hooked((ids, "label"))["logits"] * 2, whole["logits"])
    states = []
    with seen.trace(ids) as tracer:
        for _ in tracer.iter[:4]:
            states.append(seen.cell.output.save())  # noqa: PERF401 # nnsight reads the loop as it stands
    assert len(states) == 4
    assert same_bits(t.values["cell@2:input[1]"], t.values["cell@1:output"])
    assert same_bits(t.values[":output.last[0]"], t.values["cell@3:output"])
    assert same_bits(t.values[":input.ids"], ids)
    assert [same_bits(t.values[f"cell@{call}:output"], state) for call, state in enumerate(states)] == [True] * len(
        states
    )
    assert fingerprint(model) == before
    report = maskhooks.doctor(hooked, ids)
    assert report.findings[0].foreign == ["nnsight"]
    assert not report.findings[0].trouble


def test_trace_and_tap_see_each_other(family: str) -> None:
    """Behind a site is what was put in place; nnsight's own value there is from before hooks; its edits reach us."""
    model = model_of(family).eval()
    seen = nnsight.NNsight(model)
    hooked = maskhooks.wrap(seen)
    first, second = hooked.sites.tagged("hidden")[2:4]
    here, after = seen.get(first.module), seen.get(second.module)
    with torch.no_grad():
        usual = model(**batch())
        with hooked.tap(replace={first: torch.zeros_like}), seen.trace(**batch()):
            own = here.output.save()
            onward = after.input.save()
        assert own.any()
        assert not onward.any()
        with hooked.tap(read=first) as tap, seen.trace(**batch()):
            here.output[:] = 0
        assert not tap.values[first].any()
        with seen.trace(**batch()):
            result = seen.output.save()
    assert same_bits(result["logits"], usual["logits"])


def test_edits_kept_in_a_model_apply_in_its_traces_alone(family: str) -> None:
    model = model_of(family).eval()
    seen = nnsight.NNsight(model)
    hooked = maskhooks.wrap(seen)
    site = hooked.sites.tagged("hidden")[2]
    envoy = seen.get(site.module)
    with seen.edit(inplace=True):
        envoy.output[:] = 0
    with torch.no_grad(), hooked.tap(read=site) as tap:
        hooked(batch())
        assert tap.values[site].any()
        with seen.trace(**batch()):
            pass
        assert not tap.values[site].any()


def test_models_with_a_tokenizer(tokenizer: Callable[[], Any]) -> None:
    model = model_of("gpt2")
    seen = nnsight.TransformersModel(model, tokenizer=tokenizer())
    hooked = maskhooks.wrap(seen)
    assert hooked.model is model
    before = fingerprint(model)
    words = seen.tokenizer(["w5 w6 w7", "w8 w9 w10"], return_tensors="pt")
    site = hooked.sites.tagged("hidden")[2]
    with hooked.tap(read=site) as tap:
        hooked(words)
        with seen.trace(["w5 w6 w7", "w8 w9 w10"]):
            value = seen.get(site.module).output.save()
    assert same_bits(tap.values[site], value)
    assert fingerprint(model) == before


def test_models_that_are_not_loaded_yet_are_refused(tokenizer: Callable[[], Any], tmp_path: Any) -> None:
    model = model_of("gpt2")
    model.save_pretrained(tmp_path)
    seen = nnsight.TransformersModel(str(tmp_path), task="text-generation", tokenizer=tokenizer())
    with pytest.raises((ModelError, RuntimeError), match="meta"), maskhooks.wrap(seen).tap(read="hidden"):
        maskhooks.wrap(seen)(batch())
    seen.dispatch()
    with maskhooks.wrap(seen).tap(read="hidden") as tap:
        maskhooks.wrap(seen)(batch())
    with maskhooks.wrap(model).tap(read="hidden") as expected:
        maskhooks.wrap(model)(batch())
    for address, value in expected.values.items():
        torch.testing.assert_close(tap.values[address], value)
