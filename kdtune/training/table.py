"""Tables for the terminal."""

from collections.abc import Mapping, Sequence


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as aligned text, one column per key in order of first appearance, under a ruled header; "" without rows.

    Floats get three decimals, a missing value or None is "-". Columns with text are set left, numbers right.

    >>> print(format_table([{"student": "before", "KL": 7.25}, {"student": "after", "KL": 2.5, "steps": 10}]))
    student     KL  steps
    -------  -----  -----
    before   7.250      -
    after    2.500     10
    """
    columns = [
        _column(name, [row.get(name) for row in rows]) for name in dict.fromkeys(key for row in rows for key in row)
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _column(name: str, values: Sequence[object]) -> list[str]:
    """Header, rule and cells, padded to one width."""
    cells = [name, *map(_cell, values)]
    width = max(map(len, cells))
    is_text = any(isinstance(value, str) for value in values)
    padded = [cell.ljust(width) if is_text else cell.rjust(width) for cell in cells]
    return [padded[0], "-" * width, *padded[1:]]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
