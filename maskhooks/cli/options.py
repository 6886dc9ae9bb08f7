"""Arguments and options that several commands take, each explained once."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder or hub id of a transformers model, or package.module:factory for any network: a "
        "function that returns a Hooked or a module, alone or with training and validation batches.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="SST trees (.txt), .csv, .tsv, .jsonl, .parquet, or a dataset with its split, such as "
        "sst2:validation. A factory brings its own batches.",
        show_default=False,
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of texts.", rich_help_panel="Data")]
SecondColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of second texts, for pairs such as question and context, or prompt and continuation.",
        rich_help_panel="Data",
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="Column of labels; by default 'label' where there is one.", rich_help_panel="Data"),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a batch.", rich_help_panel="Data")]
MaxLength = Annotated[int, typer.Option(help="Tokens of a text at most; longer texts are cut.", rich_help_panel="Data")]
Units = Annotated[
    str | None,
    typer.Option(
        help="words: the pieces of a word are gated together, as the tokenizer marks them; undirected: edges between "
        "the same two nodes, in both directions. By default each position is by itself, and masks are explained with "
        "as they were trained.",
        rich_help_panel="Data",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where the model runs, such as cpu or cuda:1; by default a CUDA GPU where there is one."),
]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
