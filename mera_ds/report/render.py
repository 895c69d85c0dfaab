"""Tables as plain text, Markdown, LaTeX and HTML."""

import html
import re
import textwrap
from dataclasses import dataclass

WIDTH = 120
"""Longest line of the terminal text."""


@dataclass(frozen=True)
class Table:
    """A table ready to print."""

    title: str
    header: tuple[str, ...]
    """A newline makes a second line."""
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    labels: int
    """How many columns on the left name the row."""
    best: frozenset[tuple[int, int]] = frozenset()
    """Row and column of cells to set in bold."""
    second: frozenset[tuple[int, int]] = frozenset()
    """Of cells to underline."""
    marks: str = ""
    """What bold and underlined say: a note wherever they are seen, which is not in plain text."""
    paper: str = ""
    """Which of the paper's tables it is, such as `Table 2`."""

    @property
    def heading(self) -> str:
        """Return the title behind the paper's number."""
        return f"{self.paper}: {self.title}" if self.paper else self.title

    @property
    def caption(self) -> str:
        """Return the title for a text that numbers its own tables."""
        title = self.title[:1].upper() + self.title[1:]
        return f"{title} (the paper's {self.paper})" if self.paper else title

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Return the notes, with that on the marks."""
        return (self.marks, *self.notes) if self.marks else self.notes

    def mark(self, row: int, column: int) -> str:
        """Return how a cell stands out: `best`, `second` or not at all."""
        place = row, column
        return "best" if place in self.best else "second" if place in self.second else ""


def to_text(table: Table, width: int = WIDTH) -> str:
    """Return aligned plain text; columns that don't fit follow in further blocks."""
    lines = [header.split("\n") for header in table.header]
    height = max(map(len, lines))
    above = [tuple((cell + [""] * height)[i] for cell in lines) for i in range(height)]
    grid = [*above, *table.rows]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table.header))]
    labels = list(range(table.labels))
    blocks = [list(labels)]
    for column in range(table.labels, len(widths)):
        if sum(widths[i] + 2 for i in [*blocks[-1], column]) - 2 > width and blocks[-1] != labels:
            blocks.append(list(labels))
        blocks[-1].append(column)
    text = [table.heading]
    for block in blocks:
        for number, row in enumerate(grid):
            cells = [
                row[i].ljust(widths[i]) if i < table.labels else row[i].rjust(widths[i])
                for i in block
            ]
            text.append("  ".join(cells).rstrip())
            if number == height - 1:
                text.append("-" * (sum(widths[i] + 2 for i in block) - 2))
        text.append("")
    for note in table.notes:
        text.append(wrap(note, width))
    return "\n".join(text).rstrip() + "\n"


def wrap(text: str, width: int = WIDTH) -> str:
    """Return a sentence on lines of at most `width`; names and flags with hyphens stay whole."""
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)


def to_markdown(table: Table) -> str:
    """Return a Markdown table under a heading, with the notes as a list."""
    header = [cell.replace("\n", " ") for cell in table.header]
    rule = ["---"] * table.labels + ["---:"] * (len(header) - table.labels)
    rows = [
        [
            _MARKDOWN[table.mark(i, j)].format(cell.strip().replace("|", "\\|"))
            for j, cell in enumerate(row)
        ]
        for i, row in enumerate(table.rows)
    ]
    lines = [f"| {' | '.join(row)} |" for row in [header, rule, *rows]]
    return "\n".join(
        [f"### {table.heading}", "", *lines, "", *(f"- {note}" for note in table.all_notes)]
    )


def to_latex(table: Table) -> str:
    """Return a LaTeX table in the style of booktabs, with title and notes below it."""
    columns = "l" * table.labels + "r" * (len(table.header) - table.labels)
    header = [_latex_lines(cell) for cell in table.header]
    rows = [
        [_LATEX_MARKS[table.mark(i, j)].format(_latex(cell.strip())) for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    lines = [" & ".join(row) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering\small",
            _FITTED,
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            rf"\caption{{{_latex(' '.join(map(_sentence, (table.caption, *table.all_notes))))}}}",
            r"\end{table}",
        ]
    )


# As wide as the text where the table would be wider.
_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def to_html(table: Table) -> str:
    """Return an HTML table; its title is the caption, its notes stand below."""
    head = "".join(
        f"<th{' class=label' if j < table.labels else ''}>{_escape(cell)}</th>"
        for j, cell in enumerate(table.header)
    )
    rows = []
    for i, row in enumerate(table.rows):
        cells = [f"<th class=label scope=row>{_escape(cell)}</th>" for cell in row[: table.labels]]
        for j, cell in enumerate(row[table.labels :], start=table.labels):
            mark = table.mark(i, j)
            marked = f" class={mark}" if mark else ""
            cells.append(f"<td{marked}>{_escape(cell)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.all_notes)
    return (
        f'<figure class="table"><figcaption>{html.escape(table.heading)}</figcaption>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><ul class=notes>{notes}</ul></figure>"
    )


_MARKDOWN = {"best": "**{}**", "second": "<ins>{}</ins>", "": "{}"}
_LATEX_MARKS = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}


def _latex_lines(text: str) -> str:
    lines = r" \\ ".join(_latex(line) for line in text.split("\n"))
    stacked = rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{lines}\end{{tabular}}"
    return stacked if "\n" in text else lines


def _sentence(title: str) -> str:
    return title if title.endswith(".") else f"{title}."


def _escape(text: str) -> str:
    return html.escape(text.strip()).replace("\n", "<br>")


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "<": "$<$",
    ">": "$>$",
}


def _latex(text: str) -> str:
    return re.sub(r"[&%$#_{}\\~^±×<>]", lambda match: _LATEX[match[0]], text)
