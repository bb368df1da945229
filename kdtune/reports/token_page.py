"""The HTML page of examples token by token: one file with its data, styles and script inside, which loads nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdtune.reports.page import embedded_json, filled, quoted


def token_page(title: str, divergence: str, rows: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Return the page as HTML text: tokens coloured by their divergence, and a token's numbers when it is chosen.

    Args:
        title: heading.
        divergence: its display name.
        rows: tokens of the examples, as `kdtune.evaluation.inspect_tokens` returns them.
    """
    data = {"divergence": divergence, "rows": rows}
    return filled("tokens.html", {"TITLE": quoted(title), "DATA": embedded_json(data)})
