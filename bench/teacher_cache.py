"""Distillation from a teacher cache beside the live teacher, one job: bytes, gradients, steps, memory and what the student learns.

    python bench/teacher_cache.py --teacher models/SmolLM2-135M-Instruct --data alpaca.jsonl
    python bench/teacher_cache.py --teacher ... --data ... --forms hidden-int8,topk-64 --seeds 1 --steps 20

The student is some evenly spaced layers of the teacher, with LoRA on all linears (`--rank 0`: all parameters trained); batches of 4
examples, shuffled, fp32. Every form is captured by `kdtune run cache_teacher`; then every run makes the same steps, live and from each
cache, a process each, in turns. For each form:

    bytes/token     of a stored position
    KL(live||stored) in nats, as the capture measures it on held-out examples
    gradient error  of the divergence's gradient to the student's last hidden states on one batch, against the live teacher's: the norm of
                    the difference over the norm
    s/step          median, the first two steps left out; "x live" is its ratio to the live run of the same seed
    wait            share of the steps' time that they waited for the cache's files
    peak GiB        of the resident set
    held-out KL     KL(teacher || student) per token after the last step, mean over the seeds and its standard error

Expected before measuring: hidden states in fp32 train the same numbers to the bit; a step takes the student's share of the operations
(SmolLM2: 0.28 of 0.61 GFLOP a token, so 0.5 to 0.6 of the live step), the wait is under 2 %, and the resident set lacks the teacher's
weights but for its head (0.4 GiB); int8 costs less than 1 % of the gradient, 64 ids with their tail some per cent, 50 draws
a third, without bias.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import step
import torch

from kdtune import checkpoint, data, losses, teachers, tokenizers
from kdtune.distributed import World

FORMS: dict[str, list[str]] = {
    "hidden-fp32": ["kind=hidden", "stored_dtype=fp32"],
    "hidden-bf16": ["kind=hidden", "stored_dtype=bf16"],
    "hidden-int8": ["kind=hidden", "stored_dtype=int8"],
    "topk-256": ["kind=topk", "k=256"],
    "topk-64": ["kind=topk", "k=64"],
    "sampled-50": ["kind=sampled", "num_draws=50"],
}
HERE = Path(__file__).parent
BATCH_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description="A teacher cache beside the live teacher.")
    parser.add_argument("--teacher", required=True, help="folder or file that kdtune reads")
    parser.add_argument("--data", required=True, help="JSON lines of instruction, input, output")
    parser.add_argument("--out", default="runs/bench-teacher-cache")
    parser.add_argument("--forms", default=",".join(FORMS), help=", ".join(FORMS))
    parser.add_argument("--layers", type=int, default=12, help="of the student")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA; 0: all parameters are trained")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    out = Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    teacher, student = step.make_models(args.teacher, args.layers, out / "models")
    texts, _ = step.write_rows(args.data, teacher, BATCH_SIZE * args.steps, out)
    forms = args.forms.split(",")
    for form in forms:
        capture(form, teacher, texts, out, args.threads)
    runs = {
        (form, seed): train(form, seed, teacher, student, texts, out, args)
        for seed in range(args.seeds)
        for form in ("live", *forms)
    }
    report(forms, runs, gradient_errors(forms, teacher, student, texts, out), teacher, out, args)


def capture(form: str, teacher: Path, texts: Path, out: Path, threads: int) -> None:
    """Fill the cache of a form, if it is not there."""
    settings = {
        "output_dir": out / "caches" / form, "tokenizer.path": teacher, "teacher_checkpointer.checkpoint_dir": teacher,
        "dataset._component_": "kdtune.data.alpaca_dataset", "dataset.source": texts, "dataset_val": "null",
    }  # fmt: skip
    given = [f"{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "kdtune", "run", "cache_teacher", "--config", "smollm2/cache_teacher"]
    step.run([*command, *given, "~dataset.split", *FORMS[form]], out / f"capture-{form}.log", threads)


def train(form: str, seed: int, teacher: Path, student: Path, texts: Path, out: Path, args: argparse.Namespace) -> Path:
    """Make the steps with the live teacher or a form, if they are not made, and return the run's folder."""
    folder = out / f"{form}-seed{seed}"
    if (folder / "final").exists():
        return folder
    settings: dict[str, Any] = {
        "output_dir": folder, "tokenizer.path": teacher, "checkpointer.checkpoint_dir": student, "dtype": "fp32",
        "dataset.source": texts, "batch_size": BATCH_SIZE, "optimizer.lr": args.lr, "kd_ratio": 0.5, "max_steps_per_epoch": args.steps,
        "shuffle": "true", "seed": seed, "log_peak_memory_stats": "true",
    }  # fmt: skip
    if args.rank:
        settings |= {"adapter.lora_rank": args.rank, "adapter.lora_alpha": 2 * args.rank}
    if form == "live":
        settings["teacher_checkpointer.checkpoint_dir"] = teacher
    else:
        settings |= {"teacher._component_": "kdtune.teachers.CachedTeacher", "teacher.path": out / "caches" / form}
    given = [f"{name}={value}" for name, value in settings.items()]
    removed = [
        "~metric_logger",
        *([] if form == "live" else ["~teacher_checkpointer"]),
        *([] if args.rank else ["~adapter"]),
    ]
    command = [
        sys.executable,
        "-m",
        "kdtune",
        "run",
        "knowledge_distillation",
        "--config",
        str(HERE / "peers/kdtune.yaml"),
    ]
    step.run([*command, *given, *removed], out / f"{folder.name}.log", args.threads)
    return folder


