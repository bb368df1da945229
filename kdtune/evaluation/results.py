"""Results of an evaluation: results.json, the documents' answers, and the rows of a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdtune.checkpoint import atomic_write_text
from kdtune.evaluation.lm_eval import flat_metrics, results_rows
from kdtune.evaluation.rolling import TextPerplexity
from kdtune.json_files import to_json

if TYPE_CHECKING:
    # rouge.py needs `repeated`.
    from kdtune.evaluation.rouge import RougeResult

# Of lm-eval's document, what is said task by task.
_BY_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass
class Measured:
    """Values measured so far."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers by a flat name, such as held_out/kd_loss; lm-eval's own are in its document in `details`."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further details; the key lm_eval has its own results document."""
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Documents and answers by the name of their task or set."""
    pages: dict[str, str] = field(default_factory=dict)
    """HTML pages by the name of their file."""

    def add_perplexity(self, name: str, found: TextPerplexity) -> None:
        """Add the perplexity of a text; its name, that of a file, has no "/"."""
        self.details.setdefault("perplexity", {})[name] = {**vars(found), **found.metrics}
        for key, value in found.metrics.items():
            self.metrics[f"perplexity/{name}/{key.removesuffix('_perplexity')}".removesuffix("/token")] = value

    def add_rouge(self, name: str, found: "RougeResult", num_instructions: int) -> None:
        """Add ROUGE-L of the answers to a set of instructions."""
        self.metrics |= {f"rouge/{name}": found.mean, f"rouge/{name}_stderr": found.stderr}
        self.details.setdefault("rouge", {})[name] = {"instructions": num_instructions, "truncated": found.truncated}
        self.samples[f"rouge_{name}"] = found.records

    def add_tasks(self, found: Mapping[str, Any]) -> None:
        """Add lm-eval's document on some of the tasks."""
        self.samples |= found.get("samples", {})
        document = self.details.setdefault("lm_eval", {})
        for key, value in found.items():
            if key != "samples":
                document[key] = {**document.get(key, {}), **value} if key in _BY_TASK else value

    @property
    def all_metrics(self) -> dict[str, float]:
        """Return every number under its flat name."""
        return self.metrics | (flat_metrics(self.details["lm_eval"]) if "lm_eval" in self.details else {})

    def rows(self) -> list[dict[str, object]]:
        """Return one row per metric for a table, with its standard error."""
        of_tasks = results_rows(self.details["lm_eval"]) if "lm_eval" in self.details else []
        return [*of_tasks, *_metric_rows(self.metrics)]

    def write(self, folder: Path, *, versions: Mapping[str, Any], log_samples: bool) -> None:
        """Write results.json, pages, and samples/NAME.jsonl with one document per line, each atomically; creates the folder.

        Non-finite numbers become null, objects that JSON lacks become text, lone surrogates are escaped.
        """
        document = {"metrics": self.all_metrics, "versions": versions, **self.details}
        atomic_write_text(folder / "results.json", to_json(document, indent=1, default=str) + "\n")
        for name, page in self.pages.items():
            atomic_write_text(folder / name, page)
        for name, records in self.samples.items() if log_samples else ():
            atomic_write_text(
                folder / "samples" / f"{name}.jsonl", "".join(to_json(record, default=str) + "\n" for record in records)
            )


def _metric_rows(metrics: Mapping[str, float]) -> list[dict[str, object]]:
    return [
        {"task": name.rpartition("/")[0], "metric": name.rpartition("/")[2], "value": value,
         "± stderr": metrics.get(f"{name}_stderr")}
        for name, value in metrics.items()
        if name.removesuffix("_stderr") == name or name.removesuffix("_stderr") not in metrics
    ]  # fmt: skip
