"""Tables for people: as text that fits a terminal, in Markdown, and in HTML with bars for notebooks."""

import html
import os
import shutil
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

LEAST_NAME = 16
"""Characters of a name that a narrow terminal leaves at least."""
LEAST_TEXT = 24
"""The same for the last column, which is wrapped."""
BAR = "#4477AA"
"""Of bars: the blue of Paul Tol's bright scheme (SRON technical note 09-002), which all eyes tell from its ground."""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: its head.
        right: numbers stand at its right edge.
        goes: where a terminal is too narrow, the columns with the largest number go first; those with 0 stay.
    """

    title: str
    right: bool = True
    goes: int = 0


@dataclass(frozen=True)
class Bar:
    """A cell with a bar behind it in a notebook, as long as `share` in `[0, 1]` of the cell."""

    text: str
    share: float


Cell: TypeAlias = str | Bar


@dataclass(frozen=True)
class Table:
    """Lines before, a table, lines after.

    Attributes:
        columns: the first has names, which are shortened where they must be.
        rows: of cells; the last cell of a row that is too short for all columns takes the rest of the line.
        before, after: lines of text.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def text(self, width: int | None = None) -> str:
        """The table as lines of at most `width` characters, if that is possible; of any length for None."""
        lines = [part for line in self.before for part in _wrapped(line, width, "  ")]
        if self.rows or not self.before:
            lines += [""] * bool(self.before) + self._lines(width)
        lines += [""] * bool(self.after) + [part for line in self.after for part in _wrapped(line, width, "  ")]
        return "\n".join(line.rstrip() for line in lines)

    def _lines(self, width: int | None) -> list[str]:
        shown = list(range(len(self.columns)))
        sizes = self._sizes()
        names = [_text(row[0]) for row in self.rows]
        short = dict(zip(names, names, strict=True))
        if width is not None:
            order = sorted((i for i in shown if self.columns[i].goes), key=lambda i: self.columns[i].goes)
            while order and sum(sizes[i] + 2 for i in shown) - 2 > width:
                shown.remove(order.pop())
            over = sum(sizes[i] + 2 for i in shown) - 2 - width
            if over > 0:
                short = _shortened(names, max(min(sizes[0], LEAST_NAME), sizes[0] - over))
                sizes[0] = max(map(len, (self.columns[0].title, *short.values())))
        lines = []
        for cells in (tuple(column.title for column in self.columns), *self.rows):
            spans = len(cells) < len(self.columns) or not self.columns[-1].right
            parts, last = [], ""
            for i in shown:
                if i >= len(cells):
                    break
                text = _text(cells[i])
                if spans and i == len(cells) - 1:
                    last = text
                    break
                text = short.get(text, text) if i == 0 else text
                parts.append(text.rjust(sizes[i]) if self.columns[i].right else text.ljust(sizes[i]))
            else:
                spans = False
            start = "".join(f"{part}  " for part in parts)
            lines += _hanging(start, last, width) if spans and last else [start]
        return lines

    def _sizes(self) -> list[int]:
        """Characters that each column takes; what spans the rest of its line counts for none."""
        sizes = [len(column.title) for column in self.columns]
        for row in self.rows:
            full = len(row) == len(self.columns)
            for i, cell in enumerate(row if full else row[:-1]):
                wraps = i == len(self.columns) - 1 and not self.columns[i].right
                sizes[i] = max(sizes[i], min(len(_text(cell)), LEAST_TEXT) if wraps else len(_text(cell)))
        return sizes

    def markdown(self) -> str:
        """The same in Markdown (GitHub's tables)."""
        filled = [(*row, *("" for _ in range(len(self.columns) - len(row)))) for row in self.rows]
        lines = [
            _row([column.title for column in self.columns]),
            _row(["---:" if column.right else "---" for column in self.columns]),
            *(_row([_text(cell) for cell in row]) for row in filled),
        ]
        before, after = ([f"- {line}" for line in part if line] for part in (self.before, self.after))
        return "\n".join([*before, *[""] * bool(before), *lines, *[""] * bool(after), *after])

    def html(self) -> str:
        """The same in HTML without scripts."""
        head = "".join(f"<th style='text-align:left'>{html.escape(column.title)}</th>" for column in self.columns)
        body = "".join(f"<tr>{self._cells(row)}</tr>" for row in self.rows)
        before, after = (
            "".join(f"<div>{html.escape(line)}</div>" for line in part if line) for part in (self.before, self.after)
        )
        return f"{before}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{after}"

    def _cells(self, row: Sequence[Cell]) -> str:
        parts = []
        for i, cell in enumerate(row):
            style = "text-align:right" if self.columns[i].right else "text-align:left"
            span = len(self.columns) - i if i == len(row) - 1 else 1
            if span > 1:
                style = "text-align:left"
            if isinstance(cell, Bar):
                end = f"{100 * min(1.0, max(0.0, cell.share)):.0f}%"
                style += f";background:linear-gradient(90deg,{BAR}55 {end},transparent {end})"
            wide = f" colspan='{span}'" if span > 1 else ""
            parts.append(f"<td style='{style}'{wide}>{html.escape(_text(cell))}</td>")
        return "".join(parts)


class Tabular(ABC):
    """What shows itself as a table: `print` gives text, a notebook HTML, and `repr` one line."""

    @abstractmethod
    def table(self) -> Table:
        """The table."""

    @abstractmethod
    def brief(self) -> str:
        """What is in it, in a few words."""

    def to_markdown(self) -> str:
        """Return it in Markdown, for a README or an issue."""
        return self.table().markdown()

    def __str__(self) -> str:
        return self.table().text(terminal_width())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.brief()}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.table().html()


def terminal_width() -> int | None:
    """Characters of a line of the terminal; None where stdout is none, such as a file or a notebook."""
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return max(40, shutil.get_terminal_size().columns)
    return None


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Bar) else cell


def _shortened(names: Iterable[str], size: int) -> dict[str, str]:
    """Names without their middles: both ends tell more. Where two would look the same, of all names more of the end is
    left, which tells layers apart; where that does not do, they are longer than `size`.
    """
    whole = set(names)
    for room in count(size):
        for left in range((room - 1) // 2, -1, -1):
            short = {name: _without_middle(name, room, left) for name in whole}
            if len(set(short.values())) == len(whole):
                return short
    raise AssertionError("names differ")


def _without_middle(name: str, size: int, left: int) -> str:
    """A name of `size` characters at most, of which `left` are its first."""
    return name if len(name) <= size else f"{name[:left]}…{name[len(name) - (size - 1 - left) :]}"


def _wrapped(line: str, width: int | None, indent: str) -> list[str]:
    if width is None or len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _hanging(start: str, text: str, width: int | None) -> list[str]:
    """A line whose last text goes on below itself."""
    if width is None or len(start) + len(text) <= width:
        return [start + text]
    below = width - len(start) < min(LEAST_TEXT, len(text))  # no room beside what stands before it
    indent = "    " if below else " " * len(start)
    first, *rest = textwrap.wrap(text, width - len(indent), break_long_words=False, break_on_hyphens=False)
    return (
        [start, indent + first, *(indent + part for part in rest)]
        if below
        else [start + first, *(indent + part for part in rest)]
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