def gradient_errors(forms: list[str], teacher: Path, student: Path, texts: Path, out: Path) -> dict[str, float]:
    """Return for each form the relative error of the gradient of the forward KL to the student's hidden states, on one batch."""
    tokenizer, world = tokenizers.load(teacher, max_seq_len=512), World(torch.device("cpu"))
    dataset = data.alpaca_dataset(tokenizer, source=str(texts))
    batch = next(iter(data.batches(dataset, BATCH_SIZE, tokenizer.pad_id)))
    ours, theirs = (
        checkpoint.load_model(path, dtype=torch.float32, device="cpu").eval() for path in (student, teacher)
    )
    with torch.no_grad():
        hidden = ours(**batch.inputs, return_hidden=True)
    loss_fn = losses.KDLoss(kd_ratio=1.0)

    def gradient(source: Any) -> torch.Tensor:
        leaf = hidden.detach().requires_grad_()
        source.prefetch([batch])
        loss_fn(leaf, ours.output, source(batch), batch.targets)[0].backward()
        assert leaf.grad is not None
        return leaf.grad

    live, found = gradient(teachers.OnlineTeacher(theirs)), {}
    for form in forms:
        cached = teachers.CachedTeacher(str(out / "caches" / form))
        cached.start(None, world)
        found[form] = float((gradient(cached) - live).norm() / live.norm())
    return found


def report(
    forms: list[str],
    runs: dict[tuple[str, int], Path],
    errors: dict[str, float],
    teacher: Path,
    out: Path,
    args: argparse.Namespace,
) -> None:
    """Print a row of the live run, and one of each form."""
    lines, kls = [], {key: step.held_out_kl(folder, teacher, out) for key, folder in runs.items()}
    seeds = range(args.seeds)
    for form in ("live", *forms):
        steps = [read(runs[form, seed]) for seed in seeds]
        median = statistics.median(one["step_seconds"] for run in steps for one in run)
        ratio = statistics.median(
            one["step_seconds"] / live["step_seconds"]
            for seed in seeds
            for one, live in zip(steps[seed], read(runs["live", seed]), strict=True)
        )
        waited = sum(one.get("teacher_seconds", 0.0) for run in steps for one in run)
        wait = waited / sum(one["step_seconds"] for run in steps for one in run)
        peak = max(run[-1]["peak_memory_rss"] for run in steps)
        own = [kls[form, seed] for seed in seeds]
        error = statistics.stdev(own) / len(own) ** 0.5 if len(own) > 1 else float("nan")
        kept = ["", "", ""]
        if form != "live":
            quality = json.loads((out / "caches" / form / "quality.json").read_text())
            kept = [f"{quality['bytes_per_token']:,}", f"{quality['forward_kl']:.2g}", f"{errors[form]:.2g}"]
        numbers = [
            f"{median:.3g}",
            f"{ratio:.2f}",
            f"{wait:.2%}",
            f"{peak:.2f}",
            f"{statistics.fmean(own):.4f} ± {error:.4f}",
        ]
        lines.append(f"| {' | '.join([form, *kept, *numbers])} |")
    print(
        f"\ntorch {torch.__version__}, {args.threads} threads, fp32, LoRA rank {args.rank}, {args.steps} steps, {args.seeds} seeds"
    )
    columns = "form, bytes/token, KL(live||stored), gradient error, s/step, x live, wait, peak GiB, held-out KL"
    print(f"| {columns.replace(', ', ' | ')} |\n|{'---|' * len(columns.split(', '))}")
    print("\n".join(lines), flush=True)


def read(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's steps but the first two."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "step_seconds" in row][step.WARM_UP :]


if __name__ == "__main__":
    main()
