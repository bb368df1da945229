"""What `kdtune plan` says of memory and time, against runs: models of SmolLM2-135M's shape with random weights, on a CPU.

    python bench/plan.py                        # all cases, one after the other, in processes of their own
    python bench/plan.py --only "lora, bf16"    # some of them, separated by semicolons

Memory: the peak of the resident set at the run's last step, less the resident set of the same process after the same run with
models of two narrow layers, which has imported and started all that the run uses. The C library is told to take blocks from
1 MiB on from the system and to return them when they are freed, so that the resident set is what is in use. "kept" is the
same without that, as a run is by default: it keeps what is freed, in pieces, for the next tensors. Prediction: `peak` of
the plan, for the config's longest examples, of which the data consists.

Time: processor seconds, the median of the steps after the second, as a run is by default; prediction: --calibrate, on the same
data in a process of its own. With one thread they are the seconds of an idle machine. Of several processes the memory is that of
the largest, and no time is predicted.

Expected before measuring: memory within 10 %, time within 25 %.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

STEPS, WARM_UP = 5, 2
MEMORY, TIME = 0.10, 0.25
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}

SHAPE = {
    "vocab_size": 49152,
    "embed_dim": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "intermediate_dim": 1536,
    "max_seq_len": 2048,
}
NARROW = {
    "vocab_size": 320,
    "embed_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_dim": 128,
}
# Examples of the longest length that there is, or of 32 tokens to that.
EQUAL, MIXED = "equal", "mixed"


class Case(NamedTuple):
    """A config, its recipe, the number of its processes and the lengths of its examples."""

    overrides: str
    recipe: str = "knowledge_distillation"
    ranks: int = 1
    lengths: str = EQUAL


LORA = "adapter=kdtune.models.apply_lora adapter.lora_rank=64 adapter.apply_lora_to_mlp=true"
DORA = f"{LORA} adapter.use_dora=true adapter.apply_lora_to_output=true"
PACKS = "batch_size=1 tokenizer.max_seq_len=1024 dataset.packed=true dataset.split_across_pack=true"
CUT = "gradient_accumulation_steps=6 tokens_per_micro_batch=512 tokenizer.max_seq_len=128"
OTHER = """optimizer=kdtune.training.Muon kd_loss=kdtune.losses.JensenShannon
    model.tie_embeddings=false model.embed_dim=288 model.num_heads=6 model.vocab_size=128000
    teacher_model.vocab_size=128000 teacher_model.num_layers=6"""
CASES = {
    "full, fp32, padded": Case("dtype=fp32 padding_free=false tokenizer.max_seq_len=256"),
    "full, bf16": Case("dtype=bf16 tokenizer.max_seq_len=256"),
    "lora, fp32": Case(f"{LORA} dtype=fp32 tokenizer.max_seq_len=256"),
    "dora, bf16, adapter on the head": Case(f"{DORA} dtype=bf16 tokenizer.max_seq_len=256"),
    "qlora, bf16": Case(f"{LORA} adapter.quantize_base=true dtype=bf16 tokenizer.max_seq_len=256"),
    "full, fp32, recomputed": Case(
        "dtype=fp32 enable_activation_checkpointing=true batch_size=8 tokenizer.max_seq_len=256"
    ),
    "lora, fp32, packs of 1,024": Case(f"{LORA} dtype=fp32 {PACKS}", lengths=MIXED),
    "full, fp32, 512 tokens at most": Case(f"dtype=fp32 {CUT}", lengths=MIXED),
    "lora, fp32, teacher in 8 bits": Case(f"{LORA} dtype=fp32 teacher_quantization=int8 tokenizer.max_seq_len=256"),
    "finetune, bf16, two micro-batches": Case(
        "~adapter dtype=bf16 gradient_accumulation_steps=2 tokenizer.max_seq_len=256", recipe="finetune"
    ),
    "muon, fp32, JSD, 128,000 ids, untied": Case(f"dtype=fp32 tokenizer.max_seq_len=256 {OTHER}"),
    "full, bf16 logits, hidden states": Case(
        "dtype=bf16 loss_logits_dtype=bf16 hidden_loss=kdtune.losses.HiddenStateLoss tokenizer.max_seq_len=256"
    ),
    "full, fp32, two processes": Case("dtype=fp32 batch_size=2 tokenizer.max_seq_len=256", ranks=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="kdtune plan against runs.")
    parser.add_argument("--only", help="names of cases, separated by semicolons")
    parser.add_argument("--no-time", action="store_true", help="memory alone; other work may run beside it")
    parser.add_argument("--no-memory", action="store_true", help="times alone, and the memory that a run keeps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return job(json.loads(args.job))
    names = args.only.split(";") if args.only else list(CASES)
    head = "case, planned MiB, measured, ratio, kept, planned s, measured, ratio, "
    print(f"| {head.replace(', ', ' | ')} |\n|{'---|' * len(head.split(', '))}", flush=True)
    for name in names:
        print(row(name, CASES[name], args), flush=True)


def row(name: str, case: Case, args: argparse.Namespace) -> str:
    """Return the table's row of a case, from a process that plans and one, or several, that run."""
    overrides, ranks = case.overrides.split(), case.ranks
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.jsonl"
        limit = int(next(one for one in overrides if one.startswith("tokenizer.max_seq_len=")).split("=")[1])
        write_texts(data, limit, case.lengths)
        task = {
            "recipe": case.recipe,
            "ranks": ranks,
            "overrides": [*overrides, f"dataset.source={data}"],
            "folder": folder,
        }
        timed = not args.no_time and ranks == 1
        planned = child({**task, "kind": "plan", "timed": timed}, 1, args.threads)[0]
        exact = (
            []
            if args.no_memory
            else child({**task, "kind": "run", "steps": WARM_UP + 1}, ranks, args.threads, RETURNED)
        )
        kept = [] if args.no_time else child({**task, "kind": "run", "steps": STEPS}, ranks, args.threads)
    ratios, cells = [], [f"{planned['peak']:,.0f}", "", "", "", "", "", ""]
    if exact:
        peak = max(one["peak"] for one in exact)
        ratios.append((planned["peak"] / peak, MEMORY))
        cells[1:3] = f"{peak:,.0f}", f"{ratios[-1][0]:.2f}"
    if kept:
        cells[3] = f"{max(one['peak'] for one in kept):,.0f}"
    if timed:
        seconds = kept[0]["seconds"]
        ratios.append((planned["seconds"] / seconds, TIME))
        cells[4:] = f"{planned['seconds']:.3g}", f"{seconds:.3g}", f"{ratios[-1][0]:.2f}"
    verdict = "within" if all(abs(ratio - 1) <= limit for ratio, limit in ratios) else "outside"
    return f"| {' | '.join([name, *cells, verdict])} |"


