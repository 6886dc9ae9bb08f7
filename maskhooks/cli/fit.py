"""`maskhooks fit`."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from maskhooks.cli.console import say, say_table, tell
from maskhooks.cli.folder import make_folder
from maskhooks.cli.material import Material
from maskhooks.cli.options import (
    Data,
    Device,
    LabelColumn,
    MaxLength,
    Model,
    SecondColumn,
    Seed,
    TextColumn,
    Units,
    parsed,
    setting_help,
)
from maskhooks.data.records import Columns
from maskhooks.errors import SettingError
from maskhooks.explainers.base import EXPLAINERS
from maskhooks.explainers.diffmask import DiffMask
from maskhooks.explainers.graphmask import GraphMask
from maskhooks.explainers.learned import Learned
from maskhooks.explainers.reinforce import Reinforce
from maskhooks.model.task import device_of
from maskhooks.passes.clean_cache import CleanCache
from maskhooks.plugins.registry import registry
from maskhooks.runs.run_state import has_state, state_folder
from maskhooks.settings.duration import Budget, seconds
from maskhooks.settings.schema import schema_of

_MASKS = "Masks"
_CHECKS_AFTER = 2.0  # the last table samples and rounds the gates: twice the passes of a validation


def _help(name: str) -> str:
    return setting_help(name, DiffMask, GraphMask, Reinforce)


def fit(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the trained masks and their logs.", show_default=False)],
    data: Data = None,
    validation: Annotated[
        str | None,
        typer.Option(
            help="Data on which the best masks are chosen, as --data; by default a tenth of --data, at most "
            "500 examples."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Draw at most this many examples from --data and --validation.", rich_help_panel="Data"
        ),
    ] = None,
    text_column: TextColumn = "text",
    second_column: SecondColumn = None,
    label_column: LabelColumn = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Examples in a training batch; by default the recipe's.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    max_length: MaxLength = 128,
    units: Units = None,
    explainer: Annotated[
        str,
        typer.Option(
            help="diffmask; graphmask for the messages of all layers of a graph network at once; or another trained "
            "explainer.",
            rich_help_panel=_MASKS,
        ),
    ] = "diffmask",
    sites: Annotated[
        list[str] | None, typer.Option(help=_help("sites") + " May be repeated.", rich_help_panel=_MASKS)
    ] = None,
    conditioned_on: Annotated[
        list[str] | None,
        typer.Option(help=setting_help("conditioned_on", DiffMask) + " May be repeated.", rich_help_panel=_MASKS),
    ] = None,
    margin: Annotated[float | None, typer.Option(help=_help("margin"), rich_help_panel=_MASKS)] = None,
    gate: Annotated[str | None, typer.Option(help=_help("gate"), rich_help_panel=_MASKS)] = None,
    baseline: Annotated[str | None, typer.Option(help=_help("baseline"), rich_help_panel=_MASKS)] = None,
    recipe: Annotated[str | None, typer.Option(help=_help("recipe"), rich_help_panel=_MASKS)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting of the explainer, such as divergence=lost-lead; write mappings as JSON: "
            """recipe='{"name": "language", "layer_warmup": 0.5}'. May be repeated; `maskhooks settings NAME` lists """
            "them.",
            show_default=False,
            rich_help_panel=_MASKS,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Total training steps; by default the recipe's steps for each mask."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Instead of steps, the time that this command may take, such as 10m or 1h30m.",
            metavar="DURATION",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    seed: Seed = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard logs, into --out/tensorboard.")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Lightning's precision while training, such as bf16-mixed, which is faster; by default float32.",
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        str,
        typer.Option(
            help="Where the clean passes of the first epoch are stored for later epochs, so that steps are faster: in "
            "memory, in a folder, or nowhere. By default in memory, as many as fit into half of what is free.",
            metavar="memory|FOLDER|none",
            show_default=False,
        ),
    ] = "auto",
    cache_dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16 halves the size of --cache; by default values are kept exactly."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume the stopped or killed run in --out, to the result it would have had. Give the other options "
            "as before.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the masks or the run in --out.")] = False,
) -> None:
    """Train masks on a model: which positions can be dropped while its predictions stay the same?

    The model itself does not change. The best masks within the margin are saved. Ctrl-C ends training after the
    current step, keeps the best masks so far, and exits with code 130; `--resume` continues.

    Examples:

    - `maskhooks fit bert-base-uncased-sst5 --data train.txt --validation dev.txt --out run`
    - `maskhooks fit my_folder/my_model --data train.txt --out run --budget 10m`
    - `maskhooks fit my_folder/my_model --data qa.jsonl --text-column question --second-column context
    --sites input --margin 0.5 --out run`
    - `maskhooks fit my_package.networks:make --sites "*layer*:output" --out run`
    - `maskhooks fit my_package.graphs:make --explainer graphmask --out run`
    - `maskhooks fit my_package.networks:make --sites "*layer*:output" --out run --resume`
    """
    begun = time.monotonic()
    limit_of_time = None if budget is None else _budget(budget, begun)
    _check_free(out, resume, overwrite)
    make_folder(out)
    columns = Columns(text_column, second_column, label_column)
    material = Material.of(model, device, max_length, units=units, columns=columns, seed=seed)
    options = {"sites": _one_or_more(sites), "conditioned_on": _one_or_more(conditioned_on), "margin": margin}
    options |= {"gate": gate, "baseline": baseline, "recipe": recipe}
    given = {key: value for key, value in options.items() if value is not None}
    masks = _kind(explainer)(material.hooked, **{**given, "seed": seed, **parsed(settings)})
    material = dataclasses.replace(material, batch_size=batch_size or masks.recipe.batch_size)
    train, held = material.for_training(data, validation, limit)
    count = len(masks.groups)
    say(
        f"Training {count} mask{'s' * (count > 1)} of {model}, within {masks.margin:g} nats of its predictions, with "
        f"the recipe {masks.recipe.name}{', picked for this model' if masks.recipe_chosen else ''}."
    )
    where = device_of(material.hooked.model)
    with _stoppable(masks, out):
        masks.fit(
            train,
            held,
            steps=steps,
            budget=limit_of_time,
            run_dir=out,
            tensorboard=tensorboard,
            resume=resume,
            accelerator=where.type,
            devices=1 if where.index is None else [where.index],
            precision=precision,
            cache=None if cache == "none" else CleanCache.named(cache, _dtype(cache_dtype)),
        )
    _tell(masks, held if held is not None else train, trained_only=held is None, budget=budget is not None)
    say(f"Saved to {out}. Next, see what the masks keep:")
    say(f"  {_next(out, model, validation or data, columns, max_length)}", "cyan", wrap=False)


def _budget(text: str, begun: float) -> Budget:
    """Return the budget of the whole command, with what comes before and after the fit."""
    schema_of(Learned.fit)["budget"].check(text, "maskhooks fit")
    return Budget(seconds(text), begun, _CHECKS_AFTER)


def _dtype(name: str | None) -> torch.dtype | None:
    found = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(found, torch.dtype):
        raise SettingError(f"--cache-dtype must name a torch dtype such as bfloat16, got {name!r}")
    return found


def _check_free(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise SettingError if the folder holds masks or a run that must not be replaced."""
    masks, run = (out / "explainer.json").exists(), has_state(state_folder(out))
    if overwrite or (resume and (run or not masks)):
        return
    if masks:
        raise SettingError(
            f"{out} already holds trained masks. Choose another --out, or replace them with --overwrite."
        )
    if run:
        raise SettingError(f"{out} holds an unfinished run. Continue it with --resume, or restart with --overwrite.")


