"""Attention and rollout of a network of one's own: where weights are, units, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Attention, Hooked, Rollout
from maskhooks.errors import ModelError, NotATensorError, SettingError, UnknownSiteError
from tests.conftest import fingerprint
from tests.models import Broken

pytestmark = pytest.mark.usefixtures("unchecked")

TOKENS = "batch token hidden -> batch token"
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
PLACES = ["layers.0:output[1]", "layers.1:output[1]"]


class Net(nn.Module):
    """Two layers of torch's own attention."""

    def __init__(self, need_weights: bool = True) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.embedding = nn.Embedding(8, 6)
        self.layers = nn.ModuleList(nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.embedding(ids)
        for layer in self.layers:
            settings = {"need_weights": self.need_weights, "average_attn_weights": False}
            states = states + layer(states, states, states, key_padding_mask=ids == 0, **settings)[0]
        return self.head(states[:, 0])


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.rnn = nn.GRU(6, 3, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rnn(self.embedding(ids))[0][:, -1]


def wrap(model: nn.Module, sites: tuple[str, ...] = ("layers.0:input", "layers.1:input"), **settings: Any) -> Hooked:
    return maskhooks.wrap(
        model,
        sites=dict.fromkeys(sites, TOKENS),
        output=lambda logits: Categorical(logits=logits),
        valid=lambda batch: batch != 0,
        **settings,
    )


def weights(net: nn.Module) -> list[Tensor]:
    with torch.no_grad(), maskhooks.wrap(net, sites=[]).tap(read=PLACES) as tap:
        net(IDS)
    return [tap.values[place] for place in PLACES]


def constant(*shape: int, value: float = 0.2) -> Callable[[nn.Module, Any], list[Tensor]]:
    return lambda model, batch: [torch.full(shape, value)] * 2


class TestAddresses:
    def test_the_weights_of_the_pass_are_scored(self) -> None:
        net = Net()
        before = fingerprint(net)
        found = Attention(wrap(net, attention=PLACES), queries="cls").explain(IDS)
        assert fingerprint(net) == before
        for layer, table in enumerate(weights(net)):
            rows = found.select(depth=layer, valid=None)
            np.testing.assert_array_equal(rows["score"].reshape(2, 4), table.amax(1)[:, 0].numpy())
        assert Rollout(wrap(net, attention=PLACES)).explain(IDS).select(example=1)["score"].sum() == pytest.approx(1)

    def test_a_function_may_leave_out_the_head_axis(self) -> None:
        net = Net()
        means = [table.mean(1) for table in weights(net)]
        one = Attention(wrap(net, attention=lambda model, batch: means)).explain(IDS)
        other = Attention(wrap(net, attention=PLACES), heads="mean").explain(IDS)
        np.testing.assert_allclose(one["score"], other["score"], rtol=1e-6)

    def test_a_module_that_gives_no_weights(self) -> None:
        with pytest.raises(NotATensorError, match=r"layers\.0:output\[1\]"):
            Attention(wrap(Net(need_weights=False), attention=PLACES)).explain(IDS)

    def test_a_module_that_is_not_there(self) -> None:
        with pytest.raises(UnknownSiteError, match="layer"):
            Attention(wrap(Net(), attention=["layer.0:output[1]"])).explain(IDS)

    def test_a_function_that_raises_leaves_the_model_as_it_was(self) -> None:
        def broken(model: nn.Module, batch: Any) -> list[Tensor]:
            assert not model.training
            raise Broken("on demand")

        net = Net()
        before = fingerprint(net)
        with pytest.raises(Broken):
            Rollout(wrap(net, attention=broken)).explain(IDS)
        assert fingerprint(net) == before


class TestUnits:
    def test_positions_gated_together_share_their_sum(self) -> None:
        net = Net()
        pairs = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 1]])
        alone, together = wrap(net, attention=PLACES), wrap(net, attention=PLACES, units=lambda batch: pairs)
        for kind, settings in ((Rollout, {}), (Attention, {"heads": "mean"})):
            one = kind(alone, layer=-1, **settings).explain(IDS)["score"].reshape(2, 4)
            other = kind(together, layer=-1, **settings).explain(IDS)["score"].reshape(2, 4)
            middle = one[0, 1] + one[0, 2]
            np.testing.assert_allclose(other[0], [one[0, 0], middle, middle, one[0, 3]], rtol=1e-5)
            np.testing.assert_allclose(other[1], [one[1, :2].sum()] * 2 + [0, 0], rtol=1e-5)

    def test_the_largest_head_is_chosen_for_the_unit(self) -> None:
        table = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0]])[:, None].expand(1, 2, 4, 4)
        hooked = wrap(
            Net(), attention=lambda model, batch: [table] * 2, units=lambda batch: torch.tensor([[0, 0, 1, 2]])
        )
        assert Attention(hooked, layer=0).explain(IDS[:1])["score"].tolist() == [1.0, 1.0, 0.0, 0.0]


