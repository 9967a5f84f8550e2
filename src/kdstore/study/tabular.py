"""A table of numbers with intervals, and its three forms: Markdown for people, CSV for programs, LaTeX for papers.

Texts are a stranger's: no form lets one of them become markup, a formula of a spreadsheet or a command of TeX.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kdstore.evaluate.tables import aligned_table, inert

_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", "[": "{[}", "]": "{]}", "`": r"\textasciigrave{}"}
_SETTINGS = ("loss", "student", "samples", "seeds", "VQA set", "strength", "score")  # columns that say which arm a row is of


@dataclass(frozen=True)
class Cell:
    """A text, or a number with the ends of its 95 % interval; `source` is the id of the arm behind it, `teacher` the one whose colour it has."""

    text: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    digits: int = 1
    source: str = ""
    teacher: str = ""

    @property
    def shown(self) -> str:
        """The number without its interval, or the text; a dash where there is nothing."""
        return plain(self.text) or "-" if self.value is None else f"{self.value:z,.{self.digits}f}"

    @property
    def interval(self) -> str:
        return "" if self.low is None or self.high is None else f"[{self.low:z,.{self.digits}f}, {self.high:z,.{self.digits}f}]"


@dataclass(frozen=True)
class Table:
    """Rows under `columns`; `name` is that of its files, `caption` says in a sentence what stands in it."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def intervals(self) -> int:
        """How many columns have intervals."""
        return sum(any(row[i].interval for row in self.rows) for i in range(len(self.columns)))

    def numeric(self, column: int) -> bool:
        return any(row[column].value is not None for row in self.rows)


def plain(text: str) -> str:
    """Replace what does not print, such as line ends and marks that turn the direction of writing, by spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def brief(table: Table) -> Table:
    """Leave out columns (but the first) that are empty, and those of `_SETTINGS` that are the same in every row: the caption says it once."""
    kept, said = [0], []
    for i, title in enumerate(table.columns[1:], start=1):
        found = {row[i].shown for row in table.rows}
        if found == {"-"}:
            continue
        if len(found) > 1 or len(table.rows) < 2 or title not in _SETTINGS:
            kept.append(i)
        else:
            said.append(f"{title[:1].upper()}{title[1:]}: {found.pop()}.")
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return replace(table, caption=" ".join([table.caption, *said]), columns=tuple(table.columns[i] for i in kept), rows=rows)


def as_markdown(table: Table) -> str:
    """Render the brief form of a table."""
    table = brief(table)
    words = next((i for i in range(len(table.columns)) if table.numeric(i)), len(table.columns))
    rows = [[_md(cell.shown) + f" {cell.interval}".rstrip() for cell in row] for row in table.rows]
    return f"{_md(table.caption)}\n\n{aligned_table([[_md(title) for title in table.columns], *rows], num_texts=words)}"


def as_csv(table: Table) -> str:
    """Render every column in full precision, the ends of intervals in columns of their own."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    ranged = [any(row[i].low is not None for row in table.rows) for i in range(len(table.columns))]
    titles = [name for title, both in zip(table.columns, ranged, strict=True) for name in ([title, f"{title} low", f"{title} high"] if both else [title])]
    writer.writerow([inert(title) for title in titles])
    for row in table.rows:
        values: list[object] = []
        for cell, both in zip(row, ranged, strict=True):
            values.append(inert(plain(cell.text)) if cell.value is None else cell.value)
            values += [cell.low, cell.high] if both else []
        writer.writerow(["" if value is None else value for value in values])
    return sink.getvalue()


def as_latex(table: Table) -> str:
    """Render the brief form of a table as a float for the package booktabs."""
    table = brief(table)
    align = "".join("r" if table.numeric(i) else "l" for i in range(len(table.columns)))
    lines = [" & ".join(_tex(cell.shown) + (rf" {{\footnotesize {_tex(cell.interval)}}}" if cell.interval else "") for cell in row) for row in table.rows]
    head = " & ".join(_tex(title) for title in table.columns)
    body = "".join(rf"{line} \\" + "\n" for line in lines)
    return (
        f"% \\usepackage{{booktabs}}\n\\begin{{table}}\n\\centering\n\\caption{{{_tex(table.caption)}}}\n\\label{{tab:{table.name}}}\n"
        f"\\begin{{tabular}}{{{align}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


FORMS: dict[str, Callable[[Table], str]] = {"md": as_markdown, "csv": as_csv, "tex": as_latex}


def _md(text: str) -> str:
    return re.sub(r"([\\<>*_`\[\]])", r"\\\1", text)


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def cells(*values: str | int | None) -> Sequence[Cell]:
    """Return a cell for each value; None is an empty one."""
    return [Cell(value=value, digits=0) if isinstance(value, int) else Cell(value or "") for value in values]
