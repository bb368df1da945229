"""lm-eval tasks by kdtune and by lm-eval's own `hf` backend: every log-likelihood compared, both timed in one run.

    python bench/evaluation.py --model models/SmolLM2-135M-Instruct-hf --tasks hellaswag --limit 300
    python bench/evaluation.py --model FOLDER --checkpoint FILE.gguf --include-path TASKS --tasks a,b,c --limit 300

`--model` is a Hugging Face folder that transformers can load; `--checkpoint` what kdtune reads, where that is another
form of the same weights. Both run in fp32 in this process on the same requests, turn by turn: some documents' requests
by kdtune, the same by `hf`, then the next. Time is that of answering the requests, without loading models and
documents: the processor's, which other processes do not lengthen, and the wall clock's, the one that counts on a GPU.
Needs pip install 'lm-eval>=0.4.13' and transformers with accelerate.

Expected before measuring: kdtune takes a third of the time on tasks whose endings share a context (hellaswag, multiple
choice by letters) and less where all questions share a prompt (truthfulqa_mc2), since it computes what is shared once.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from kdtune import tokenizers
from kdtune.checkpoint import load_model
from kdtune.evaluation import flat_metrics, load_tasks
from kdtune.evaluation.lm_eval_model import KDTuneLM

# Requests a turn: enough to fill batches.
PART = 256


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
    ours = KDTuneLM(
        load_model(checkpoint, dtype=torch.float32, device=args.device),
        tokenizers.load(checkpoint),
        batch_size=args.batch_size,
        show_progress=False,
    )
    theirs = HFLM(pretrained=args.model, dtype="float32", batch_size=args.hf_batch_size, device=args.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}", flush=True)
    for task in args.tasks.split(","):
        print(json.dumps(compare(Turns(ours, theirs), task, args.include_path, args.limit)), flush=True)


class Turns:
    """Answers by both models, part by part; the answers of hf wait for the second evaluation."""

    def __init__(self, ours: KDTuneLM, theirs: HFLM) -> None:
        self.ours, self.theirs = ours, theirs
        self.waiting: list[Any] = []
        self.seconds = {"kdtune": 0.0, "hf": 0.0}
        self.wall_seconds = {"kdtune": 0.0, "hf": 0.0}

    def answer(self, requests: list[Any]) -> list[Any]:
        """Ours, both timed; the first part warms both up and is answered twice."""
        self._timed("kdtune", self.ours, requests[: PART // 8])
        self._timed("hf", self.theirs, requests[: PART // 8])
        self.seconds, self.wall_seconds = dict.fromkeys(self.seconds, 0.0), dict.fromkeys(self.seconds, 0.0)
        answers = []
        for start in range(0, len(requests), PART):
            part = requests[start : start + PART]
            answers += self._timed("kdtune", self.ours, part)
            self.waiting += self._timed("hf", self.theirs, part)
        return answers

    def _timed(self, name: str, lm: Any, requests: list[Any]) -> list[Any]:
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else int
        start, wall = time.process_time(), time.perf_counter()
        found: list[Any] = lm.loglikelihood(requests, disable_tqdm=True)
        synchronize()
        self.seconds[name] += time.process_time() - start
        self.wall_seconds[name] += time.perf_counter() - wall
        return found


LIKELIHOODS_ONLY = "--tasks: only tasks that compare log-likelihoods of answers, such as hellaswag, are timed here"


class Answers(LM):
    """An lm-eval model whose log-likelihoods a function gives."""

    def __init__(self, give: Callable[[list[Any]], list[Any]]) -> None:
        super().__init__()
        self.give = give

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """The function's answers."""
        return self.give(requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        """Not compared here."""
        raise SystemExit(LIKELIHOODS_ONLY)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Not compared here."""
        raise SystemExit(LIKELIHOODS_ONLY)


def evaluate(give: Callable[[list[Any]], list[Any]], task: str, include_path: str | None, limit: int) -> dict[str, Any]:
    found = simple_evaluate(
        model=Answers(give), tasks=load_tasks([task], include_path), limit=limit, log_samples=True, bootstrap_iters=0
    )
    assert found is not None
    return dict(found)


def compare(turns: Turns, task: str, include_path: str | None, limit: int) -> dict[str, Any]:
    """Figures of one task: documents, largest difference of a log-likelihood, metrics of both, seconds a document."""
    a = evaluate(turns.answer, task, include_path, limit)
    b = evaluate(lambda requests: turns.waiting, task, include_path, limit)
    (samples_a,), (samples_b,) = a["samples"].values(), b["samples"].values()
    pairs = [
        (x, y)
        for mine, other in zip(samples_a, samples_b, strict=True)
        for x, y in zip(loglikelihoods(mine), loglikelihoods(other), strict=True)
    ]
    metrics_a, metrics_b = flat_metrics(a), flat_metrics(b)
    return {
        "task": task,
        "documents": len(samples_a),
        "requests": len(pairs),
        "largest difference": max(abs(x - y) for x, y in pairs),
        "metrics": metrics_a,
        "metrics of hf": metrics_b,
        "largest difference of a metric": max(abs(metrics_a[name] - metrics_b[name]) for name in metrics_b),
        "seconds a document": {name: value / len(samples_a) for name, value in turns.seconds.items()},
        "wall seconds a document": {name: value / len(samples_a) for name, value in turns.wall_seconds.items()},
        "times faster": turns.seconds["hf"] / turns.seconds["kdtune"],
        "times faster by the wall clock": turns.wall_seconds["hf"] / turns.wall_seconds["kdtune"],
    }


def loglikelihoods(sample: dict[str, Any]) -> list[float]:
    return [float(answer[0]) for answers in sample["resps"] for answer in answers]


if __name__ == "__main__":
    main()
