"""Trials and doctor: why a site is silent, what a copy changes, whether gradients come back, whose hooks are there."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks.checks.doctor import Report, check_gradients, doctor
from maskhooks.checks.site_checks import owners
from maskhooks.errors import BatchError, GradientError, TappedModelError, UnfiredSiteWarning
from maskhooks.hooks.tap import Tap
from maskhooks.sites.site import Site
from tests.models import Cell, Tiny

LAYOUTS = {"strided": torch.strided, "jagged": torch.jagged}


class Odd(Tiny):
    """Goes wrong in one way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.site, self.last = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 2)
        self.act = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Any:
        hidden = self.first(x)
        if self.how == "by another name":
            self.act(self.site(hidden))  # the identity returns the very tensor
        elif self.how == "forward called":
            hidden = self.site.forward(hidden)
        elif self.how == "weights taken":
            return nn.functional.linear(hidden, self.last.weight)
        elif self.how == "detached":
            hidden = self.site(hidden).detach()
        elif self.how == "without gradients":
            with torch.no_grad():
                hidden = self.site(hidden)
        elif self.how == "unused":
            pass
        else:
            hidden = self.site(hidden)
        return self.last(hidden)


def report(model: nn.Module, address: str = "site:output", x: Any = None) -> Report:
    return doctor(maskhooks.wrap(model, sites=[address]), torch.randn(3, 4) if x is None else x)


@pytest.mark.parametrize(
    ("how", "address", "trouble"),
    [
        ("nothing", "site:output", ""),
        ("by another name", "site:output", "open gates change the output's bits: the model changes the value in place"),
        ("forward called", "site:output", "never fired: its forward is called directly, which skips hooks"),
        ("weights taken", "last:output", "never fired: linear takes its weights (a fused path)"),
        ("unused", "site:output", "never fired: not used for this batch, or only in compiled code"),
        (
            "detached",
            "site:output",
            "its replacement requires grad, but no output of the model does",
        ),
        ("without gradients", "site:output", "its module runs without gradients, within torch.no_grad()"),
    ],
)
def test_what_doctor_says(how: str, address: str, trouble: str, unchanged: Callable[[nn.Module], nn.Module]) -> None:
    model = Odd(how)
    batch = torch.randn(3, 4)
    unchanged(model)
    found = report(model, address, batch)
    assert found.findings[0].trouble.startswith(trouble)
    assert bool(found.findings[0].trouble) == bool(trouble)
    assert found.healthy == (not trouble)
    assert (trouble or "site:output") in str(found)


@pytest.mark.parametrize(("address", "calls"), [("cell:output", 3), ("cell@3:output", 3), ("cell@2:output", 3)])
def test_calls(address: str, calls: int) -> None:
    (finding,) = report(Cell(), address, torch.randn(2, 3, 4)).findings
    assert finding.calls == calls
    assert ("fires 3 times" in finding.trouble) == ("@2" not in address)


@pytest.mark.parametrize("around", [False, True])
def test_all_calls_closed_at_once(around: bool) -> None:
    class Loop(Cell):
        def body(self, x: Tensor) -> Tensor:
            states = super().body(x)
            return states + x[:, :1, 0] if around else states

    hooked = maskhooks.wrap(Loop(), sites=["cell@*:output", "cell@1:output"])
    every, single = doctor(hooked, torch.randn(2, 3, 4)).findings
    assert (every.bypassed, every.trouble) == (around, "")
    assert single.bypassed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_give_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no kernels for quantised modules")
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert report(model, "0:output").healthy
    (finding,) = report(quantised, "0:output").findings
    assert finding.bypassed is False
    assert finding.trouble.startswith("no gradient comes back: it is zero everywhere, as after a quantised module")
    (last,) = report(quantised, "2:output").findings
    assert last.trouble == ""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("kind", ["strided", "jagged", "sparse"])
