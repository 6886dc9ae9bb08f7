"""A folder with a tiny network of one's own, and a folder with a tiny transformer and its tokenizer."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping

_shapes = jaxtyping.install_import_hook("maskhooks_transformers", "beartype.beartype")

import pytest  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

NETWORK = '''
import torch
from torch import nn
from torch.distributions import Categorical

import maskhooks


class Network(nn.Module):
    """Two classes from the mean of token states; token 0 is padding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.past = nn.Embedding(10, 4)
        self.goes_around = False

    def forward(self, tokens):
        real = (tokens != 0).float()[..., None]
        states = torch.tanh(self.layer(self.embed(tokens)))
        if self.goes_around:
            states = states + self.past(tokens)
        return self.head((states * real).sum(1) / real.sum(1))


PATTERN = "batch token hidden -> batch token"
SITES = {"embed:output": PATTERN, "layer:output": PATTERN}


def wrapped(**given):
    torch.manual_seed(0)
    return maskhooks.wrap(
        Network(),
        sites=given.pop("sites", SITES),
        output=lambda logits: Categorical(logits=logits),
        valid=lambda batch: batch[0] != 0,
        names=lambda batch: [[f"token {token}" for token in row] for row in batch[0].tolist()],
        **given,
    )


def batches(count):
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(1, 10, (count, 4, 5), generator=generator)
    tokens[:, 0, 3:] = 0
    return [(batch,) for batch in tokens]


def bare():
    return wrapped()


def with_data():
    return wrapped(), batches(6), batches(2)


def train_only():
    return wrapped(), batches(6)


def module():
    return Network()


def never_fires():
    return wrapped(sites={**SITES, "past:output": PATTERN}), batches(2)


def bypassed():
    hooked = wrapped()
    hooked.model.goes_around = True
    return hooked, batches(2)


def of_texts():
    def batch(records):
        rows = [[int(word) for word in record.text.split()] for record in records]
        width = max(map(len, rows))
        return (torch.tensor([row + [0] * (width - len(row)) for row in rows]),)

    from maskhooks.model.source import Opened

    return Opened(wrapped(), batch=batch)


def single_batch():
    return Network(), torch.zeros(2, 3, dtype=torch.long)


def with_arguments(size):
    return Network()


def no_batch():
    return Network(), []


def something_else():
    return "a network"


def fails():
    import no_such_library


class Holder:
    @staticmethod
    def make():
        return wrapped()


number = 3
'''

WORDS = ["good", "bad", "film", "a", "the", "very", "(", ")", "it", "'s", "."]


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs the command line: `run("fit", model, "--out", folder)`."""
    from maskhooks.cli.app import app

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return invoke


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The module name of a tiny network in the current folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tiny_network.py").write_text(NETWORK, encoding="utf-8")
    importlib.invalidate_caches()
    yield "tiny_network"
    sys.modules.pop("tiny_network", None)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT that classifies texts, and a tokenizer of a few words."""
    return _save(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny GPT-2 that classifies texts and has no padding token."""
    return _save(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


def _save(folder: Path, family: str) -> Path:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert = family == "bert"
    named = {"pad_token": "[PAD]", "mask_token": "[MASK]"} if bert else {"eos_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", **named
    )
    sizes = (
        {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        if bert
        else {"n_embd": 8, "n_layer": 2, "n_head": 2}
    )
    positions = {"max_position_embeddings" if bert else "n_positions": 12}
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=len(vocabulary),
        id2label={0: "negative", 1: "neutral", 2: "positive"},
        label2id={"negative": 0, "neutral": 1, "positive": 2},
        **sizes,
        **positions,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():  # larger than initialised, so that predictions differ
            weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
