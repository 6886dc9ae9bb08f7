"""`maskhooks sites`."""

from __future__ import annotations

from maskhooks.cli.console import say, say_table
from maskhooks.cli.material import Material
from maskhooks.cli.options import Data, Device, LabelColumn, MaxLength, Model, SecondColumn, TextColumn
from maskhooks.data.records import Columns
from maskhooks.model.task import device_of, move
from maskhooks.model.wrapping import with_shapes


def sites(
    model: Model,
    data: Data = None,
    text_column: TextColumn = "text",
    second_column: SecondColumn = None,
    label_column: LabelColumn = None,
    max_length: MaxLength = 128,
    device: Device = None,
) -> None:
    """List the sites of a model: address, pattern, tags, depth and, with data, shape in one batch.

    Examples:

    - `maskhooks sites bert-base-uncased`
    - `maskhooks sites my_folder/my_model --data reviews.csv`
    - `maskhooks sites my_package.networks:make`
    """
    columns = Columns(text_column, second_column, label_column)
    material = Material.of(model, device, max_length, columns=columns)
    hooked = material.hooked
    batch = material.example(data) if data is not None or material.opened.train is not None else None
    if batch is not None:
        hooked = with_shapes(hooked, move(batch, device_of(hooked.model)))
    if not len(hooked.sites):
        say(
            f"No plugin knows the modules of this {type(hooked.model).__name__}, so no sites are listed. Make "
            "the factory return maskhooks.wrap(model, "
            f"sites={{'module:output': 'batch token hidden -> batch token'}})."
        )
        return
    say_table(hooked.sites.rows(), f"Sites of {model}")
    say("Choose sites by address, by a glob such as '*layer*:output', or by tag.")
