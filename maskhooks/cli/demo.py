"""`maskhooks demo`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Float
from torch import Tensor

from maskhooks.cli.console import say, say_table
from maskhooks.cli.explain import show
from maskhooks.cli.folder import make_folder
from maskhooks.explainers.base import Explainer
from maskhooks.explainers.diffmask import DiffMask
from maskhooks.explainers.random import Random
from maskhooks.explanations.explanation import Explanation
from maskhooks.progress import Bar
from maskhooks.toy_tasks import digits as task
from maskhooks.toy_tasks.digits import Digits, DigitsModel

_EPOCHS = 20
_BATCH = 1000
_NEAR = 0.1  # nats; random scores lie about 1 nat from the truth
_ERASURE, _RANDOM = "erasure of one token", "random scores"
_SHADES = ("0.15", "#08519c", "#6baed6", "0.75", "#fd8d3c")
# The example of the paper's figures: does 8 occur more often than 1?
_SHOWN = Digits(torch.tensor([[8, 1]]), torch.tensor([[8, 8, 3, 1, 3, 9]]), torch.ones(1, 6, dtype=torch.bool))


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page, the plots and the table.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Random seed of the network and its masks.")] = 0,
) -> None:
    """Train a small network, explain it with DiffMask, and compare the masks with the known truth.

    The network says whether one digit occurs more often than another in a sequence. It needs only these two
    digits, so the true explanation is known (De Cao et al. 2020, section 3.1). The demo takes about a minute
    and downloads nothing.
    """
    make_folder(out)
    with _one_thread():
        _demonstrate(out, seed)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: with layers this small, threads wait for each other longer than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _demonstrate(out: Path, seed: int) -> None:
    say("The task: in a sequence of digits, does one digit occur more often than another? No other digit matters.")
    train, validation = task.generate()
    model = _trained(train, seed)
    right = task.accuracy(model, validation)
    say(f"The network is right on {right:.1%} of {len(validation)} new examples. Next, masks learn what it needs.")
    explainers = _explainers(model, train, validation, seed)
    attributions = {name: _attribution(explainer, validation) for name, explainer in explainers.items()}
    attributions[_ERASURE] = validation.erasure()
    kls = _table(attributions, validation)
    explanation, table = _explanation(explainers, validation), out / "explanation.parquet"
    explanation.to_parquet(table)
    (page,) = show(explanation, out, max_examples=100, plots=0)
    _plot(explainers, out)
    say(_learned(kls))
    say(
        f"Open {page} for the examples, {out / 'bars.png'} and {out / 'heatmap.png'} for one of them. All "
        f"rows are in {table}."
    )


def _learned(kls: Mapping[str, float]) -> str:
    """Return a verdict on the distances from the truth, in nats."""
    ours = max(kl for name, kl in kls.items() if name not in (_ERASURE, _RANDOM))
    if ours > _NEAR:
        return (
            f"This time the masks did not find all the digits that the network uses: they lie {ours:.3f} "
            f"nats from the truth, random scores {kls[_RANDOM]:.2f}. Try another --seed."
        )
    return (
        f"The masks found the digits that the network uses: they lie within {ours:.3f} nats of the truth, "
        f"random scores {kls[_RANDOM]:.2f} away. Erasing all that can be erased leaves a single digit, "
        "which hides that the network counts them all."
    )


def _trained(train: Digits, seed: int) -> DigitsModel:
    with Bar("training the network", _EPOCHS) as bar:
        for epoch, trained in task.train_model(train, seed=seed, epochs=_EPOCHS):
            bar.update(epoch + 1)
            model = trained
    return model


def _explainers(model: DigitsModel, train: Digits, validation: Digits, seed: int) -> dict[str, Explainer]:
    """Train a DiffMask for each setting; add random scores."""
    hooked = task.hook(model)
    found: dict[str, Explainer] = {}
    for name, setting in task.SETTINGS.items():
        say(f"Masking the {name}, within {setting.margin:g} nats:")
        mask = DiffMask(hooked, setting.sites, conditioned_on=setting.conditioned_on, margin=setting.margin, seed=seed)
        found[f"DiffMask, {name}"] = mask.fit(
            train.loader(shuffle=True), validation.loader(_BATCH), steps=setting.steps, accelerator="cpu"
        )
    return {**found, _RANDOM: Random(hooked, task.HIDDEN, seed=seed)}


def _attribution(explainer: Explainer, data: Digits) -> Float[Tensor, "example token"]:
    return task.attribution(explainer.explain((data.query, data.digits, data.valid)), data)


def _table(attributions: Mapping[str, Tensor], data: Digits) -> dict[str, float]:
    """Print the distance of each attribution from the truth; return its KL, in nats."""
    found = {name: task.distances(attribution, data) for name, attribution in attributions.items()}
    say_table(
        [{"attribution": name, "KL": f"{far['kl']:.4f}", "JS": f"{far['js']:.4f}"} for name, far in found.items()],
        "Distance from the truth in nats, mean over the examples in which a digit matters",
    )
    return {name: far["kl"] for name, far in found.items()}


def _explanation(explainers: Mapping[str, Explainer], data: Digits) -> Explanation:
    """Explain all examples with the masks, and add each example's question."""
    batch = (data.query, data.digits, data.valid)
    both = Explanation.concat([e.explain(batch) for e in explainers.values() if isinstance(e, DiffMask)])
    questions = [f"more {first} than {second}?" for first, second in data.query.tolist()]
    answers = ["yes" if label else "no" for label in data.label.tolist()]
    return replace(
        both,
        metadata={
            number: {
                "question": questions[number],
                "prediction": "yes" if about["prediction"] == "1" else "no",
                "target": answers[number],
            }
            for number, about in both.metadata.items()
        },
    )


def _plot(explainers: Mapping[str, Explainer], out: Path) -> None:
    """Plot one example: bars of all attributions as in figure 3 of the paper, and a heat map of the masks."""
    from maskhooks.viz.bars import bars

    ours = {name: _attribution(explainer, _SHOWN)[0] for name, explainer in explainers.items()}
    groups = {"truth": _SHOWN.truth()[0], **ours, _ERASURE: _SHOWN.erasure()[0]}
    figure = bars(
        torch.stack(list(groups.values())).numpy(),
        list(groups),
        [str(digit) for digit in _SHOWN.digits[0].tolist()],
        title="more 8 than 1?",
        label="attribution",
        colours=_SHADES,
    )
    figure.savefig(out / "bars.png", dpi=150)
    _explanation(explainers, _SHOWN).plot(kind="heatmap").savefig(out / "heatmap.png", dpi=150)
