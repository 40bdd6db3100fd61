"""Tables of the page, and the same as LaTeX (booktabs) files for papers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc import durable

TABLES = "tables"
_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "≤": r"$\leq$",
    "±": r"$\pm$",
    "χ": r"$\chi$",
    "²": "$^2$",
    "σ": r"$\sigma$",
    "×": r"$\times$",
    "–": "--",
    "−": "$-$",
    "∗": r"$_\star$",
    **{f"{letter}∗": rf"${letter}_\star$" for letter in "MRZ"},
    "log₁₀": r"$\log_{10}$",
    "g–i": "$g-i$",
    "\u202f": r"\,",
}
_ESCAPED = re.compile("|".join(map(re.escape, sorted(_LATEX, key=len, reverse=True))))
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]\d+)?( ± \d+(\.\d+)?(e[-+]\d+)?)?")


@dataclass(frozen=True)
class Cell:
    """Words or a number."""

    text: str = ""
    strong: bool = False
    """Stands out."""


@dataclass(frozen=True)
class Row:
    """A line of a table; ``head`` says what it is of."""

    head: str
    cells: tuple[Cell, ...]
    note: str = ""
    """What of ``head`` the line shows."""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes
    ----------
    groups
        heads that each span some columns, left to right; together all but the first.
    columns
        heads of the columns, the first of which is that of the rows.
    rows, foot
        the lines, and those below a rule; each has a cell for every column but the first.
    folded
        shown only to who asks for it.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    foot: tuple[Row, ...] = ()
    groups: tuple[tuple[str, int], ...] = ()
    folded: bool = False

    @property
    def file(self) -> str:
        """Its LaTeX file, from the page's folder."""
        return f"{TABLES}/{self.name}.tex"

    @property
    def noted(self) -> bool:
        """Whether rows have a second head."""
        return any(row.note for row in (*self.rows, *self.foot))


def save_latex(table: Table, out: Path) -> None:
    """Write ``table.file`` below ``out``: a floating table for a document that uses booktabs."""
    heads = 2 if table.noted else 1
    width = len(table.columns) - 1
    float_ = "table*" if width + heads > 6 else "table"
    lines = [
        rf"\begin{{{float_}}}",
        r"\centering",
        rf"\caption{{{escape(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{'l' * heads}{'r' * width}}}",
        r"\toprule",
    ]
    if table.groups:
        spans, rules, first = [], [], heads + 1
        for text, span in table.groups:
            spans.append(rf"\multicolumn{{{span}}}{{c}}{{{escape(text)}}}")
            if text:
                rules.append(rf"\cmidrule(lr){{{first}-{first + span - 1}}}")
            first += span
        lines += [_line([""] * heads + spans), "".join(rules)]
    lines += [_line([escape(table.columns[0]), *[""] * (heads - 1), *map(escape, table.columns[1:])])]
    lines.append(r"\midrule")
    lines += _body(table.rows, heads)
    if table.foot:
        lines += [r"\midrule", *_body(table.foot, heads)]
    lines += [r"\bottomrule", r"\end{tabular}", rf"\end{{{float_}}}", ""]
    path = out / table.file
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, "\n".join(lines))


def _body(rows: Sequence[Row], heads: int) -> list[str]:
    lines = []
    before = None
    for row in rows:
        head = "" if row.head == before else escape(row.head)  # said once for all its lines
        before = row.head
        notes = [escape(row.note)] if heads == 2 else []
        lines.append(_line([head, *notes, *map(_cell, row.cells)]))
    return lines


def _line(cells: Sequence[str]) -> str:
    line = " & ".join(cells) + r" \\"
    # The command that ends the line before would take these as its option.
    return f"{{}}{line}" if line.startswith(("[", "*")) else line


def _cell(cell: Cell) -> str:
    if _NUMBER.fullmatch(cell.text):
        text = f"${cell.text.replace('±', chr(92) + 'pm')}$"
        text = re.sub(r"e([-+])0*(\d+)", lambda e: rf"\times 10^{{{e[1].strip('+')}{e[2]}}}", text)
        return rf"{{\boldmath{text}}}" if cell.strong else text
    text = escape(cell.text)
    return rf"\textbf{{{text}}}" if cell.strong and text else text


def escape(text: str) -> str:
    """Words for LaTeX."""
    return _ESCAPED.sub(lambda found: _LATEX[found[0]], text)


def measured(value: float, error: float | None = None) -> str:
    """A value and its error, as far as their digits mean something; four digits where there is no error."""
    if not math.isfinite(value):
        return ""
    if error is None or not 0 < error < math.inf:
        return f"{value:#.4g}" if abs(value) < 1000 else f"{value:.0f}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    if value:  # a scatter between seeds can be tiny by chance
        digits = min(digits, max(0, 4 - math.floor(math.log10(abs(value)))))
    error = max(error, 10.0**-digits)
    exponent = math.floor(math.log10(max(abs(value), error)))
    if exponent < -3:
        shown = max(0, digits + exponent)
        return " ± ".join(f"{each * 10.0**-exponent:.{shown}f}e{exponent:03d}" for each in (value, error))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