def test_batches_and_outputs_that_are_no_rows_and_columns(kind: str) -> None:
    """Such a value at a site is refused; a site beside it is looked at as ever."""
    rows = [torch.randn(2, 3), torch.randn(4, 3)]
    batch = torch.eye(3).to_sparse() if kind == "sparse" else torch.nested.nested_tensor(rows, layout=LAYOUTS[kind])

    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bias = nn.Identity(), nn.Linear(1, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x), self.bias(torch.ones(2, 1))

    sites = {"first:output": "batch hidden -> batch", "bias:output": "batch hidden -> batch"}
    found = doctor(maskhooks.wrap(Passes(), sites=sites), batch)
    first, bias = found.findings
    assert ("to_padded_tensor" in first.trouble) == (kind != "sparse")
    assert not bias.trouble
    if kind == "sparse":
        with torch.no_grad(), maskhooks.wrap(Passes()).tap(replace={"first:output": lambda value: value * 2}) as tap:
            assert torch.equal(tap.model(batch)[0].to_dense(), 2 * torch.eye(3))
    with pytest.raises(BatchError, match=r"\(nested\)|\[3, 3\]"):
        maskhooks.wrap(nn.Bilinear(3, 3, 2))((batch, batch, batch, batch)[:1])


def rows(outputs: Tensor) -> Categorical:
    return Categorical(logits=outputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_values_that_no_mask_is_learned_on(dtype: torch.dtype) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cast, self.head = nn.Identity(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.cast(x.to(dtype)).real.float())
            return result

    hooked = maskhooks.wrap(Casts(), sites={"cast:output": "batch hidden -> batch"}, output=rows)
    (found,) = doctor(hooked, torch.randn(4, 3)).findings
    assert found.trouble == f"its values are {dtype}, but masks are learned on floating-point values"
    with pytest.raises(GradientError, match=r"masks are learned on floating-point values\. Mask a later site"):
        maskhooks.DiffMask(hooked, "cast:output", margin=0.1).fit([torch.randn(4, 3)], steps=1, progress=False)
    (read,) = doctor(maskhooks.wrap(Casts(), sites=["cast:output"], output=rows), torch.randn(4, 3)).findings
    assert not read.trouble
    with torch.no_grad(), hooked.tap(read="cast:output", replace={"cast:output": torch.zeros_like}) as tap:
        assert torch.equal(hooked(torch.randn(4, 3)), hooked(torch.randn(4, 3)))
    assert tap.values["cast:output"].dtype == dtype


def test_owners_of_hooks() -> None:
    model = nn.Linear(2, 2)
    assert owners(model) == []
    model.register_forward_hook(functools.partial(print, end=""))
    model.register_forward_pre_hook(lambda *_: None)
    model.forward = functools.partial(nn.Linear.forward, model)  # type: ignore[method-assign]
    assert owners(model) == ["builtins", "tests", "torch"]


def test_an_object_is_of_the_package_of_its_class() -> None:
    """Though it carries the name, and the module's name, of what it wraps, as nnsight's do."""

    class Hook:
        __call__ = staticmethod(print)

    model = nn.Linear(2, 2)
    vars(model)["forward"] = functools.update_wrapper(Hook(), nn.Linear.forward)
    assert vars(model)["forward"].__module__ == "torch.nn.modules.linear"
    assert owners(model) == ["tests"]


def test_hooks_of_others_are_in_the_report() -> None:
    model = Odd("nothing")
    model.site.register_forward_hook(lambda *_: None)
    found = report(model)
    assert found.findings[0].foreign_hooks == 1
    assert found.rows()[0]["foreign hooks"] == "1 of tests"
    assert found.others == {"tests": 1}
    assert "hooks of other libraries: tests on 1 module. They keep" in str(found)
    assert found.healthy


def test_what_stands_around_a_place_is_in_the_report() -> None:
    """A place is no module of the model; the hooks are those of the module that computes what passes it."""
    rnn = nn.GRU(3, 4, batch_first=True)
    rnn.register_forward_hook(lambda *_: None)
    found = maskhooks.doctor(
        maskhooks.wrap(rnn, output=lambda out: Categorical(logits=out[1][0])), torch.randn(2, 5, 3)
    )
    assert {finding.foreign_hooks for finding in found.findings} == {1}
    assert {tuple(finding.foreign) for finding in found.findings} == {("tests",)}
    vars(rnn)["forward"] = functools.partial(nn.GRU.forward, rnn)
    rnn._forward_hooks.clear()
    found = maskhooks.doctor(
        maskhooks.wrap(rnn, output=lambda out: Categorical(logits=out[1][0])), torch.randn(2, 5, 3)
    )
    assert {row["foreign hooks"] for row in found.rows()} == {"forward of torch"}


def both(outputs: Tensor) -> Categorical:
    return Categorical(logits=outputs.sum(1))


def test_the_report_of_a_model_without_sites_says_so() -> None:
    report = doctor(maskhooks.wrap(nn.Linear(4, 2)), torch.randn(3, 4))
    assert str(report).startswith("no sites are listed: wrap(model, sites=...) lists some\noutput: unknown")


def test_the_report_says_why_a_way_around_is_unknown() -> None:
    hooked = maskhooks.wrap(nn.Embedding(9, 3), sites={":output": "batch token hidden -> batch token"}, output=both)
    words = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert "bypassed unknown: no other input could be made" in str(maskhooks.doctor(hooked, words))
    known = maskhooks.wrap(hooked.model, sites=list(hooked.sites), output=both, valid=lambda batch: batch != 0)
    assert "bypassed unknown" not in str(maskhooks.doctor(known, words))


def test_hooks_removed_by_others_are_noticed() -> None:
    """Some libraries delete every hook of a model."""
    model, batch = Odd("nothing"), torch.randn(3, 4)
    tap = Tap(model, [Site.parse("site:output")])
    tap.__enter__()
    model(batch)
    for module in model.modules():
        module._forward_hooks.clear()
    model(batch)
    with pytest.raises(TappedModelError, match="another library removed them"):
        tap.__exit__(None, None, None)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_a_kernel_that_refuses_gradients_before_any_backward() -> None:
    class Kernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                raise NotImplementedError("no backward on this device")
            return x * 2

    hooked = maskhooks.wrap(nn.Sequential(nn.Linear(4, 4), Kernel()), sites={"0:output": "batch hidden -> batch"})
    (finding,) = doctor(hooked, torch.randn(2, 4)).findings
    assert finding.trouble == "no gradient comes back: no backward on this device"
    with pytest.raises(GradientError, match="no backward on this device"):
        check_gradients(hooked, torch.randn(2, 4), hooked.find("0:output"))


def test_masks_are_not_learned_where_no_gradient_comes_back():
    class Rounded(nn.Module):
        def forward(self, x):
            return x.round()  # its gradient is zero everywhere, and nothing else says so

    model = nn.Sequential(nn.Linear(4, 8), Rounded(), nn.Linear(8, 3))
    hooked = maskhooks.wrap(
        model,
        sites={"0:output": "batch token hidden -> batch token"},
        output=lambda outputs: Categorical(logits=outputs.mean(1)),
    )
    batches = [torch.randn(4, 5, 4)]
    with pytest.raises(GradientError, match=r"0:output: no gradient comes back: it is zero everywhere"):
        maskhooks.DiffMask(hooked, "0:output").fit(batches, batches, steps=2, progress=False)


def test_masks_are_not_learned_from_hard_decisions():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    sites = {"0:output": "batch feature -> batch feature"}

    def hard(logits):
        return Categorical(probs=nn.functional.one_hot(logits.argmax(-1), 3).float())

    batches = [torch.randn(8, 4)]
    for amortized in (True, False):
        explainer = maskhooks.DiffMask(maskhooks.wrap(model, sites=sites, output=hard), amortized=amortized)
        with pytest.raises(GradientError, match=r"0:output: no gradient comes back from the output distribution"):
            explainer.fit(batches, batches, steps=2 if amortized else None, progress=False)


class Beside(nn.Module):
    """Two layers side by side, of which only the first is returned."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, x):
        self.idle(x)
        return self.used(x)


def test_sites_on_which_nothing_depends_are_left_out():
    pattern = "batch feature -> batch feature"
    hooked = maskhooks.wrap(Beside(), sites={"idle:output": pattern, "used:output": pattern}, output=_logits)
    batches = [torch.randn(4, 4)]
    with pytest.raises(GradientError, match=r"idle:output: no output of the model .* Leave it out"):
        maskhooks.DiffMask(hooked, "idle:output").fit(batches, steps=2, progress=False)
    masks = maskhooks.DiffMask(hooked)
    with pytest.warns(UnfiredSiteWarning, match=r"does not depend on idle:output, so there is no mask to learn there"):
        masks.fit(batches, steps=2, progress=False)
    assert masks.explain(batches[0]).sites == ("used:output",)
    free = maskhooks.DiffMask(hooked, amortized=False, recipe=maskhooks.Recipe(steps=2)).explain(batches[0])
    assert (free.select(site="idle:output")["score"] < 0.01).all()
    assert (free.select(site="used:output")["score"] > 0.5).all()


def _logits(outputs):
    return Categorical(logits=outputs)
