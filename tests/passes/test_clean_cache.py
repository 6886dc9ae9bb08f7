"""The store: what comes out is what a clean pass gives, in memory and on disk, and each epoch has every batch."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch.distributions import Categorical

import maskhooks
from maskhooks import DiffMask
from maskhooks.errors import CacheWarning, CorruptFileError, SettingError
from maskhooks.passes import clean_cache as cache
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.clean_cache import CleanCache, Numbered, Stored
from maskhooks.passes.masked import masked_pass
from maskhooks.seeds import generator
from tests.models import Stack
from tests.training.test_fit import QUICK, batches, wrapped


def stacked():
    """A stack whose layers' returns are changed in place after they were recorded."""
    torch.manual_seed(0)
    sites = {f"layers.{k}:output": "batch token hidden -> batch token" for k in range(3)}
    return maskhooks.wrap(Stack().eval(), sites=sites, output=lambda logits: Categorical(logits=logits))


@pytest.fixture(params=["memory", "folder"])
def place(request, tmp_path):
    return "memory" if request.param == "memory" else tmp_path / "cache"


@pytest.mark.parametrize(("make", "batch"), [(wrapped, batches(1)[0]), (stacked, (torch.randint(0, 10, (2, 3)),))])
def test_masked_passes_are_those_of_the_clean_pass_bit_for_bit(make, batch, place):
    hooked = make()
    explainer = DiffMask(hooked, hooked.sites)
    explainer.fit([batch], steps=1, progress=False)
    sites = explainer.reads
    kept, item, calls = CleanCache.named(place), Numbered(0, batch), []

    def compute():
        calls.append(1)
        return clean_pass(hooked, batch, sites, sites, explainer.recorder)

    for group in explainer.groups:
        wanted = masked_pass(compute(), group, generator(0))[1].logits
        calls.clear()
        for _ in range(2):
            clean = kept.clean(hooked, item, compute, group.reads, group.sites)
            assert torch.equal(masked_pass(clean, group, generator(0))[1].logits, wanted)
            assert set(clean.values) == {str(site) for site in group.reads}
    assert calls == []
    assert len(kept) == 1


def test_a_fit_with_a_store_is_the_fit_without_while_batches_are_the_same(place):
    one = batches(1)
    plain = DiffMask(wrapped(), "layers.1:output", recipe=QUICK).fit(one, one, steps=12, progress=False, cache=None)
    hooked = wrapped()
    kept = DiffMask(hooked, "layers.1:output", recipe=QUICK).fit(one, one, steps=12, progress=False, cache=place)
    assert plain.result.log == [
        {**row, "epoch": other["epoch"]} for row, other in zip(kept.result.log, plain.result.log, strict=True)
    ]
    for mine, other in zip(plain.parts, kept.parts, strict=True):
        assert all(torch.equal(mine.state_dict()[name], value) for name, value in other.state_dict().items())


def test_the_model_runs_once_for_each_batch_and_nothing_is_left(tmp_path):
    hooked = wrapped()
    runs = []
    handle = hooked.model.embedding.register_forward_hook(lambda *_: runs.append(1))
    recipe = dataclasses.replace(QUICK, statistics_batches=1)
    folder = tmp_path / "cache"
    DiffMask(hooked, "layers.2:output", recipe=recipe).fit(batches(3), steps=12, progress=False, cache=folder)
    with_store = len(runs)
    runs.clear()
    DiffMask(hooked, "layers.2:output", recipe=recipe).fit(batches(3), steps=12, progress=False, cache=None)
    handle.remove()
    assert with_store == len(runs) - 9  # three clean passes instead of twelve
    assert list(folder.iterdir()) == []


