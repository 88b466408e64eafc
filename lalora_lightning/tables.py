"""Tables as text for terminals, as Markdown and as HTML."""

import html
from collections.abc import Collection, Sequence

from lalora_lightning.names import BlocksByKind

__all__ = ["block_table", "html_table", "markdown_table", "text_table"]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Return the rows as aligned columns, below a header and a line.

    Args:
        header: A title for each column.
        rows: A cell for each column.
        left: Indices of the columns that are aligned to the left; the others are aligned to the right.

    >>> print(text_table(["layer", "rank"], [["0", "8"], ["1", "16"]]))
    layer  rank
    -----------
    0         8
    1        16
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def block_table(layout: BlocksByKind, values: Sequence[str]) -> list[list[str]]:
    """Return a table of blocks by kind of projection, with a header and an empty cell where a block has none.

    >>> block_table(BlocksByKind(["0", "1"], ["q", "up"], [(0, 0), (0, 1), (1, 1)]), ["3", "1", "2"])
    [['block', 'q', 'up'], ['0', '3', '1'], ['1', '', '2']]
    """
    rows = [[block, *[""] * len(layout.kinds)] for block in layout.blocks]
    for (row, column), value in zip(layout.cells, values, strict=True):
        rows[row][1 + column] = value
    return [["block", *layout.kinds], *rows]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] | None = None) -> str:
    """Return the rows as a Markdown table.

    Args:
        header: A title for each column.
        rows: A cell for each column; line breaks and vertical bars in it are escaped.
        left: Indices of the columns that are aligned to the left; the others are aligned to the right. By default no
            alignment is set.

    >>> print(markdown_table(["layer", "rank"], [["0", "8"]], left=[0]))
    | layer | rank |
    | --- | ---: |
    | 0 | 8 |
    """
    line = ["---" if left is None or i in left else "---:" for i in range(len(header))]
    cells = [[" ".join(cell.replace("|", "&#124;").split()) for cell in row] for row in (header, line, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as an HTML table with escaped cells.

    >>> html_table(["a"], [["<b>"]])
    '<table><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    return f"<table>{_html_row(header, 'th')}{''.join(_html_row(row, 'td') for row in rows)}</table>"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
