"""Format tables for the terminal."""

from collections.abc import Mapping, Sequence

from kdtune.log import terminal_width


def format_table(rows: Sequence[Mapping[str, object]], *, width: int | None = None) -> str:
    """Format the rows as aligned text, one column per key in order of first appearance, under a ruled header; "" without rows.

    Floats get three decimals, a missing value or None is "-". Text is left-aligned, numbers right-aligned. A table
    wider than `width` is transposed; if that is too wide as well, each row becomes a paragraph.

    Args:
        rows: values by column.
        width: width in characters; None: the terminal's, see `kdtune.log.terminal_width`.

    >>> print(format_table([{"student": "before", "KL": 7.25}, {"student": "after", "KL": 2.5, "steps": 10}]))
    student     KL  steps
    -------  -----  -----
    before   7.250      -
    after    2.500     10
    """
    names = list(dict.fromkeys(key for row in rows for key in row))
    table = [[name, *(_cell(row.get(name)) for row in rows)] for name in names]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    width = terminal_width() if width is None else width
    text = _aligned(table, is_text)
    if width is None or _width(text) <= width or not rows:
        return text
    turned = _aligned(
        [[cell.strip() for cell in line] for line in zip(*table, strict=True)], [True] + [False] * len(rows)
    )
    if _width(turned) <= width:
        return turned
    return "\n\n".join("\n".join(f"{name}: {cell.strip()}" for name, cell in zip(names, cells, strict=True))
                       for cells in list(zip(*table, strict=True))[1:])  # fmt: skip


def _width(text: str) -> int:
    return max(map(len, text.splitlines()), default=0)


def _aligned(columns: Sequence[Sequence[str]], is_text: Sequence[bool]) -> str:
    """Format columns side by side: a header, a rule and cells each, padded to one width."""
    padded = []
    for (head, *cells), left in zip(columns, is_text, strict=True):
        width = max(map(len, [head, *cells]))
        lines = [head, "-" * width, *cells]
        padded.append([line.ljust(width) if left else line.rjust(width) for line in lines])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