def test_every_epoch_has_every_batch_once_in_an_order_of_the_seed():
    stored = Stored(list("abcdefgh"), 0, CleanCache())
    epochs = [[item.number for item in stored] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert epochs[0] == list(range(8))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = Stored(list("abcdefgh"), 0, CleanCache())
    assert [[item.number for item in again] for _ in range(3)] == epochs
    other = Stored(list("abcdefgh"), 1, CleanCache())
    assert [[item.number for item in other] for _ in range(3)][1:] != epochs[1:]


def test_bfloat16_halves_the_room_and_rounds():
    hooked, batch = wrapped(), batches(1)[0]
    sites = list(hooked.sites)
    kept = {}
    for dtype in (None, torch.bfloat16):
        keeper = CleanCache(dtype=dtype)
        clean = keeper.clean(hooked, Numbered(0, batch), lambda: clean_pass(hooked, batch, sites), sites, [])
        kept[dtype] = keeper._kept[0].shelf.size, clean
    (full, exact), (half, rounded) = kept[None], kept[torch.bfloat16]
    assert half < 0.7 * full
    assert torch.equal(exact.outputs.logits, rounded.outputs.logits)
    for address, value in exact.values.items():
        assert rounded.values[address].dtype == value.dtype
        assert torch.equal(rounded.values[address], value.bfloat16().float())


def test_what_does_not_fit_is_said_after_the_first_batch(monkeypatch):
    monkeypatch.setattr(cache, "_free", lambda folder: (1000.0, "in memory"))
    with pytest.raises(SettingError, match=r"clean passes of 3 batches would take .*bfloat16"):
        DiffMask(wrapped(), "layers.1:output", recipe=QUICK).fit(batches(), steps=9, progress=False, cache="memory")


def test_beyond_the_limit_clean_passes_are_computed_anew_and_masks_are_the_same():
    some = batches(4)
    whole = DiffMask(wrapped(), "layers.1:output", recipe=QUICK).fit(some, some, steps=12, progress=False)
    cache = CleanCache(limit=int(2.5 * whole_size(some[:1])))
    less = DiffMask(wrapped(), "layers.1:output", recipe=QUICK)
    with pytest.warns(CacheWarning, match=r"of 2 of 4 batches are stored.*cache='FOLDER'"):
        less.fit(some, some, steps=12, progress=False, cache=cache)
    assert less.result.log == whole.result.log
    assert less.explain(some[0])["score"].tolist() == whole.explain(some[0])["score"].tolist()


def whole_size(some):
    """The bytes that all batches take."""
    sizes = []

    class Seen(CleanCache):
        def clear(self):
            sizes.append(self.size)
            super().clear()

    DiffMask(wrapped(), "layers.1:output", recipe=QUICK).fit(some, steps=len(some), progress=False, cache=Seen())
    return max(sizes)


def test_by_default_as_many_are_stored_as_fit_into_half_of_what_is_free(monkeypatch):
    some = batches(4)
    whole = float(whole_size(some[:1]))
    monkeypatch.setattr(cache, "free_memory", lambda: 2 * 2.5 * whole)
    with pytest.warns(CacheWarning, match="of 2 of 4 batches are stored"):
        DiffMask(wrapped(), "layers.1:output", recipe=QUICK).fit(some, steps=8, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        DiffMask(wrapped(), "layers.1:output", recipe=QUICK).fit(some[:2], steps=8, progress=False)
        DiffMask(wrapped(), "layers.1:output", recipe=QUICK).fit(some, steps=8, progress=False, cache=None)


def test_a_loader_without_a_length_stores_none_by_default():
    class Endless:
        def __iter__(self):
            return iter(batches(2))

    for kept in ("auto", CleanCache.named("auto", torch.bfloat16)):  # the second, as the command line gives it
        explainer = DiffMask(wrapped(), "layers.1:output", recipe=QUICK)
        explainer.fit(Endless(), steps=5, cache=kept, progress=False)
        assert len(explainer.result.log) == 5


@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 1}])
def test_batches_that_come_once_are_not_stored_by_default(length, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 0.0)  # a CacheWarning would be an error
    DiffMask(wrapped(), "layers.1:output", recipe=QUICK).fit(batches(3), progress=False, **length)


def test_free_memory_is_what_the_machine_has():
    assert 2**20 < cache.free_memory() < 2**50


def test_a_loader_without_a_length_is_refused():
    with pytest.raises(SettingError, match="needs a loader with a length"):
        Stored((batch for batch in batches()), 0, CleanCache())


def test_whole_numbers_are_no_dtype_for_values():
    with pytest.raises(SettingError, match=r"torch.int8"):
        CleanCache(dtype=torch.int8)


def test_a_file_that_breaks_is_named(tmp_path):
    hooked, batch = wrapped(), batches(1)[0]
    kept, sites = CleanCache(tmp_path), list(hooked.sites)

    def clean():
        return kept.clean(hooked, Numbered(0, batch), lambda: clean_pass(hooked, batch, sites), sites, [])

    clean()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CorruptFileError, match=file.name):
        clean()
