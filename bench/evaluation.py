"""lm-eval tasks by kdtune and by lm-eval's own `hf` backend: every log-likelihood compared, both timed in one run.

    python bench/evaluation.py --model models/SmolLM2-135M-Instruct-hf --tasks hellaswag --limit 300
    python bench/evaluation.py --model FOLDER --checkpoint FILE.gguf --include-path TASKS --tasks a,b,c --limit 300

`--model` is a Hugging Face folder that transformers can load; `--checkpoint` what kdtune reads, where that is another
form of the same weights. Both run in fp32 in this process, turn by turn, on the same requests; the first documents of a
task warm both up. Time is that of answering the requests, without loading models and documents. Needs
pip install 'kdtune[eval]' and transformers with accelerate.

Expected before measuring: kdtune takes a third of the time on tasks whose endings share a context (hellaswag, multiple
choice by letters) and less where all questions share a prompt (truthfulqa_mc2), since it computes what is shared once.
"""

import argparse
import json
import time
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from kdtune import tokenizers
from kdtune.checkpoint import load_model
from kdtune.evaluation import flat_metrics, load_tasks
from kdtune.evaluation.lm_eval_model import KDTuneLM


def main() -> None:
    parser = argparse.ArgumentParser(description="lm-eval tasks by kdtune and by lm-eval's hf backend.")
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--checkpoint", help="what kdtune loads; default: the same folder")
    parser.add_argument("--tasks", required=True, help="comma-separated")
    parser.add_argument("--include-path")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--hf-batch-size", type=int, default=1, help="lm-eval's default is 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    checkpoint = args.checkpoint or args.model
    ours = Timed(
        KDTuneLM(
            load_model(checkpoint, dtype=torch.float32, device=args.device),
            tokenizers.load(checkpoint),
            batch_size=args.batch_size,
            show_progress=False,
        )
    )
    theirs = Timed(HFLM(pretrained=args.model, dtype="float32", batch_size=args.hf_batch_size, device=args.device))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    for task in args.tasks.split(","):
        for lm in (ours, theirs):
            evaluate(lm, task, args.include_path, 4)
            lm.seconds = 0.0
        print(json.dumps(compare(ours, theirs, task, args.include_path, args.limit)))


class Timed:
    """Passes lm-eval's calls on and adds up how long answering the requests takes."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self.seconds = 0.0
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, name, self._timed(getattr(lm, name)))

    def _timed(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            answers = method(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return answers

        return call


def evaluate(timed: Timed, task: str, include_path: str | None, limit: int) -> dict[str, Any]:
    found = simple_evaluate(
        model=timed.lm, tasks=load_tasks([task], include_path), limit=limit, log_samples=True, bootstrap_iters=0
    )
    assert found is not None
    return dict(found)


def compare(ours: Timed, theirs: Timed, task: str, include_path: str | None, limit: int) -> dict[str, Any]:
    """Figures of one task: documents, largest difference of a log-likelihood, metrics of both, seconds a document."""
    a, b = (evaluate(lm, task, include_path, limit) for lm in (ours, theirs))
    (samples_a,), (samples_b,) = a["samples"].values(), b["samples"].values()
    pairs = [
        (x, y)
        for mine, other in zip(samples_a, samples_b, strict=True)
        for x, y in zip(loglikelihoods(mine), loglikelihoods(other), strict=True)
    ]
    metrics_a, metrics_b = flat_metrics(a), flat_metrics(b)
    documents = len(samples_a)
    return {
        "task": task,
        "documents": documents,
        "requests": len(pairs),
        "largest difference": max(abs(x - y) for x, y in pairs),
        "metrics": metrics_a,
        "metrics of hf": metrics_b,
        "largest difference of a metric": max(abs(metrics_a[name] - metrics_b[name]) for name in metrics_b),
        "seconds a document": ours.seconds / documents,
        "seconds a document, hf": theirs.seconds / documents,
        "times faster": theirs.seconds / ours.seconds,
    }


def loglikelihoods(sample: dict[str, Any]) -> list[float]:
    return [float(answer[0]) for answers in sample["resps"] for answer in answers]


if __name__ == "__main__":
    main()