class TestRefused:
    def test_a_model_whose_attention_is_not_known(self) -> None:
        hooked = wrap(Gru(), ("embedding:output",))
        for kind in (Attention, Rollout):
            with pytest.raises(ModelError, match=r"not known where Gru has attention.*attention=.*LeaveOneOut"):
                kind(hooked).explain(IDS)

    @pytest.mark.parametrize("layer", [2, -3])
    def test_a_layer_out_of_range(self, layer: int) -> None:
        for kind in (Attention, Rollout):
            with pytest.raises(SettingError, match=f"layer={layer}: there are attention weights of 2 layers"):
                kind(wrap(Net(), attention=PLACES), layer=layer).explain(IDS)

    @pytest.mark.parametrize("queries", [2, -3])
    def test_a_query_that_an_example_does_not_have(self, queries: int) -> None:
        with pytest.raises(SettingError, match=f"queries={queries}: example 1 of the batch has 2 valid positions"):
            Attention(wrap(Net(), attention=PLACES), queries=queries).explain(IDS)
        assert len(Attention(wrap(Net(), attention=PLACES), queries=queries).explain(IDS[:1]))

    @pytest.mark.parametrize(
        "settings", [{"queries": "first"}, {"heads": "min"}, {"layer": "last"}, {"residual": 1.5}, {"residual": -0.1}]
    )
    def test_settings_that_mean_nothing(self, settings: dict[str, Any]) -> None:
        kind: Any = Rollout if "residual" in settings else Attention
        with pytest.raises(SettingError, match=next(iter(settings))):
            kind(wrap(Net(), attention=PLACES), **settings)

    def test_sites_that_do_not_correspond_to_layers(self) -> None:
        hooked = wrap(Net(), ("layers.1:input",), attention=PLACES)
        with pytest.raises(SettingError, match=r"has 1 sites.*attention weights of 2 layers.*2 sites"):
            Attention(hooked).explain(IDS)

    @pytest.mark.parametrize("shape", [(2, 2, 3, 3), (1, 2, 4, 4), (2, 2, 1, 4), (2, 4, 5)])
    def test_weights_of_other_positions(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ModelError, match=r"not from each position of layers\.0:input to each other"):
            Attention(wrap(Net(), attention=constant(*shape))).explain(IDS)

    @pytest.mark.parametrize("value", [-0.1, 0.5, torch.nan])
    def test_numbers_that_are_no_weights(self, value: float) -> None:
        with pytest.raises(ModelError, match="after the softmax"):
            Rollout(wrap(Net(), attention=constant(2, 2, 4, 4, value=value))).explain(IDS)

    @pytest.mark.parametrize("found", [None, "weights", torch.zeros(2, 4), torch.ones(2, 2, 4, 4, dtype=torch.long)])
    def test_what_is_no_tensor_of_weights(self, found: Any) -> None:
        with pytest.raises(ModelError, match="layer 0 of Net gave no attention weights but"):
            Attention(wrap(Net(), attention=lambda model, batch: [found])).explain(IDS)

    def test_no_layer_at_all(self) -> None:
        with pytest.raises(ModelError, match="of no layer"):
            Attention(wrap(Net(), attention=lambda model, batch: [])).explain(IDS)

    def test_a_model_that_predicts_something_else_meanwhile(self) -> None:
        class Moving(maskhooks.Task):
            def attention(self, model: nn.Module, batch: Any) -> Any:
                found = super().attention(model, batch)
                return found._replace(result=found.result + 0.01 * torch.eye(2, 3))

        task = Moving(
            output=lambda logits: Categorical(logits=logits), valid=lambda batch: batch != 0, attention=PLACES
        )
        hooked = maskhooks.wrap(Net(), sites=dict.fromkeys(["layers.0:input", "layers.1:input"], TOKENS), task=task)
        with pytest.raises(ModelError, match="Net predicts something else while it computes attention weights"):
            Attention(hooked).explain(IDS)
