"""Score labels: what an explainer's scores mean, in the words of pictures, pages and reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from maskhooks.explanations.scores import Column

P_KEPT = "P(kept)"
DIVERGENCE = "1 - exp(-divergence)"
KEPT_OR_ERASED = "kept (1) or erased (0)"
RANDOM = "random score"
BITS = "information in bits"
LOST = "bits lost to the next layer"
WEIGHT = "share of the value kept"
INVERSE_NOISE = "1 / noise"
ATTENTION = "attention weight"
ROLLOUT = "attention rollout"
_SHARES = (ATTENTION, ROLLOUT)  # divided among positions, so that most scores are small
ATTRIBUTION = "attribution"
_UNBOUNDED = (BITS, LOST, INVERSE_NOISE, ATTRIBUTION)
_UNITS = {BITS: "bits", P_KEPT: "positions kept", KEPT_OR_ERASED: "positions kept"}  # of sums over positions
_MIXED = "score"  # explanations whose labels differ, concatenated

_METHODS = {
    P_KEPT: "A mask replaces as many positions of a model's input or hidden states as it can by a baseline without "
    "changing the prediction. The prediction needs the positions that are kept; it does not need those that are "
    "dropped.",
    DIVERGENCE: "Each position of a model's input or hidden states is replaced by a baseline, one at a time. The score "
    "says how far the output moves without it. If another position carries the same information, both have low scores.",
    KEPT_OR_ERASED: "A search looks for a small set of positions of a model's input or hidden states that leaves the "
    "prediction unchanged when a baseline replaces all others. A position scores 1 in that set, and 0 outside it.",
    BITS: "Noise limits how much of each position of a model's hidden states gets through, and learns to spare what "
    "the prediction needs. The score is an upper bound of the information that a position still gives to the layers "
    "above.",
    LOST: "Noise limits how much of each position of a model's hidden states gets through, and learns to spare what "
    "the prediction needs. The score is the information of a position at one layer less that at the next, in bits. "
    "Where it is below 0 the next layer has more there: attention moves information between positions, and each layer "
    "has a bound of its own.",
    WEIGHT: "Noise limits how much of each position of a model's hidden states gets through, and learns to spare what "
    "the prediction needs. The score is the share of a position's value in the mixture.",
    INVERSE_NOISE: "Noise is added to each position of a model's hidden states, as much as the output allows. The "
    "score is high where the output allows little.",
    ATTENTION: "The score is the weight that attention gives a position of a layer's input, over its heads and the "
    "positions that read it. Attention weights need not say what the prediction depends on: a position with a large "
    "weight may not matter, and one with a small weight may. Compare with a method that changes the input.",
    ROLLOUT: "Attention weights are multiplied over the layers, with a share for what each layer passes on unchanged. "
    "The score is a position's share of what is read at the end. It need not say what the prediction depends on: the "
    "values that are read, MLPs and the sign of an effect do not count. Compare with a method that changes the input.",
    RANDOM: "Scores are random, for comparison with other explainers. They say nothing about the model.",
    ATTRIBUTION: "A score says how much a position of a model's input or hidden states raises (above 0) or lowers "
    "(below 0) the explained output, such as the logit of the predicted class, compared with a baseline. Methods "
    "differ in how they share out what positions do together.",
}
_ZEROS = {
    P_KEPT: "{} without colour can be masked without changing the prediction.",
    DIVERGENCE: "{} without colour hardly move the output when each is masked alone.",
    KEPT_OR_ERASED: "{} without colour are not in the set that was found.",
    BITS: "{} without colour give the layers above no information that the prediction needs.",
    LOST: "{} without colour have as much information at the next layer; red ones have more there.",
    WEIGHT: "{} without colour can be replaced by noise.",
    ATTENTION: "{} without colour get little attention; the prediction may still depend on them.",
    ROLLOUT: "{} without colour get little attention over all layers; the prediction may still depend on them.",
    RANDOM: "Scores are random.",
    ATTRIBUTION: "{} without colour hardly move the explained output.",
}


def score_label(provenance: Mapping[str, Any]) -> str:
    """Return what the scores of an explanation are called; `P(kept)` if its provenance does not say."""
    parts = provenance.get("of")  # see `Explanation.concat`
    return common_label(map(score_label, parts)) if parts else str(provenance.get("score_label", P_KEPT))


def common_label(labels: Iterable[str]) -> str:
    """Return the label that explanations share; `score` if they differ."""
    different = set(labels)
    return different.pop() if len(different) == 1 else _MIXED


def scale_end(label: str, scores: Column) -> float:
    """Return the score at which the scale of pictures ends: 1, or where scores have no bound the largest, rounded."""
    largest = float(np.abs(np.nan_to_num(scores)).max(initial=0))
    if label not in (*_SHARES, *_UNBOUNDED) or largest <= 0:
        return 1.0
    digits = -math.floor(math.log10(largest))
    return float(round(math.ceil(round(largest * 10.0**digits, 6)) / 10.0**digits, digits))


def is_fraction(label: str) -> bool:
    """Return whether scores lie between 0 and 1, so that one half divides them."""
    return label not in _UNBOUNDED


def unit(label: str) -> str:
    """Return the unit of a sum of scores over positions, such as "bits"; empty if such a sum says nothing."""
    return _UNITS.get(label, "")


def method_note(label: str) -> str:
    """Return what a newcomer has to know about scores with this label."""
    return _METHODS.get(label, f"Positions of a model's input or hidden states have a score: {label}.")


def question(label: str, noun: str) -> str:
    """Return the question that a page of such scores answers.

    Args:
        noun: what has scores, such as "positions".
    """
    if label == LOST:
        return "Where is information lost?"
    return "Where does attention go?" if label in _SHARES else f"Which {noun} does the prediction need?"


def zero_note(label: str, noun: str) -> str:
    """Return what a score of 0 says; empty if it is not known.

    Args:
        noun: what has scores, such as "Positions".
    """
    return _ZEROS.get(label, "").format(noun)