def write_texts(path: Path, limit: int, lengths: str) -> None:
    """Write texts of ASCII letters, one byte and so one token each: as long as can be, or of 32 tokens to that, 256 at most."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(32, max(33, min(limit, 256)), 512) if lengths == MIXED else [limit + 8] * 128
    lines = (json.dumps({"text": bytes(draw.integers(97, 123, size, dtype=np.uint8)).decode()}) for size in sizes)
    path.write_text("\n".join(lines) + "\n")


def child(
    task: dict[str, Any], ranks: int, threads: int, variables: Mapping[str, str] = MappingProxyType({})
) -> list[dict[str, float]]:
    """Return what the processes of a task found, one after the other; `variables` are of their environment."""
    start = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), __file__]
        if ranks > 1
        else [sys.executable, __file__]
    )
    command = [*start, "--job", json.dumps(task), "--threads", str(threads)]
    path = os.pathsep.join([str(Path(__file__).parent / "peers"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{task}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def job(task: dict[str, Any]) -> None:
    """Plan or run a case in this process, and print what was found."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = (plan if task["kind"] == "plan" else run)(task)
    print(json.dumps(found), flush=True)


def load(task: dict[str, Any], folder: str, *last: str) -> Any:
    """Return a case's config."""
    from kdtune import config
    from kdtune._assets import find_recipe
    from kdtune.config.recipe import import_recipe

    recipe = import_recipe(find_recipe(task["recipe"]))
    shapes = [f"model.{name}={value}" for name, value in {**SHAPE, "num_layers": 12}.items()]
    if task["recipe"] != "finetune":
        shapes += [f"teacher_model.{name}={value}" for name, value in {**SHAPE, "num_layers": 30}.items()]
        shapes.append("teacher_model.tie_embeddings=true")
    base = "tiny/finetune" if task["recipe"] == "finetune" else "tiny/knowledge_distillation"
    always = f"""model.tie_embeddings=true dataset=kdtune.data.text_completion_dataset ~dataset_val ~sample_prompts
        ~sample_max_new_tokens batch_size=4 gradient_accumulation_steps=1 ~save_every_n_steps ~run_val_every_n_steps
        tokenized_cache_dir=null output_dir={Path(task["folder"]) / folder}""".split()
    return recipe, config.load(base, [*shapes, *always, *task["overrides"], *last], recipe.schema)


def plan(task: dict[str, Any]) -> dict[str, float]:
    """Return what a plan says: MiB, and seconds if they are asked for."""
    import torch

    from kdtune.distributed import World, fake_world
    from kdtune.planner.calibration import calibrate
    from kdtune.planner.estimate import make_estimate
    from kdtune.training import steps_of

    _, cfg = load(task, "planned")
    with (
        fake_world(task["ranks"]) if task["ranks"] > 1 else contextlib.nullcontext(World(torch.device("cpu"))) as world
    ):
        peak = make_estimate(cfg, world, device_type="cpu").peak.total / 2**20
    seconds = calibrate(cfg, *steps_of(cfg), clock=time.process_time).step if task["timed"] else 0.0
    return {"peak": peak, "seconds": seconds}


def run(task: dict[str, Any]) -> dict[str, float]:
    """Return what a run takes: MiB above what it takes with narrow models, and seconds."""
    narrow = [f"{model}.{name}={value}" for model in ("model", "teacher_model") for name, value in NARROW.items()
              if model == "model" or task["recipe"] != "finetune"]  # fmt: skip
    recipe, cfg = load(task, "narrow", *narrow, "max_steps_per_epoch=2")
    recipe.function(cfg)
    before, log = resident_mib(), Path(task["folder"]) / "steps.jsonl"
    logger = ["metric_logger._component_=probe.StepLog", f"metric_logger.path={log}"]
    _, cfg = load(task, "run", f"max_steps_per_epoch={task['steps']}", *logger)
    recipe.function(cfg)
    if os.environ.get("RANK", "0") != "0":
        return {"peak": peak_mib() - before, "seconds": 0.0}
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    processor = [after["processor"] - one["processor"] for one, after in itertools.pairwise(rows[WARM_UP - 1 :])]
    return {"peak": 1024 * rows[-1]["peak_gib"] - before, "seconds": statistics.median(processor)}


def resident_mib() -> float:
    """Return the resident set of this process now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def peak_mib() -> float:
    """Return the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
