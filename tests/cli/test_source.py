"""Sources: which one a MODEL is for, the factory's, and the transformers' one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from maskhooks_transformers.source import TransformersSource

from maskhooks.data.records import Record
from maskhooks.errors import (
    BatchError,
    MissingExtraError,
    ModelError,
    PluginError,
    SettingError,
    StorageError,
)
from maskhooks.model.hooked import Hooked
from maskhooks.model.source import SOURCES, Factory, Opened, Source, choose
from maskhooks.plugins.registry import registry


class Zoo(Source):
    form = "zoo/animal"

    def claims(self, model: str) -> bool:
        return model.startswith("zoo/")

    def open(self, model: str, *, max_length: int = 128) -> Opened:
        raise NotImplementedError


def test_choose_by_what_is_written(bert: Path, network: str) -> None:
    sources = registry.parts(SOURCES)
    assert isinstance(choose(f"{network}:bare", sources), Factory)
    assert isinstance(choose("package.inner.module:Class.make", sources), Factory)
    for model in (str(bert), "gpt2", "owner/model-name_1.0"):
        assert isinstance(choose(model, sources), TransformersSource)


@pytest.mark.parametrize("model", ["./no_such_folder", "a/b/c", "module:", ":factory", "mod-ule:factory", ""])
def test_nobody_claims(model: str) -> None:
    with pytest.raises(PluginError, match=r"no source knows .* package\.module:factory, .* hub id"):
        choose(model, registry.parts(SOURCES))


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="no source knows"):
        choose(str(tmp_path), registry.parts(SOURCES))


def test_two_claim_one_model() -> None:
    sources = {"transformers": TransformersSource(), "zoo": Zoo()}
    with pytest.raises(PluginError, match=r"transformers and zoo both claim the model 'zoo/lion'"):
        choose("zoo/lion", sources)


# The factory's


@pytest.mark.parametrize(
    ("factory", "train", "validation"),
    [("bare", None, None), ("Holder.make", None, None), ("train_only", 6, None), ("with_data", 6, 2)],
)
def test_factory(network: str, factory: str, train: int | None, validation: int | None) -> None:
    opened = Factory().open(f"{network}:{factory}")
    assert [str(site) for site in opened.hooked.sites] == ["embed:output", "layer:output"]
    for batches, count in ((opened.train, train), (opened.validation, validation)):
        assert batches is None if count is None else len(list(batches)) == count


def test_factory_of_a_plain_module_or_of_opened(network: str) -> None:
    assert isinstance(Factory().open(f"{network}:module").hooked, Hooked)
    opened = Factory().open(f"{network}:of_texts")
    assert opened.batch is not None
    (tokens,) = opened.batch([Record("1 2 3"), Record("4")])
    assert tokens.tolist() == [[1, 2, 3], [4, 0, 0]]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tiny_networks:bare", "no module 'tiny_networks' to import.*Run from the folder"),
        ("tiny_network.inner:bare", "no module 'tiny_network.inner' to import"),
        ("tiny_network:bar", r"has no 'bar'\. Did you mean .*'bare'"),
        ("tiny_network:Holder.mak", r"has no 'Holder.mak'\. Did you mean 'make'"),
        ("tiny_network:qqq", r"has no 'qqq'\. Give the name of a function"),
        ("tiny_network:number", "is not a function"),
        ("tiny_network:with_arguments", r"cannot be called without arguments: .*'size'. Give each one a default"),
        ("tiny_network:something_else", "returned str instead of a model"),
        ("tiny_network:single_batch", r"returned a Tensor as batches.*\(model, \[batch\]\)"),
    ],
)
def test_factory_that_gives_no_model(network: str, model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Factory().open(model)


def test_errors_of_the_factorys_own_code_come_through(network: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        Factory().open(f"{network}:fails")


# transformers'


def test_transformers_opens_a_folder(bert: Path) -> None:
    opened = TransformersSource().open(str(bert))
    model = opened.hooked.model
    assert type(model).__name__ == "BertForSequenceClassification"
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert len(opened.hooked.sites.tagged("hidden")) == 4
    assert opened.train is opened.validation is None


def test_batches_of_texts(bert: Path) -> None:
    opened = TransformersSource().open(str(bert))
    assert opened.batch is not None
    batch = opened.batch([Record("good film", label="positive"), Record("a very bad film", label=0)])
    assert batch["input_ids"].tolist() == [[2, 5, 7, 3, 0, 0], [2, 8, 10, 6, 7, 3]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 6]
    assert batch["labels"].tolist() == [2, 0]
    task = opened.hooked.task
    assert task.targets(batch) == ["positive", "negative"]
    assert task.names(opened.hooked.sites[0], batch)[0][:4] == ["[CLS]", "good", "film", "[SEP]"]
    outputs = opened.hooked.distribution(opened.hooked(batch), batch)
    assert set(task.predictions(outputs)) <= {"negative", "neutral", "positive"}


def test_batches_of_pairs_and_without_labels(bert: Path) -> None:
    opened = TransformersSource().open(str(bert))
    assert opened.batch is not None
    batch = opened.batch([Record("good", text_pair="bad film"), Record("a", text_pair="the", label=1)])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 6, 7, 3], [2, 8, 3, 9, 3, 0]]
    assert "labels" not in batch


@pytest.mark.parametrize(("wanted", "given"), [(5, 5), (500, 12)])
def test_long_texts_are_cut(bert: Path, wanted: int, given: int) -> None:
    opened = TransformersSource().open(str(bert), max_length=wanted)
    assert opened.batch is not None
    batch = opened.batch([Record(" ".join(["film"] * 40))])
    assert batch["input_ids"].shape == (1, given)
    opened.hooked(batch)


def test_model_without_a_padding_token(gpt2: Path) -> None:
    opened = TransformersSource().open(str(gpt2))
    assert opened.batch is not None
    batch = opened.batch([Record("good film", label=2), Record("a very bad film", label=0)])
    assert opened.hooked(batch).logits.shape == (2, 3)
    assert batch["attention_mask"].sum(1).tolist() == [4, 6]


def test_unknown_label(bert: Path) -> None:
    opened = TransformersSource().open(str(bert))
    assert opened.batch is not None
    with pytest.raises(BatchError, match=r"no label 'positiv'; it has negative, .*'positive'"):
        opened.batch([Record("good", label="positiv")])


def test_models_that_cannot_be_loaded(tmp_path: Path, bert: Path) -> None:
    source = TransformersSource()
    with pytest.raises(StorageError, match="'no_such_owner/model' cannot be loaded: "):
        source.open("no_such_owner/model")
    with pytest.raises(SettingError, match="at least 2 tokens"):
        source.open(str(bert), max_length=1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StorageError, match="cannot be loaded"):
        source.open(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="names none"):
        source.open(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForJokes"]}')
    with pytest.raises(ModelError, match=r"names BertForJokes, which transformers .* does not have"):
        source.open(str(tmp_path))
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())  # without weights
    with pytest.raises(StorageError, match="cannot be loaded"):
        source.open(str(tmp_path))


def test_opening_is_quiet(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import transformers

    level = transformers.utils.logging.get_verbosity()
    TransformersSource().open(str(bert))
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == level
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_transformers_is_not_installed(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    with pytest.raises(MissingExtraError, match=r"pip install 'maskhooks\[transformers\]'"):
        TransformersSource().open(str(bert))


def test_source_of_a_plugin_is_found() -> None:
    class Plugin:
        from maskhooks.plugins.hookspecs import hookimpl

        @hookimpl
        def maskhooks_sources(self) -> Any:
            return {"zoo": Zoo()}

    registry.register(Plugin(), "zoo-plugin")
    try:
        assert isinstance(registry.parts(SOURCES)["zoo"], Zoo)
    finally:
        registry.unregister("zoo-plugin")
