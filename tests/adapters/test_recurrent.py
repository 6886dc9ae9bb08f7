"""torch's recurrent modules step by step: every combination is the fused call, gated states go on, all is put back."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from maskhooks_recurrent.adapter import RecurrentAdapter
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import maskhooks
from maskhooks.checks.doctor import examine
from maskhooks.errors import BatchError, CompiledModelError, ReplacementError, SiteConflictError, SiteFiredTooOftenError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.replay import Replay
from maskhooks.hooks.time_steps import Stepwise
from maskhooks.masks.baselines import Learned
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.masking import Masking
from maskhooks.masks.mix import mix
from maskhooks.passes.forward import clean_pass, onward_pass
from maskhooks.sites.site import Site
from tests.conftest import fingerprint, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS = ["tanh", "relu", "gru", "lstm", "lstm-proj"]
INPUTS = ["batch", "packed", "unsorted", "alone"]
LENGTHS = {"packed": [5, 4, 4, 1], "unsorted": [3, 5, 1, 5]}


def network(kind: str, layers: int = 1, both: bool = False, first: bool = True, **settings: Any) -> nn.RNNBase:
    settings |= {"num_layers": layers, "bidirectional": both, "batch_first": first, "dropout": 0.5 * (layers > 1)}
    if kind in ("tanh", "relu"):
        return nn.RNN(4, 6, nonlinearity=kind, **settings)
    if kind == "gru":
        return nn.GRU(4, 6, **settings)
    return nn.LSTM(4, 6, proj_size=3 if kind == "lstm-proj" else 0, **settings)


def arguments(module: nn.RNNBase, given: str, initial: bool, dtype: torch.dtype) -> tuple[Tensor, Any, Any]:
    """A leaf, the input made of it, and initial states."""
    shape = (5, 4) if given == "alone" else (4, 5, 4) if module.batch_first else (5, 4, 4)
    leaf = torch.randn(shape, dtype=dtype, requires_grad=True)
    x: Any = leaf
    if given in LENGTHS:
        ordered = given == "packed"
        x = pack_padded_sequence(leaf, torch.tensor(LENGTHS[given]), module.batch_first, enforce_sorted=ordered)
    sides = module.num_layers * (1 + module.bidirectional)
    batch = () if given == "alone" else (4,)
    h = torch.randn(sides, *batch, module.proj_size or 6, dtype=dtype)
    states: Any = (h, torch.randn(sides, *batch, 6, dtype=dtype)) if isinstance(module, nn.LSTM) else h
    return leaf, x, states if initial else None


def flat(outputs: Any) -> list[Tensor]:
    output, states = outputs
    states = states if isinstance(states, tuple) else (states,)
    return [output.data if isinstance(output, PackedSequence) else output, *states]


def assert_near(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    for one, other in zip((f.detach() for f in found), (w.detach() for w in wanted), strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= bound * max(float(other.abs().max()), 1e-3)


def open_gates(value: Tensor) -> Tensor:
    return mix(value, torch.ones(value.shape[:2])[..., None], torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_are_the_fused_call(kind: str, given: str, dtype: torch.dtype) -> None:
    for number, (layers, both, bias) in enumerate(itertools.product((1, 2), (False, True), (False, True))):
        first, initial = number % 2 == 0, number % 3 == 0
        module = network(kind, layers, both, first, bias=bias).to(dtype)
        leaf, x, states = arguments(module, given, initial, dtype)
        call = (x,) if states is None else (x, states)
        hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
        with frozen(module):
            usual = module(*call)
        weights = [torch.randn_like(part) for part in flat(usual)]
        slope = torch.autograd.grad(flat(usual), leaf, weights, retain_graph=True)
        before = fingerprint(module)
        with hooked.tap(replace=dict.fromkeys(map(str, hooked.sites), open_gates)):
            gated = module(*call)
        assert fingerprint(module) == before
        assert_near(flat(gated), flat(usual), dtype)
        assert_near(list(torch.autograd.grad(flat(gated), leaf, weights)), list(slope), dtype)
        if isinstance(x, PackedSequence):
            assert same_bits(gated[0].batch_sizes, x.batch_sizes)
            assert (gated[0].sorted_indices is None) == (x.sorted_indices is None)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_state_goes_on_and_the_rest_agrees_with_it(kind: str, given: str) -> None:
    """The recurrence as written down: each state is made from the gated one before it."""
    module = network(kind, both=True).double()
    leaf, x, states = arguments(module, given, True, torch.float64)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    gates = torch.rand(4, 5, 1, dtype=torch.float64)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def gate(name: str) -> Any:
        def replace(value: Tensor) -> Tensor:
            calls = seen.setdefault(name, [])
            at = len(calls) if "reverse" not in name else 4 - len(calls)
            calls.append((value[:, 0], value[:, 0] * gates[: len(value), at]))
            return calls[-1][1][:, None]

        return replace

    with hooked.tap(replace={str(site): gate(site.module) for site in hooked.sites if site.module[0] == "h"}):
        output, last = module(x, states)
    h_n = last[0] if isinstance(last, tuple) else last
    if given == "alone":
        output, h_n = output[None], h_n[:, None]
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, batch_first=True)
    size = h_n.shape[-1]
    lengths = LENGTHS.get(given, [5] * len(output))
    for row, length in enumerate(lengths):
        forward = [new[row] for _, new in seen["h_l0"]][:length]
        backward = [new[row] for _, new in reversed(seen["h_l0_reverse"])][:length]
        assert torch.equal(output[row, :length, :size], torch.stack(forward))
        assert torch.equal(output[row, :length, size:], torch.stack(backward))
        assert torch.equal(h_n[0, row], forward[-1])
        assert torch.equal(h_n[1, row], backward[0])
    if kind in ("tanh", "relu", "gru") and given == "batch":
        cell = {"gru": nn.GRUCell(4, 6), "tanh": nn.RNNCell(4, 6), "relu": nn.RNNCell(4, 6, nonlinearity="relu")}[kind]
        cell.double().load_state_dict({name: getattr(module, f"{name}_l0") for name in cell.state_dict()})
        h = states[0]
        for at in range(5):
            made, h = cell(leaf[:, at], h), seen["h_l0"][at][1]
            before = states[0] if at == 0 else seen["h_l0"][at - 1][1]
            torch.testing.assert_close(cell(leaf[:, at], before), seen["h_l0"][at][0])
            assert made.shape == h.shape


@pytest.mark.parametrize("kind", ["lstm", "lstm-proj"])
def test_a_gated_cell_state_goes_on(kind: str) -> None:
    module = network(kind)
    _, x, _ = arguments(module, "batch", False, torch.float32)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    with hooked.tap(read="h_l0:output", replace={"c_l0:output": torch.zeros_like}) as tap:
        output, (h, c) = module(x)
    assert not c.any()
    assert not h.any()  # o * tanh(0)
    assert torch.equal(tap.values["h_l0:output"], output)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_give_exactly_no_gradient(kind: str, given: str) -> None:
    module = network(kind, layers=2)
    _, x, states = arguments(module, given, True, torch.float32)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    for address in ("inputs:output", "h_l0:output", "h_l1:output"):
        values: list[Tensor] = []

        def close(value: Tensor, values: list[Tensor] = values) -> Tensor:
            values.append(value.detach().requires_grad_())
            return mix(values[-1], torch.zeros(*value.shape[:2], 1), torch.randn(value.shape[-1]).requires_grad_())

        with hooked.tap(replace={address: close}):
            sum(part.sum() for part in flat(module(x, states))).backward(retain_graph=True)
        assert values
        assert all(value.grad is not None and not value.grad.any() for value in values)


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


def test_single_steps_are_calls_in_the_order_of_computation() -> None:
    module = nn.GRU(4, 6, batch_first=True, bidirectional=True)
    hooked, x = maskhooks.wrap(module, adapter=RecurrentAdapter), torch.randn(3, 5, 4)
    with hooked.tap(read=["h_l0:output", "h_l0@1:output", "h_l0_reverse@*:output"]) as tap:
        output, _ = module(x)
    assert torch.equal(tap.values["h_l0@1:output"], output[:, 1, :6])
    assert torch.equal(tap.values["h_l0:output"], output[..., :6])
    assert torch.equal(tap.values["h_l0_reverse@0:output"], output[:, 4, 6:])
    with hooked.tap(replace={"h_l0@2:output": torch.zeros_like}):
        output, _ = module(x)
    assert [bool(output[:, at, :6].any()) for at in range(5)] == [True, True, False, True, True]
    wanted = torch.randn(3, 5, 6)
    with hooked.tap(replace={"h_l0:output": lambda value: wanted}):  # all steps at once
        assert torch.equal(module(x)[0][..., :6], wanted)


@pytest.mark.parametrize("cell", [nn.RNNCell(4, 6), nn.GRUCell(4, 6)], ids=["rnn", "gru"])
def test_cells_in_a_loop_of_the_users_are_reached_by_calls(cell: nn.Module) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 6)
            for at in range(x.shape[1]):
                h = self.cell(x[:, at], h)
            return h

    model = Loop()
    hooked, x = maskhooks.wrap(model), torch.randn(3, 5, 4)
    other = torch.cat([torch.randn(3, 3, 4), x[:, 3:]], 1)
    with hooked.tap(read="cell@*:output", replace={"cell@2:output": torch.zeros_like}) as tap:
        closed = model(x)
        assert torch.equal(closed, model(other))
    assert list(tap.values) == [f"cell@{at}:output" for at in range(5)]
    assert not torch.equal(model(x), model(other))


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


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_autocast_decides_as_in_the_fused_call(kind: str, given: torch.dtype) -> None:
    module = network(kind, both=True)
    x = torch.randn(3, 5, 4).to(given)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    for grad in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            usual = module(x)
            with hooked.tap(replace=dict.fromkeys(map(str, hooked.sites), open_gates)):
                gated = module(x)
        for one, other in zip(flat(gated), flat(usual), strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_eval_mode_on_a_gpu(kind: str, unchanged: Any) -> None:
    model = unchanged(nn.Sequential(nn.Linear(4, 4), network(kind, layers=2)).cuda().eval())
    hooked, x = maskhooks.wrap(model, adapter=RecurrentAdapter), torch.randn(3, 5, 4, device="cuda")
    usual = model(x)
    leaf = torch.randn(3, 5, 4, device="cuda", requires_grad=True)
    for address in ("0:output", "1.inputs:output"):
        with hooked.tap(replace={address: lambda value: leaf}):
            (slope,) = torch.autograd.grad(model(x)[0].sum(), leaf)
        assert slope.any()
    with hooked.tap(replace={"1.h_l0:output": torch.clone}):
        torch.testing.assert_close(flat(model(x)), flat(usual), rtol=1e-5, atol=1e-6)


class Classifier(nn.Module):
    """Is the largest token above 7?"""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.rnn = nn.GRU(8, 12, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        return torch.distributions.Categorical(logits=self.head(self.rnn(packed)[1][-1]))


def draw(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(10, (count, 6)), torch.randint(2, 7, (count,))


def real(batch: Any) -> Tensor:
    return torch.arange(6)[None, : int(batch[1].max())] < batch[1][:, None]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(1)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        ids, lengths = draw(64)
        there = torch.arange(6) < lengths[:, None]
        labels = (torch.where(there, ids, 0) > 7).any(1).long()
        optimizer.zero_grad()
        (-model(ids, lengths).log_prob(labels).mean()).backward()
        optimizer.step()
    return model


def test_diffmask_learns_to_drop_states_of_a_gru(classifier: Classifier) -> None:
    hooked = maskhooks.wrap(classifier, adapter=RecurrentAdapter, real=real)
    batches = [draw(32) for _ in range(4)]
    kept = []
    for steps in (1, 80):
        explainer = maskhooks.DiffMask(hooked, "rnn.h_l0:output", margin=0.3)
        explainer.fit(batches, steps=steps, progress=False, accelerator="cpu")
        (row,) = [row for row in explainer.evaluate(batches) if row["site"] == "rnn.h_l0:output"]
        kept.append(row["expected_l0"])
    assert kept[1] < kept[0] - 0.2
    assert ("rnn.h_l0:output", 1) in explainer.explain(batches[0]).mean_kept()


def test_an_empty_sequence_is_named_where_masks_are_optimised(classifier: Classifier) -> None:
    hooked = maskhooks.wrap(classifier, adapter=RecurrentAdapter, real=real)
    explainer = maskhooks.DiffMask(hooked, "rnn.h_l0:output", amortized=False)
    with pytest.raises(BatchError, match="a sequence in the batch is empty"):
        explainer.explain((draw(3)[0], torch.tensor([6, 0, 2])))


def test_replay_skips_what_comes_before_the_module(classifier: Classifier) -> None:
    hooked = maskhooks.wrap(classifier, adapter=RecurrentAdapter, real=real)
    site, batch, replay = hooked.sites["rnn.h_l0:output"], draw(4), Replay(classifier)
    clean = clean_pass(hooked, batch, [site], [site], replay)
    assert replay._skippable(site) == [classifier.embed]
    onward = onward_pass(hooked, clean, site, torch.clone)
    torch.testing.assert_close(onward.logits, clean.outputs.logits, rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]


def test_doctor_of_a_gru(classifier: Classifier) -> None:
    def vary(batch: Any, generator: torch.Generator) -> Any:
        return torch.randint(10, batch[0].shape, generator=generator), batch[1]

    hooked = maskhooks.wrap(classifier, adapter=RecurrentAdapter, real=real, vary=vary)
    report = maskhooks.examine(hooked, draw(8))
    assert report.healthy, str(report)
    assert [finding.bypassed for finding in report.findings] == [False, False]


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_gates_without_gradients_are_those_with_them(kind: str) -> None:
    module = network(kind, both=True)
    _, x, _ = arguments(module, "batch", False, torch.float32)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    baseline = Learned(torch.tensor([-0.0, 1.0, float("inf"), 0.5, -1.0, 2.0]))
    baseline.start((6,))
    masking = Masking(hooked.sites["h_l0:output"], 0, [], HardConcrete(), baseline)
    value, there = torch.randn(4, 5, 6), torch.ones(4, 5, dtype=torch.bool)
    value[0, :, 0] = -0.0
    sample = torch.tensor([0.0, 1.0, 0.3, 0.7, 1.0]).expand(4, 5).contiguous()
    onto = masking.onto(masking.mask(value, there, sample))
    assert isinstance(onto, Stepwise)
    for step in range(5):
        with torch.no_grad():
            quick = onto.on(step, value[:, step])
        usual = onto.at(step)(value[:, step : step + 1])[:, 0]
        if sample[0, step] in (0, 1):
            assert same_bits(quick, usual)
        else:  # but for the infinite one
            torch.testing.assert_close(quick[:, [0, 1, 3, 4, 5]], usual[:, [0, 1, 3, 4, 5]])
    sample = sample.flip(0)
    sample[:, 0] = 1.0
    baseline = Learned(torch.randn(6))
    baseline.start((6,))
    masking = Masking(hooked.sites["h_l0:output"], 0, [], HardConcrete(), baseline)
    onto = masking.onto(masking.mask(value, there, sample))
    with hooked.tap(replace={"h_l0:output": onto}):
        usual = flat(module(x))
        with torch.no_grad():
            assert_near(flat(module(x)), usual, torch.float32)
            with hooked.tap(read="h_l0:output") as inner:
                module(x)
    assert_near([inner.values["h_l0:output"]], [usual[0][..., :6]], torch.float32)


def test_a_module_that_reads_two_sequences_is_reported_and_listed() -> None:
    model, pair = Siamese(), (torch.randn(3, 5, 4), torch.randn(3, 6, 4))
    before = fingerprint(model)
    hooked = maskhooks.wrap(model, adapter=RecurrentAdapter, output=rows_of)
    report = examine(hooked, pair)
    assert fingerprint(model) == before
    assert [(str(f.site), f.calls) for f in report.findings] == [("rnn.inputs:output", 2), ("rnn.h_l0:output", 11)]
    assert report.findings[0].trouble.endswith("address one call, rnn.inputs@0:output to rnn.inputs@1:output")
    assert report.findings[1].trouble.endswith("address one call, rnn.h_l0@0:output to rnn.h_l0@10:output")
    assert not report.healthy
    one = examine(hooked, pair, ["rnn.inputs@1:output", "rnn.h_l0@7:output"])
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
    (finding,) = examine(hooked, x, step).findings
    assert (finding.shape, finding.trouble) == ((3, 6), "")
    explanation = maskhooks.LeaveOneOut(hooked, "0.h_l0@3:output").explain(x)
    assert len(explanation["score"]) == 3
    split = maskhooks.wrap(model, sites={"0.h_l0:output": "batch token (part hidden) -> part token batch, part=2"})
    assert str(split.find("0.h_l0@3:output")[0].gating()) == "batch (part hidden) -> part batch, part=2"
    for arrow in ("batch token hidden -> token", "batch (token) hidden -> batch"):
        odd = maskhooks.wrap(model, sites={"0.h_l0:output": arrow})
        assert odd.find("0.h_l0@3:output")[0].pattern is not None
