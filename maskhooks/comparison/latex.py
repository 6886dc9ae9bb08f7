"""A comparison as a table for LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maskhooks.comparison.comparison import Comparison
from maskhooks.comparison.results import Cell

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_ARROWS = {"higher": r"$\uparrow$", "lower": r"$\downarrow$"}


def latex(comparison: Comparison, *, digits: int = 3, intervals: bool = True) -> str:
    r"""Return a `tabular` with a row for each method; it needs the package booktabs.

    Below the name of each metric stand its unit and an arrow to its better end. The best mean is bold, and means that
    do not differ from it at the 5 % level, after Holm's correction, are underlined. A comment above says of how many
    examples, how intervals were made, and how differences were tested.

    Args:
        comparison: what is shown.
        digits: digits after the point.
        intervals: whether to print the interval of each mean.
    """
    metrics = list(comparison.metrics)
    columns = [comparison.cells(metric) for metric in metrics]
    pairs = len(comparison.tests(metrics[0]))
    lines = [
        f"% {len(comparison.examples)} examples. In brackets: {100 * comparison.confidence:g} % bootstrap intervals "
        "(BCa) of the mean over examples.",
        "% Bold: the best mean. Underlined: not shown to differ from it at the 5 % level by paired permutation tests,",
        f"% adjusted by Holm's rule for all {pairs} tests of a metric. Needs \\usepackage{{booktabs}}.",
        r"\begin{tabular}{l" + "r" * (len(metrics) + 1) + "}",
        r"\toprule",
        _line(["Method", *map(escaped, metrics), "Time"]),
        _line(["", *(_about(comparison, metric) for metric in metrics), r"s/example $\downarrow$"]),
    ]
    site = None
    for number, row in enumerate(comparison.table_rows):
        if row.site != site:
            lines.append(r"\midrule")
            if len(comparison.sites) > 1:
                lines.append(rf"\multicolumn{{{len(metrics) + 2}}}{{l}}{{\textit{{{escaped(row.site)}}}}} \\")
            site = row.site
        seconds = comparison.timings[row.method].seconds
        cells = [_cell(cells[number], digits, intervals) for cells in columns]
        lines.append(_line([escaped(comparison.name(row)), *cells, "--" if math.isnan(seconds) else f"{seconds:.2g}"]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escaped(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    return "".join(_ESCAPED.get(character, character) for character in text)


def _about(comparison: Comparison, metric: str) -> str:
    about = comparison.metrics[metric]
    return f"{escaped(about.unit)} {_ARROWS[about.better]}".strip()


def _cell(cell: Cell, digits: int, intervals: bool) -> str:
    if math.isnan(cell.interval.mean):
        return "--"
    text = _number(cell.interval.mean, digits)
    if cell.best:
        inside = text.strip("$")
        text = rf"$\mathbf{{{inside}}}$" if text != inside else rf"\textbf{{{text}}}"
    elif not cell.worse and not math.isnan(cell.p_best):
        text = rf"\underline{{{text}}}"
    if intervals and not math.isnan(cell.interval.low):
        ends = ", ".join(_number(end, digits) for end in (cell.interval.low, cell.interval.high))
        text += rf" {{\scriptsize [{ends}]}}"
    return text


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return f"${text}$" if text.startswith("-") else text


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
