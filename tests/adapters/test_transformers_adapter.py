"""Sites of tiny transformers of many families: in order, right values, exact, replayed, all restored."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from maskhooks_transformers import flow
from torch import Tensor, nn
from transformers import PreTrainedModel

import maskhooks
from maskhooks import Hooked, Site
from maskhooks.checks.doctor import doctor
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.replay import Replay
from tests.adapters.transformers_models import (
    FAMILIES,
    HIDDEN,
    WORDS,
    Counter,
    batch,
    config,
    depth,
    make,
)
from tests.conftest import same_bits

# What stands between the last layer and the last of `hidden_states`
FINAL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gpt2": lambda base, state: base.ln_f(state),
    "gpt_neo": lambda base, state: base.ln_f(state),
    "gpt_neox": lambda base, state: base.final_layer_norm(state),
    "opt": lambda base, state: base.decoder.project_out(base.decoder.final_layer_norm(state)),
    **{
        family: lambda base, state: base.norm(state)
        for family in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma")
    },
}
SHORT = ("bert", "deberta-v2", "albert", "gpt2", "gpt_neo", "llama")  # one of each kind of stack


@functools.cache
def wrapped(family: str) -> Hooked:
    """One for several tests, each of which leaves it as it was."""
    return maskhooks.wrap(make(family))


def states(hooked: Hooked) -> list[Site]:
    return hooked.sites.tagged("hidden")


def run(hooked: Hooked) -> Tensor:
    with torch.no_grad(), frozen(hooked.model):
        logits: Tensor = hooked(batch()).logits
        return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_one_site_for_words_and_one_for_each_state(family: str) -> None:
    model = make(family)
    hooked = maskhooks.wrap(model, example=batch())
    base = model.base_model
    words = dict(model.named_modules())[states(hooked)[0].module]
    assert len(states(hooked)) == depth(model) + 2
    assert words is base.get_input_embeddings()
    assert [site.depth for site in states(hooked)] == list(range(depth(model) + 2))
    assert [site.tags for site in states(hooked)] == [{"input", "hidden"}] + [{"hidden"}] * (depth(model) + 1)
    assert [site.port for site in states(hooked)[:2]] == ["output", "input"]
    assert {str(site.pattern) for site in states(hooked)} == {"batch token hidden -> batch token"}
    assert {site.shape for site in states(hooked)[1:]} == {(3, 7, HIDDEN)}
    assert states(hooked)[0].shape == (3, 7, words.weight.shape[1])


def test_addresses() -> None:
    sites = [str(site) for site in states(maskhooks.wrap(make("bert")))]
    assert sites == [
        "bert.embeddings.word_embeddings:output",
        "bert.encoder.layer.0:input",
        "bert.encoder.layer.0:output",
        "bert.encoder.layer.1:output",
        "bert.encoder.layer.2:output",
    ]
    assert [str(site) for site in states(maskhooks.wrap(make("gpt_neo", "CausalLM")))[2:4]] == [
        "transformer.h.0:output[0]",
        "transformer.h.1:output[0]",
    ]
    groups = "albert.encoder.albert_layer_groups"
    assert [str(site) for site in states(maskhooks.wrap(make("albert in two groups")))[1:]] == [
        f"{groups}.0@0:input",
        f"{groups}.0@0:output",
        f"{groups}.0@1:output",
        f"{groups}.1@0:output",
        f"{groups}.1@1:output",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_the_hidden_states(family: str) -> None:
    model = make(family, "Model")
    other = copy.deepcopy(model).eval()  # transformers leaves its own hooks on a model that is asked for these
    with torch.no_grad():
        expected = other(**batch(), output_hidden_states=True).hidden_states
    hooked = maskhooks.wrap(model)
    with torch.no_grad(), hooked.tap(read="hidden") as tap:
        hooked(batch())
    values = [tap.values[site] for site in states(hooked)]
    assert len(expected) == len(values) - 1
    for state, value in zip(expected[:-1], values[1:-1], strict=True):
        assert same_bits(state, value)
    with torch.no_grad():
        final = FINAL.get(family, lambda base, state: state)(other, values[-1])
    assert same_bits(expected[-1], final)


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_values_by_themselves_changes_no_bit(family: str) -> None:
    hooked = wrapped(family)
    clean = run(hooked)
    seen: list[Tensor] = []
    with hooked.tap(replace={"hidden": lambda value: (seen.append(value), value.clone())[1]}):
        assert same_bits(run(hooked), clean)
    assert len(seen) == len(states(hooked))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_site_matters(family: str) -> None:
    hooked = wrapped(family)
    clean = run(hooked)
    for site in states(hooked):
        with hooked.tap(replace={site: lambda value: -value}):
            assert not torch.equal(run(hooked), clean), site


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_goes_around_a_closed_site(family: str) -> None:
    findings = doctor(wrapped(family), batch(), "hidden").findings
    around = [str(finding.site) for finding in findings if finding.bypassed is not False]
    # The convolution also reads what the first layer is given: this site is bypassed, and the doctor says so.
    known = ["deberta.encoder.layer.0:input"] if family == "deberta-v2 with a convolution" else []
    assert around == known


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_at_padding_does_not_matter(family: str) -> None:
    hooked = wrapped(family)
    clean = run(hooked)
    for site in states(hooked)[:-1]:

        def replaced(value: Tensor, site: Any = site) -> Tensor:
            valid = hooked.task.valid(site, batch(), value)
            return torch.where(valid[..., None], value, 0.5)

        with hooked.tap(replace={site: replaced}):
            assert torch.allclose(run(hooked), clean, atol=1e-6), site


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_is_exact_and_skips_layers(family: str) -> None:
    hooked = maskhooks.wrap(make(family))
    layers = {site.module for site in states(hooked)[1:]}
    counter = Counter(*(hooked.model.get_submodule(name) for name in layers))
    clean, all_calls = run(hooked), counter.calls
    replay = Replay(hooked.model)
    replay.trace(lambda: run(hooked))
    for index, site in enumerate(states(hooked)):
        with torch.no_grad(), replay.record([site]) as recording:
            run(hooked)
        counter.calls = 0
        with recording.play(site):
            assert same_bits(run(hooked), clean), site
        assert counter.calls == all_calls - max(index - 1, 0), site
        with recording.play(site), hooked.tap(replace={site: lambda value: -value}):
            changed = run(hooked)
        with hooked.tap(replace={site: lambda value: -value}):
            assert same_bits(changed, run(hooked)), site


@pytest.mark.parametrize("family", FAMILIES)
def test_leaves_the_model_as_it_was(family: str, unchanged: Callable[[nn.Module], nn.Module]) -> None:
    model = unchanged(make(family))
    hooked = maskhooks.wrap(model, example=batch())
    with torch.no_grad(), hooked.tap(read="hidden"):
        hooked(batch())


@pytest.mark.parametrize("family", SHORT)
def test_bfloat16(family: str) -> None:
    hooked = maskhooks.wrap(make(family).to(torch.bfloat16), example=batch())
    clean = run(hooked)
    with hooked.tap(read="hidden", replace={"hidden": lambda value: value}) as tap:
        assert same_bits(run(hooked), clean)
    assert {value.dtype for value in tap.values.values()} == {torch.bfloat16}
    assert hooked.distribution(hooked(batch()), batch()).logits.dtype == torch.float32


@pytest.mark.parametrize("family", SHORT)
def test_one_layer_is_a_stack_too(family: str) -> None:
    settings: dict[str, Any] = {"num_hidden_layers": 1}
    if family == "gpt_neo":
        settings.update(num_layers=1, attention_types=[[["global"], 1]])
    assert len(states(maskhooks.wrap(make(family, **settings), example=batch()))) == 3


def test_inside_a_network_of_the_users() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = make("bert", "Model")
            self.top = nn.Linear(HIDDEN, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            state = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            out: Tensor = self.top(state[:, 0])
            return out

    hooked = maskhooks.wrap(Net(), example=batch())
    assert str(states(hooked)[0]) == "encoder.embeddings.word_embeddings:output"
    assert str(states(hooked)[-1]) == "encoder.encoder.layer.2:output"
    assert hooked.task.name == "function"


def test_a_subclass_with_a_forward_of_its_own_is_found_by_its_base() -> None:
    from transformers import BertModel, BertPreTrainedModel

    class Own(BertPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = BertModel(config)

        def forward(self, left: Any, right: Any) -> Tensor:
            both = [self.bert(**side).pooler_output for side in (left, right)]
            return torch.cat(both, -1)

    assert len(states(maskhooks.wrap(Own(config("bert"))))) == 5


@pytest.mark.parametrize("family", SHORT)
def test_flow_takes_nothing_from_the_model(family: str) -> None:
    model = make(family, "Model")
    body = flow.shell(model)
    own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    assert not own & {id(part) for part in (*body.modules(), *body.parameters(), *body.buffers())}
    assert {tensor.device.type for tensor in (*body.parameters(), *body.buffers())} == {"meta"}
    assert [type(module) for module in body.modules()] == [type(module) for module in model.modules()]


def test_flow_runs_no_hook_and_no_forward_of_others() -> None:
    model = make("bert")
    called: list[str] = []
    model.bert.encoder.register_forward_hook(lambda *_: called.append("hook"))
    forward = model.bert.encoder.forward
    model.bert.encoder.forward = lambda *args, **kwargs: (called.append("forward"), forward(*args, **kwargs))[1]
    assert len(states(maskhooks.wrap(model))) == 5
    assert not called


def test_a_model_that_needs_values_is_read_from_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("bert")

    def picky(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("this needs the values")

    monkeypatch.setattr(type(model.bert.embeddings), "forward", picky)
    sites = [str(site) for site in maskhooks.wrap(model).sites]
    monkeypatch.undo()
    assert sites == [str(site) for site in states(maskhooks.wrap(model))]


def test_lists_that_take_turns_are_one_chain() -> None:
    from transformers import XLMConfig, XLMModel

    sizes = {
        "vocab_size": WORDS,
        "emb_dim": HIDDEN,
        "n_layers": 2,
        "n_heads": 2,
        "n_langs": 1,
        "pad_index": 0,
    }
    model: PreTrainedModel = XLMModel(XLMConfig(**sizes, max_position_embeddings=24))
    assert [str(site) for site in states(maskhooks.wrap(model))] == [
        "embeddings:output",
        "layer_norm_emb:output",  # not the first attention alone takes it
        "layer_norm2.0:output",
        "layer_norm2.1:output",
    ]