@contextlib.contextmanager
def _stoppable(explainer: Learned, out: Path) -> Iterator[None]:
    """Exit with code 130 after Ctrl-C, and say what was saved and how to resume."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if explainer.fitted:
            found = f"{explainer.result.stop_reason}. The best masks so far are in {out}"
            tell("stopped", f"{found}. Continue with the same command and --resume.", "yellow")
        else:
            tell("stopped", "before the first step, so nothing was learned.", "yellow")
        raise typer.Exit(int(stop.code or 0) if isinstance(stop, SystemExit) else 130) from stop


def _tell(explainer: Learned, batches: Iterable[Any], *, trained_only: bool, budget: bool) -> None:
    where = "the training batches" if trained_only else "validation data"
    rows = explainer.evaluate(batches)
    say_table([_cells(row) for row in rows], f"What the masks do on {where}")
    say(
        "nats: mean divergence of predictions; kept: fraction of positions kept; same: fraction of predictions "
        "unchanged; rounded: with each gate rounded to 0 or 1."
    )
    if empty := [row["site"] for row in rows if not row["rounded_kept"]]:
        say(
            f"No gate is open above one half at {'; '.join(empty)}: the baseline alone gives nearly the same "
            "predictions, or the margin is wide enough for others. Check that the predictions differ between examples, "
            "or give --baseline zero or a smaller --margin.",
            "yellow",
        )
    if explainer.within_margin is None:
        say(f"Without validation data, the margin of {explainer.margin:g} nats is not checked.")
        return
    chosen, now = _farthest(explainer, explainer.result.validation), max(row["divergence"] for row in rows)
    if explainer.within_margin != (now <= explainer.margin):
        say(
            f"When the masks were chosen, the largest mean divergence was {chosen:.3g} nats; with the new gate samples "
            f"above it is {now:.3g}. The margin of {explainer.margin:g} nats lies between them, so it is chance that "
            f"the masks are {'within' if explainer.within_margin else 'beyond'} it. Validate on more examples, or "
            "leave room with a smaller --margin.",
            "yellow",
        )
    elif explainer.within_margin:
        say(f"All masks keep the mean divergence within the margin of {explainer.margin:g} nats.", "green")
    else:
        say(
            f"Not all masks keep the mean divergence within the margin of {explainer.margin:g} nats. Train "
            f"for {'a longer --budget' if budget else 'more --steps'}, or allow a larger --margin.",
            "yellow",
        )


def _farthest(explainer: Learned, rows: Iterable[Mapping[str, Any]]) -> float:
    """Return the largest mean divergence among the chosen masks, at the step they were chosen."""
    chosen = {(one.label, one.depth, explainer.result.chosen_steps[str(one)]) for one in explainer.groups}
    return max(float(row["divergence"]) for row in rows if (row["site"], row["depth"], row["step"]) in chosen)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "masked": row["site"],
        "depth": str(row["depth"]),
        "nats": f"{row['divergence']:.3f}",
        "kept": f"{row['expected_l0']:.1%}",
        "same": f"{row['agreement']:.1%}",
        "rounded nats": f"{row['rounded_divergence']:.3f}",
        "rounded kept": f"{row['rounded_kept']:.1%}",
        "rounded same": f"{row['rounded_agreement']:.1%}",
    }


def _kind(name: str) -> Callable[..., Learned]:
    """Return the trained explainer of a name."""
    kind = registry.part(EXPLAINERS, name)
    if not _trained(kind):
        trained = [key for key, part in registry.parts(EXPLAINERS).items() if _trained(part)]
        raise SettingError(f"--explainer {name} needs no training. Give one of {', '.join(sorted(trained))}.")
    return kind  # type: ignore[no-any-return] # as checked


def _trained(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Learned)


def _one_or_more(selectors: Sequence[str] | None) -> str | list[str] | None:
    return None if not selectors else selectors[0] if len(selectors) == 1 else list(selectors)


def _next(out: Path, model: str, data: str | None, columns: Columns, max_length: int) -> str:
    """Return the command that explains the same data with these masks."""
    words = ["maskhooks", "explain", str(out), model]
    given = {
        "--data": data,
        "--text-column": None if columns.text == "text" else columns.text,
        "--second-column": columns.second,
        "--label-column": columns.label,
        "--max-length": None if max_length == 128 else str(max_length),
        "--out": f"{out}-explained",
    }
    words += [word for option, value in given.items() if value is not None for word in (option, value)]
    return shlex.join(words)
