"""Masks of a GRU's words compared with the true optimum: non-amortised DiffMask, REINFORCE and exact search (table 2).

A single-layer GRU reads the word pieces of `$MASKHOOKS_DATA/data/sst` (default ../shared) as frozen word embeddings of
`$MASKHOOKS_DATA/models/minilm-sst5`, in packed sequences, trained from scratch. Positions are words: their pieces
are gated together, and an erased word's embeddings are zero. For each dev sentence that is short enough, the search
finds all smallest sets of words that keep the prediction. Masks are rounded at one half, and compared directly with the
best matching set: none is tried on the model, and none is repaired. Figures are means over sentences (De Cao et al.
2020, section 3.2); an empty set against an empty set counts 1, against any other 0.

    python benchmarks/sst_gru.py [--quick] [--tune] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import maskhooks
from maskhooks import DiffMask, Explanation, Random, Recipe, Reinforce
from maskhooks.data import sst
from maskhooks.errors import MaskhooksWarning
from maskhooks.explainers.erasure import Erasure
from maskhooks.model.outputs import lost_lead
from maskhooks.progress import track

TRAINED: dict[str, Any] = {
    "hidden": 64,
    "rate": 3e-3,
    "dropout": 0.3,
    "epochs": 6,
    "batch": 64,
    "scale": 5.0,  # factor of the embeddings; their standard deviation is then about .28
    "held_out": 1000,  # training sentences for tuning the explainers
    "seed": 0,
}
MARGIN = 0.02
# The best settings of each on the held-out sentences; everything else is the same for both.
TUNED: dict[str, dict[str, float]] = {"diffmask": {}, "reinforce": {"logit_learning_rate": 0.3}}
TOGETHER = 211  # sentences of similar length explained in one batch
SITE = "rnn.inputs:output"
Batch = dict[str, Tensor]


class Classifier(nn.Module):
    """Frozen word embeddings, dropout, a GRU, and a linear layer on its last state."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embeddings)
        self.rnn = nn.GRU(embeddings.shape[1], TRAINED["hidden"], batch_first=True)
        self.head = nn.Linear(TRAINED["hidden"], len(sst.SENTIMENTS))
        self.dropout = nn.Dropout(TRAINED["dropout"])

    def forward(self, ids: Tensor, lengths: Tensor) -> Categorical:
        values = self.dropout(self.embedding(ids))
        packed = pack_padded_sequence(values, lengths, batch_first=True, enforce_sorted=False)
        return Categorical(logits=self.head(self.dropout(self.rnn(packed)[1][-1])))


class Data:
    """Sentences as word pieces.

    Args:
        sentences: trees with labels.
        tokenizer: the tokenizer of the model with these embeddings.
    """

    def __init__(self, sentences: Sequence[sst.Sentence], tokenizer: Any) -> None:
        self.sentences = list(sentences)
        self._tokenizer = tokenizer
        self._ids, self._words, self._labels = [], [], []
        for sentence in sentences:
            pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in sentence.words]
            self._ids.append(torch.tensor([one for word in pieces for one in word]))
            self._words.append(torch.tensor([number for number, word in enumerate(pieces) for _ in word]))
            self._labels.append(sentence.label)

    def __len__(self) -> int:
        return len(self.sentences)

    def batch(self, chosen: Sequence[int]) -> Batch:
        """A batch of sentences; `words` holds the word index of each piece."""
        return {
            "ids": pad_sequence([self._ids[one] for one in chosen], batch_first=True),
            "lengths": torch.tensor([len(self._ids[one]) for one in chosen]),
            "words": pad_sequence([self._words[one] for one in chosen], batch_first=True, padding_value=-1),
            "labels": torch.tensor([self._labels[one] for one in chosen]),
        }

    def pieces(self, number: int) -> int:
        """The number of word pieces of a sentence."""
        return len(self._ids[number])

    def upto(self, words: int) -> list[int]:
        """The sentences of at most this many words."""
        return [number for number, one in enumerate(self.sentences) if len(one.words) <= words]

    def names(self, batch: Batch) -> list[list[str]]:
        return [self._tokenizer.convert_ids_to_tokens(row) for row in batch["ids"].tolist()]


def valid(batch: Batch) -> Tensor:
    return batch["words"] >= 0


