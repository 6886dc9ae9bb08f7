"""The hindsight bias in one picture: exact erasure and amortised DiffMask on the same sentences.

The GRU and the search are those of sst_gru.py. Masks of the inputs are learned on the training sentences; each word's
gate is read from its embedding and from the GRU's state after it, and erased words are zero in both rows. The sentences
are the first three positive and the first three negative ones of dev with 8 to 12 words and smallest sets of one or
two.

    python benchmarks/sst_gru_picture.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sst_gru import SITE, TRAINED, Batch, Data, Truth, loaded, say, search, train

from maskhooks import DiffMask, Recipe
from maskhooks.data import sst
from maskhooks.errors import MaskhooksWarning
from maskhooks.viz.figure import COLOURS

MARGIN = 0.1
TEXT: dict[str, Any] = {"ha": "center", "va": "center", "parse_math": False}
RECIPE = dataclasses.replace(Recipe.named("stable"), steps=800)


def batches(data: Data, size: int = 64) -> list[Batch]:
    """Batches of sentences of similar length, in random order."""
    order = sorted(range(len(data)), key=data.pieces)
    found = [data.batch(order[start : start + size]) for start in range(0, len(order), size)]
    random.Random(0).shuffle(found)
    return found


def by_word(scores: Sequence[float], words: Sequence[int]) -> list[float]:
    """The score of each word, from those of its pieces."""
    return [scores[words.index(number)] for number in sorted(set(words) - {-1})]


def draw(truth: Truth, data: Data, chosen: Sequence[int], scores: Sequence[Sequence[float]]) -> Figure:
    """Draw two rows per sentence: the words of the first smallest set, and P(kept) of DiffMask."""
    figure = Figure(figsize=(9.6, 1.05 * len(chosen)), layout="constrained")
    parts = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    colours = matplotlib.colormaps[COLOURS]
    for part, number, solutions, kept in zip(parts, chosen, truth.solutions, scores, strict=True):
        words = data.sentences[number].words
        rows = np.array([kept, [float(place in solutions[0]) for place in range(len(words))]])
        mesh = part.pcolormesh(rows, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
        for (row, place), value in np.ndenumerate(rows):
            colour = "white" if np.dot(colours(value)[:3], (0.3, 0.59, 0.11)) < 0.55 else "black"
            size = min(6.5, 72 / len(words[place]))
            part.text(place + 0.5, row + 0.5, words[place], color=colour, fontsize=size, **TEXT)
        part.set_xlim(0, 12)
        part.set_xticks([])
        part.set_yticks([0.5, 1.5], ["DiffMask, amortised", "exact erasure"], fontsize=6.5)
        part.tick_params(length=0)
        part.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=list(parts), label="P(kept)", ticks=[0, 0.5, 1], aspect=30, pad=0.01)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the training sentences and few steps")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "maskhooks-benchmarks")
    parser.add_argument("--out", type=Path, help="write the picture to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MaskhooksWarning)
    begin = time.perf_counter()
    model, hooked, taught, held, dev = loaded(quick=given.quick)
    train(model, taught, given.cache)

    recipe = dataclasses.replace(RECIPE, steps=20, baseline_steps=5) if given.quick else RECIPE
    explainer = DiffMask(
        hooked, SITE, conditioned_on=["rnn.h_l0:output"], margin=MARGIN, baseline="zero", recipe=recipe
    )
    explainer.fit(batches(taught), batches(held)[: 2 if given.quick else 8], accelerator="cpu")
    (row,) = explainer.evaluate(batches(dev)[: 2 if given.quick else None])
    say(f"{row}")

    short = [number for number in dev.upto(12) if len(dev.sentences[number].words) >= 8]
    sides = [[one for one in short if dev.sentences[one].label in labels][:30] for labels in ((3, 4), (0, 1))]
    truth = search(hooked, dev, [one for side in sides for one in side], 12)
    place = {number: at for at, number in enumerate(truth.numbers)}
    few = [[one for one in side if len(truth.solutions[place[one]][0]) in (1, 2)][:3] for side in sides]
    chosen = [one for side in few for one in side]
    shown = dataclasses.replace(truth, solutions=[truth.solutions[place[one]] for one in chosen])
    scores = []
    for number in chosen:
        batch = dev.batch([number])
        rows = explainer.explain(batch).select(valid=None)
        scores.append(by_word(rows["score"].tolist(), batch["words"][0].tolist()))
    if given.out is not None:
        draw(shown, dev, chosen, scores).savefig(given.out, dpi=160)
    print(
        json.dumps(
            {
                "benchmark": "sst_gru_picture",
                "quick": given.quick,
                "torch": torch.__version__,
                "steps": recipe.steps,
                "margin": MARGIN,
                **row,
                "sentences": [" ".join(dev.sentences[number].words) for number in chosen],
                "labels": [sst.SENTIMENTS[dev.sentences[number].label] for number in chosen],
                "kept_by_erasure": [len(own[0]) for own in shown.solutions],
                "kept_by_diffmask": [sum(score > 0.5 for score in own) for own in scores],
                "mean_score": statistics.mean(score for own in scores for score in own),
                "trained": TRAINED,
                "minutes": (time.perf_counter() - begin) / 60,
            }
        )
    )


if __name__ == "__main__":
    main()
