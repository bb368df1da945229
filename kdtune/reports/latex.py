"""LaTeX tables and plots of a sweep, for a paper's appendix: booktabs and graphicx, with captions."""

import re
from collections.abc import Iterable, Sequence

from kdtune.escape import latex_breakable, latex_text
from kdtune.reports.baseline import Baseline
from kdtune.reports.plots import Plot
from kdtune.reports.rows import Row, axis_names
from kdtune.reports.tables import difference_text, mean_text, short_names
from kdtune.sweeps.plan import shown_value

_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?![\w.]*\w)")
# As wide as it is, and no wider than the text.
_FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
_HEAD = r"""% Needs \usepackage{booktabs,graphicx}; \input this file where it lies beside its plots, or set \graphicspath."""


def latex_report(
    title: str,
    facts: Sequence[tuple[str, str]],
    rows: Sequence[Row],
    metrics: Sequence[str],
    baseline: Baseline | None,
    plots: Sequence[Plot],
) -> str:
    """Format the settings, the results, the differences to the baseline and the plots, to be input in a document."""
    axes, names = axis_names(rows), short_names(metrics)
    parts = [_HEAD]
    if facts:
        body = _tabular(
            ["setting", "value"],
            ([latex_text(name), latex_breakable(value)] for name, value in facts),
            "lp{0.56\\linewidth}",
        )
        parts.append(_table(body, f"{title}: what was run.", "settings", fit=False))
    if rows:
        lines = (
            [*_axis_cells(row, axes), f"${len(row.cells)}$", *(_cell(mean_text(row, metric)) for metric in metrics)]
            for row in rows
        )
        header = [*axes, "n", *(names[metric] for metric in metrics)]
        parts.append(
            _table(
                _tabular(header, lines, "l" * len(axes) + "r" * (1 + len(metrics))),
                _results_caption(title, rows),
                "results",
            )
        )
    if baseline is not None and len(rows) > 1:
        lines = (
            [*_axis_cells(row, axes), *(_difference_cell(row, baseline, metric) for metric in metrics)]
            for row in rows
            if row not in baseline.rows
        )
        header = [*axes, *(names[metric] for metric in metrics)]
        caption = (
            f"{title}: difference to {baseline.name}, and its size in standard errors of the difference: p paired by seed, t of "
            "two samples, of n seeds. Bold: beyond the two-sided 5 % bound of Student's t, not corrected for the number of "
            "comparisons."
        )
        parts.append(_table(_tabular(header, lines, "l" * len(axes) + "r" * len(metrics)), caption, "differences"))
    parts += [_figure(plot, title) for plot in plots]
    return "\n\n".join(parts) + "\n"


def _results_caption(title: str, rows: Sequence[Row]) -> str:
    has_seeds = any(len(row.cells) > 1 for row in rows)
    text = f"{title}: mean over n seeds ± its standard error s / √n" if has_seeds else f"{title}: one seed each (n = 1)"
    if any(len(row.cells) == 1 for row in rows):
        text += "; where n = 1, d marks the task's own standard error over its documents, and ± - that there is none"
    return f"{text}."


def _tabular(header: Sequence[str], lines: Iterable[Sequence[str]], columns: str) -> str:
    body = [" & ".join(line) + r" \\" for line in lines]
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(latex_text, header)) + r" \\", r"\midrule", *body,
         r"\bottomrule", r"\end{tabular}"]
    )  # fmt: skip


def _table(tabular: str, caption: str, label: str, *, fit: bool = True) -> str:
    inner = f"{_FIT}\n{tabular}}}" if fit else tabular
    return "\n".join(
        [r"\begin{table}[htbp]", r"\centering\small", rf"\caption{{{latex_caption(caption)}}}", rf"\label{{tab:kdtune-{label}}}",
         inner, r"\end{table}"]
    )  # fmt: skip


def _figure(plot: Plot, title: str) -> str:
    stem = plot.files[0].stem
    return "\n".join(
        [r"\begin{figure}[htbp]", r"\centering", rf"\includegraphics[width=\linewidth]{{{stem}}}",
         rf"\caption{{{latex_caption(f'{title}. {plot.caption}')}}}", rf"\label{{fig:kdtune-{stem.replace('_', '-')}}}",
         r"\end{figure}"]
    )  # fmt: skip


def latex_caption(text: str) -> str:
    """Escape a sentence of ours, which contains names from data, for LaTeX."""
    return latex_text(text).replace(r"s / $\surd$n", r"$s/\sqrt{n}$")


def _axis_cells(row: Row, axes: Sequence[str]) -> list[str]:
    return [latex_text(shown_value(row.axes[axis])) if axis in row.axes else "--" for axis in axes]


def _cell(text: str) -> str:
    """Put numbers and ± in math mode, where a minus is set as a minus."""
    text = re.sub(r"(?<![\w.])-(?!\d)", "--", text)
    return _NUMBER.sub(lambda number: f"${number[0]}$", text).replace("±", r"$\pm$")


def _difference_cell(row: Row, baseline: Baseline, metric: str) -> str:
    found = baseline.difference(row, metric)
    text = _cell(difference_text(found))
    return rf"\textbf{{\boldmath {text}}}" if found is not None and found.is_beyond_bound else text