def loaded(*, quick: bool = False) -> tuple[Classifier, maskhooks.Hooked, Data, Data, Data]:
    """Return the untrained classifier, its `Hooked`, and the training, held-out and dev sentences.

    Args:
        quick: train on a fifth.
    """
    transformers.logging.set_verbosity_error()
    home = Path(os.environ.get("MASKHOOKS_DATA", "../shared"))
    source = home / "models" / "minilm-sst5"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    stored = safetensors.torch.load_file(source / "model.safetensors")
    model = Classifier(stored["bert.embeddings.word_embeddings.weight"].float() * TRAINED["scale"])
    trees = sst.read(home / "data" / "sst" / "train.txt")
    cut = len(trees) - TRAINED["held_out"]
    taught, held = Data(trees[: cut // 5 if quick else cut], tokenizer), Data(trees[cut:], tokenizer)
    dev = Data(sst.read(home / "data" / "sst" / "dev.txt"), tokenizer)
    hooked = maskhooks.wrap(model, valid=valid, units=lambda batch: batch["words"], names=dev.names, call=_call)
    return model, hooked, taught, held, dev


def train(model: Classifier, data: Data, cache: Path) -> Classifier:
    """Train all but the embeddings, or load weights trained with the same settings."""
    text = json.dumps([TRAINED, torch.__version__, len(data)])
    path = cache / f"sst_gru-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"
    if path.exists():
        model.load_state_dict(safetensors.torch.load_file(path), strict=False)
        return model.eval()
    torch.manual_seed(TRAINED["seed"])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        bound = TRAINED["hidden"] ** -0.5
        nn.init.uniform_(weight, -bound, bound)
    optimizer = torch.optim.AdamW(weights, lr=TRAINED["rate"])
    size, count = TRAINED["batch"], len(data)
    total = TRAINED["epochs"] * -(-count // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TRAINED["rate"], total_steps=total)
    model.train()
    for _ in track(range(TRAINED["epochs"]), "training the GRU"):
        order = torch.randperm(count).tolist()
        for start in range(0, count, size):
            batch = data.batch(order[start : start + size])
            loss = -model(batch["ids"], batch["lengths"]).log_prob(batch["labels"]).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    cache.mkdir(parents=True, exist_ok=True)
    learned = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("embedding")}
    safetensors.torch.save_file(learned, path)
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, data: Data) -> float:
    hits = 0
    for start in range(0, len(data), 128):
        batch = data.batch(range(start, min(start + 128, len(data))))
        hits += int((model(batch["ids"], batch["lengths"]).logits.argmax(-1) == batch["labels"]).sum())
    return hits / len(data)


@dataclass
class Truth:
    """Sentences with known smallest sets of words.

    Attributes:
        numbers: the indices of the sentences, shortest first.
        batches: the sentences in batches.
        solutions: the smallest sets of each sentence, in the same order.
        upto: all sentences of at most this many words were searched completely.
        seconds: the duration of the search.
    """

    numbers: list[int]
    batches: list[Batch]
    solutions: list[list[set[int]]]
    upto: int
    seconds: float


def search(hooked: maskhooks.Hooked, data: Data, chosen: Sequence[int], longest: int) -> Truth:
    erasure = Erasure(hooked, SITE, max_positions=longest)
    begin = time.perf_counter()
    known, solutions, unfinished = [], [], [longest + 1]
    for number in track(sorted(chosen, key=data.pieces), "searching"):
        batch = data.batch([number])
        (found,) = erasure.search(batch, progress=False)
        if found.solutions:
            known.append(number)
            words = batch["words"][0].tolist()
            solutions.append([{words[place] for place in one} for one in found.solutions])
        else:
            unfinished.append(len(data.sentences[number].words))
    seconds = time.perf_counter() - begin
    batches = [data.batch(known[start : start + TOGETHER]) for start in range(0, len(known), TOGETHER)]
    return Truth(known, batches, solutions, min(unfinished) - 1, seconds)


def kept_words(explanation: Explanation, batches: Sequence[Batch]) -> list[set[int]]:
    """The words of each sentence kept by the rounded mask."""
    words = [row for batch in batches for row in batch["words"].tolist()]
    kept: list[set[int]] = [set() for _ in words]
    rows = explanation.select(valid=True)
    for example, position in zip(rows["example"][rows["kept"]], rows["position"][rows["kept"]], strict=True):
        kept[example].add(words[example][position])
    return kept


def compared(found: set[int], truth: set[int]) -> tuple[float, float, float]:
    """F1, precision and recall, as fractions."""
    if not found and not truth:
        return 1.0, 1.0, 1.0
    hits = len(found & truth)
    if not hits:
        return 0.0, 0.0, 0.0
    precision, recall = hits / len(found), hits / len(truth)
    return 2 * precision * recall / (precision + recall), precision, recall


@torch.no_grad()
def unchanged(model: Classifier, batches: Sequence[Batch], kept: Sequence[set[int]]) -> float:
    """The fraction of sentences with an unchanged prediction when only these words are kept."""
    hooked, rest, same = maskhooks.wrap(model), iter(kept), 0
    for batch in batches:
        rows = [
            [word in words for word in row]
            for row, words in zip(batch["words"].tolist(), itertools.islice(rest, len(batch["words"])), strict=True)
        ]
        open_ = torch.tensor(rows)[..., None]
        before = model(batch["ids"], batch["lengths"]).logits.argmax(-1)
        with hooked.tap(replace={SITE: lambda value, open_=open_: torch.where(open_, value, 0)}):
            after = model(batch["ids"], batch["lengths"]).logits.argmax(-1)
        same += int((before == after).sum())
    return same / len(kept)


def figures(model: Classifier, truth: Truth, kept: Sequence[set[int]]) -> dict[str, float]:
    """The figures of rounded masks, means over sentences."""
    best = [max(compared(found, one) for one in own) for found, own in zip(kept, truth.solutions, strict=True)]
    lengths = [len(set(row) - {-1}) for batch in truth.batches for row in batch["words"].tolist()]
    return {
        "precision": statistics.mean(one[1] for one in best),
        "recall": statistics.mean(one[2] for one in best),
        "f1": statistics.mean(one[0] for one in best),
        "optimality": statistics.mean(found in own for found, own in zip(kept, truth.solutions, strict=True)),
        "l0": statistics.mean(len(found) / length for found, length in zip(kept, lengths, strict=True)),
        "unchanged": unchanged(model, truth.batches, kept),
        "larger": statistics.mean(len(found) > len(own[0]) for found, own in zip(kept, truth.solutions, strict=True)),
    }


def explained(hooked: maskhooks.Hooked, name: str, recipe: Recipe, seed: int) -> maskhooks.explainers.base.Explainer:
    settings: dict[str, Any] = {"margin": MARGIN, "divergence": lost_lead, "recipe": recipe, "seed": seed}
    if name == "diffmask":
        return DiffMask(hooked, SITE, amortized=False, **settings)
    if name == "reinforce":
        return Reinforce(hooked, SITE, **settings)
    return Random(hooked, SITE, seed=seed)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sixty sentences and few restarts, within a minute")
    parser.add_argument("--tune", action="store_true", help="use sentences held out from training instead of dev")
    parser.add_argument("--longest", type=int, default=20, help="maximum number of words of a sentence")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "maskhooks-benchmarks")
    parser.add_argument("--recipe", type=json.loads, default={}, help="settings that override the recipe's, as JSON")
    parser.add_argument("--only", nargs="*", default=["diffmask", "reinforce", "random"])
    parser.add_argument("--count", type=int, help="only this many sentences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore", MaskhooksWarning)
    begin = time.perf_counter()
    model, hooked, taught, held, dev = loaded(quick=given.quick)
    train(model, taught, given.cache)
    exact = accuracy(model, dev)
    say(f"dev accuracy {exact:.4f} after {time.perf_counter() - begin:.0f} s")

    data = held if given.tune else dev
    count = given.count or (60 if given.quick else None)
    truth = search(hooked, data, data.upto(given.longest)[:count], given.longest)
    sizes = [len(own[0]) for own in truth.solutions]
    say(f"{len(sizes)} sentences searched in {truth.seconds:.0f} s")
    settings = {
        **Recipe.named("subset").__dict__,
        **({"restarts": 3, "steps": 40} if given.quick else {}),
        **given.recipe,
    }
    result: dict[str, Any] = {}
    for name in given.only:
        start = time.perf_counter()
        recipe = Recipe(**{**settings, **TUNED.get(name, {}), **given.recipe})
        explanation = explained(hooked, name, recipe, given.seed).explain_all(truth.batches)
        kept = kept_words(explanation, truth.batches)
        result[name] = {**figures(model, truth, kept), "seconds": time.perf_counter() - start}
        say(f"{name}: {json.dumps({key: round(value, 4) for key, value in result[name].items()})}")
    print(
        json.dumps(
            {
                "benchmark": "sst_gru",
                "quick": given.quick,
                "torch": torch.__version__,
                "threads": given.threads,
                "model_accuracy": exact,
                "sentences": len(sizes),
                "searched_to_length": truth.upto,
                "search_seconds": truth.seconds,
                "smallest": {str(size): sizes.count(size) for size in sorted(set(sizes))},
                "several_solutions": statistics.mean(len(own) > 1 for own in truth.solutions),
                "optimal_l0": figures(model, truth, [own[0] for own in truth.solutions])["l0"],
                **result,
                "recipe": settings,
                "tuned": TUNED,
                "minutes": (time.perf_counter() - begin) / 60,
            }
        )
    )


def _call(model: nn.Module, batch: Batch) -> Categorical:
    found: Categorical = model(batch["ids"], batch["lengths"])
    return found


if __name__ == "__main__":
    main()
