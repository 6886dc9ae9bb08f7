"""`maskhooks doctor`."""

from __future__ import annotations

import typer

from maskhooks.checks.doctor import doctor as check
from maskhooks.cli.console import say, say_table
from maskhooks.cli.material import Material
from maskhooks.cli.options import Data, Device, LabelColumn, MaxLength, Model, SecondColumn, TextColumn
from maskhooks.data.records import Columns
from maskhooks.errors import SettingError
from maskhooks.model.task import device_of, move


def doctor(
    model: Model,
    data: Data = None,
    text_column: TextColumn = "text",
    second_column: SecondColumn = None,
    label_column: LabelColumn = None,
    max_length: MaxLength = 128,
    device: Device = None,
) -> None:
    """Run one batch and report on every site: whether it fires, how often, its shape, and what bypasses it.

    Without data, a model that takes texts gets two sentences. Exit code 1 means that a site has a problem: it
    does not fire as addressed, or it is bypassed: with all its positions closed, another input still changes the
    output.

    Examples:

    - `maskhooks doctor bert-base-uncased`
    - `maskhooks doctor my_folder/my_model --data reviews.csv`
    - `maskhooks doctor my_package.networks:make`
    """
    columns = Columns(text_column, second_column, label_column)
    material = Material.of(model, device, max_length, columns=columns, batch_size=8)
    batch = material.example(data)
    if batch is None:
        raise SettingError(f"there is no batch to run {model} with. Make the factory return (model, training batches).")
    report = check(material.hooked, move(batch, device_of(material.hooked.model)))
    say_table(
        report.rows(),
        f"Sites of {model}",
        alarm=lambda row: bool(row["trouble"]) or row["bypassed"] == "BYPASSED",
    )
    for note in report.notes():
        say(note)
    if not report.healthy:
        say("A site in red cannot be masked as it is, or its masks would miss what bypasses it.", "red")
        raise typer.Exit(1)
    say(f"{len(report.findings)} sites, all well." if report.findings else "The model has no listed sites.")
