"""Shows whether two commits train to the same numbers, bit for bit.

    python bench/same_numbers.py record before.json --repo ../kdtune-before
    python bench/same_numbers.py record after.json
    python bench/same_numbers.py compare before.json after.json

`record` runs the tiny knowledge distillation and finetune recipes of a checkout on the CPU: full, LoRA, DoRA and QLoRA
students; one process, FSDP 2, TP 2 and a teacher on its own process; fp32 and bf16; interrupted and resumed; with dropout,
padding and a short last step. For each case it keeps the losses, gradient norm, learning rate and validation metrics of
every step as hexadecimal floats, and a SHA-256 of every tensor below final/. `--quickstart MODELS` adds the first five
steps of the quickstart, KD and SFT; MODELS holds what `make quickstart` puts into models/.

`compare` prints a line for each case: equal, or the first difference with both values and their relative difference. It
exits with 1 if anything differs. Metrics that only the second record has are named and are no difference.

A checkout is used by its command line, config keys, metrics.jsonl and safetensors files only. If a key, a component or
a metric has another name there, `--rename OLD=NEW` translates it. Records are comparable if machine and versions are the
same; on one machine a case gives the same bits every time. `--keep FOLDER` keeps what the runs write and print.
`--set KEY=VALUE` gives every case one more key, such as `padding_free=false` where the other checkout always pads.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from safetensors import deserialize

ROOT = Path(__file__).parent.parent
METRICS = ("loss", "class_loss", "kd_loss", "agreement", "grad_norm", "lr", "num_valid_tokens")
TIMEOUT, TIMEOUT_AFTER_FAILURE = 900.0, 30.0  # seconds
# The server that forks the processes of a run imports these once: importing takes longer than the tiny runs.
# Nothing of kdtune is among them, so that each process imports the checkout's own.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torchao.quantization",
             "datasets", "matplotlib.pyplot"]  # fmt: skip

# {"steps": {"3": {"loss": "0x1.7p+1", ...}, ...}, "tensors": {"norm.weight": "F32 [32] 9f86d0...", ...}}
Run = dict[str, Any]
Rename = Callable[[str], str]


@dataclass(frozen=True)
class Case:
    """One run: the recipe with its config and overrides, on one or several processes; resumed_at: also from that step on."""

    name: str
    arguments: tuple[str, ...]
    processes: int = 1
    resumed_at: int | None = None


RECIPES = {
    "kd": ("knowledge_distillation", "--config", "tiny/knowledge_distillation"),
    "finetune": ("finetune", "--config", "tiny/finetune"),
}
TINY = ("max_steps_per_epoch=6", "run_val_every_n_steps=3", "save_every_n_steps=3", "dataset_val.split=test[:9]",
        "sample_prompts=[]")  # fmt: skip
LORA = ("adapter=kdtune.models.apply_lora", "adapter.lora_rank=4", "adapter.lora_alpha=8")
STUDENTS = {
    "full": ("adapter=null",),
    "lora": (*LORA, "adapter.lora_dropout=0.1"),
    "dora": (*LORA, "adapter.use_dora=true", "adapter.apply_lora_to_output=true"),
    "qlora": (*LORA, "adapter.quantize_base=true"),
}
# Name: number of processes, overrides.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    "FSDP 2": (2, ()),
    "TP 2": (2, ("parallelism.tp=2",)),
    "teacher apart": (2, ("teacher_processes=1",)),
    "FSDP 2, teacher apart": (3, ("teacher_processes=1",)),
}
BF16 = ("dtype=bf16",)
# Examples of different lengths, padded.
PADDED = ("tokenizer.max_seq_len=512", "model.max_seq_len=512", "teacher_model.max_seq_len=512", "dataset.train_on=answers",
          "dataset.prompt=plain")  # fmt: skip
# 21 examples are 11 micro-batches: the last of 3 steps has 3, and one of two processes has none left at its end.
SHORT = ("dataset.split=train[:21]", "batch_size=2", "gradient_accumulation_steps=4", "max_steps_per_epoch=null", "epochs=2")  # fmt: skip
# Recipe, student, layout and overrides.
OTHERS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "kd full, 1 process, bf16": ("kd", "full", "1 process", BF16),
    "kd lora, 1 process, bf16": ("kd", "lora", "1 process", BF16),
    "kd dora, 1 process, bf16": ("kd", "dora", "1 process", BF16),
    "kd qlora, 1 process, bf16": ("kd", "qlora", "1 process", BF16),
    "kd full, FSDP 2, bf16": ("kd", "full", "FSDP 2", BF16),
    "kd lora, TP 2, bf16": ("kd", "lora", "TP 2", BF16),
    "kd full, teacher apart, bf16": ("kd", "full", "teacher apart", BF16),
    "kd full, FSDP 2, bf16 compute": ("kd", "full", "FSDP 2", ("parallelism.param_dtype=bf16",)),
    "finetune full, 1 process, bf16": ("finetune", "full", "1 process", BF16),
    "finetune qlora, 1 process, bf16": ("finetune", "qlora", "1 process", BF16),
    "kd full, 1 process, fp32 beside a bf16 teacher": ("kd", "full", "1 process", ("teacher_dtype=bf16",)),
    "kd full, 1 process, kd_ratio 0": ("kd", "full", "1 process", ("kd_ratio=0",)),
    "kd full, 1 process, kd_ratio 1": ("kd", "full", "1 process", ("kd_ratio=1",)),
    "kd lora, 1 process, padded, chunks of 100": ("kd", "lora", "1 process", (*PADDED, "loss_chunk_size=100")),
    "kd full, TP 2, padded": ("kd", "full", "TP 2", PADDED),
    "kd lora, 1 process, activation checkpointing": ("kd", "lora", "1 process", ("enable_activation_checkpointing=true",)),
    "kd full, 1 process, short last step": ("kd", "full", "1 process", SHORT),
    "kd full, FSDP 2, short last step": ("kd", "full", "FSDP 2", SHORT),
    "finetune full, FSDP 2, short last step": ("finetune", "full", "FSDP 2", SHORT),
}  # fmt: skip


def tiny_cases() -> Iterator[Case]:
    """Return every recipe, student and layout that go together, then the other dtypes, data and settings."""
    for recipe, student, layout in itertools.product(RECIPES, STUDENTS, LAYOUTS):
        # Tensor parallelism needs a base that is not in NF4; finetuning has no teacher.
        if (student, layout) == ("qlora", "TP 2") or (recipe == "finetune" and "teacher" in layout):
            continue
        # Three processes, and resuming on several, are slow: with all parameters trained they are seen once.
        if student == "full" or layout != "FSDP 2, teacher apart":
            is_resumed = student == "full" or layout == "1 process"
            yield tiny_case(
                f"{recipe} {student}, {layout}", recipe, student, layout, resumed_at=3 if is_resumed else None
            )
    for name, (recipe, student, layout, settings) in OTHERS.items():
        yield tiny_case(name, recipe, student, layout, settings)


def tiny_case(
    name: str, recipe: str, student: str, layout: str, settings: tuple[str, ...] = (), resumed_at: int | None = None
) -> Case:
    processes, spread = LAYOUTS[layout]
    return Case(name, (*RECIPES[recipe], *TINY, *STUDENTS[student], *spread, *settings), processes, resumed_at)


def quickstart_cases(models: Path) -> Iterator[Case]:
    """Return the quickstart's first five steps, with the teacher and without it."""
    for name, kd_ratio in (("KD", 1), ("SFT", 0)):
        yield Case(
            f"quickstart {name}",
            ("knowledge_distillation", "--config", "quickstart", f"models_dir={models.resolve()}", f"kd_ratio={kd_ratio}",
             "max_steps_per_epoch=5", "sample_prompts=[]"),
        )  # fmt: skip


def run_case(repo: Path, case: Case, folder: Path) -> Iterator[tuple[str, Run]]:
    """Run a case in an empty folder; yield its name and numbers, then those of the resumed run where there is one."""
    output_dir = folder / "run"
    command = ["run", *case.arguments, f"output_dir={output_dir}"]
    run_processes(repo, command, case.processes, folder / "output")
    yield case.name, read_run(output_dir)
    if case.resumed_at is not None:
        # What a run leaves that was killed after it had saved this step.
        shutil.rmtree(output_dir / "final")
        for step in output_dir.glob("step_*"):
            if int(step.name.removeprefix("step_")) > case.resumed_at:
                shutil.rmtree(step)
        run_processes(repo, [*command, "resume_from_checkpoint=true"], case.processes, folder / "output-resumed")
        yield f"{case.name}, resumed", read_run(output_dir)


def run_processes(repo: Path, command: Sequence[str], count: int, output: Path) -> None:
    """Run the checkout's `python -m kdtune COMMAND` in `count` processes, with the environment that torchrun gives them.

    Raises:
        RuntimeError: one of them failed or did not end in time; the message ends with what it printed.
    """
    forkserver = multiprocessing.get_context("forkserver")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    several = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(count):
        env = {**several, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
        printed = output.with_name(f"{output.name}-{rank}.txt")
        process = forkserver.Process(
            target=run_kdtune, args=(repo, command, {k: str(v) for k, v in env.items()}, printed)
        )
        process.start()
        started.append((process, printed))
    end = time.monotonic() + TIMEOUT
    running: dict[Any, Any] = {process.sentinel: process for process, _ in started}
    while running and (ended := wait(list(running), max(end - time.monotonic(), 0))):
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                end = min(end, time.monotonic() + TIMEOUT_AFTER_FAILURE)
    for process in running.values():
        process.kill()
        process.join()
    for process, printed in started:
        if process.exitcode != 0:
            raise RuntimeError(f"exit code {process.exitcode}: {' '.join(command)}\n{printed.read_text()[-2000:]}")


def run_kdtune(repo: Path, command: Sequence[str], env: dict[str, str], printed: Path) -> None:
    os.environ |= env
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(printed.parent)
    # Before an installed kdtune, which may be another one.
    sys.path.insert(0, str(repo))
    found = importlib.util.find_spec("kdtune")
    if found is None or found.origin is None or not Path(found.origin).is_relative_to(repo):
        sys.exit(f"kdtune would be imported from {found and found.origin}, not from {repo}")
    sys.argv = ["kdtune", *command]
    runpy.run_module("kdtune", run_name="__main__")


def read_run(output_dir: Path) -> Run:
    """Return a finished run's metrics by step, and a digest of each tensor below final/ by folder and name."""
    steps: dict[str, dict[str, str]] = {}
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {key: float(row[key]).hex() for key in row if key in METRICS or key.startswith("val_")}
        if str(row["step"]) in steps:
            raise RuntimeError(f"{output_dir}/metrics.jsonl: two lines for step {row['step']}")
        steps[str(row["step"])] = kept
    tensors = {}
    final = output_dir / "final"
    for file in sorted(final.rglob("*.safetensors")):
        for name, tensor in deserialize(file.read_bytes()):  # type: ignore[no-untyped-call]
            digest = hashlib.sha256(tensor["data"]).hexdigest()
            tensors[str(file.parent.relative_to(final) / name)] = f"{tensor['dtype']} {tensor['shape']} {digest}"
    if not steps or not tensors:
        raise RuntimeError(f"{output_dir}: {len(steps)} steps in metrics.jsonl and {len(tensors)} tensors in final/")
    return {"steps": steps, "tensors": tensors}


def record(
    out: Path,
    repo: Path,
    only: str,
    quickstart: Path | None,
    rename: Rename,
    keep: Path | None,
    settings: Sequence[str] = (),
) -> int:
    """Run the cases, each with these settings too, and write their numbers; return the number of cases that failed."""
    repo = repo.resolve()
    os.environ |= {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    all_cases = [*tiny_cases(), *(quickstart_cases(quickstart) if quickstart else ())]
    cases = [case for case in all_cases if re.search(only, case.name)]
    recorded: dict[str, Any] = {"made_of": made_of(repo), "runs": {}}
    print(*(f"{key}: {value}" for key, value in recorded["made_of"].items()), sep="\n")
    start, num_failed = time.monotonic(), 0
    for index, case in enumerate(cases, 1):
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) if keep is None else keep.resolve() / re.sub(r"\W+", "-", case.name)
            folder.mkdir(parents=True, exist_ok=True)
            renamed = Case(case.name, (*map(rename, case.arguments), *settings), case.processes, case.resumed_at)
            try:
                recorded["runs"].update(run_case(repo, renamed, folder))
            except (RuntimeError, OSError) as error:
                num_failed += 1
                print(f"FAILED {case.name}: {error}")
        out.write_text(json.dumps(recorded, indent=1))
        print(f"{index}/{len(cases)}  {time.monotonic() - begin:5.1f} s  {case.name}", flush=True)
    print(f"{len(recorded['runs'])} runs in {time.monotonic() - start:.0f} s, {num_failed} failed: {out}")
    return num_failed


def made_of(repo: Path) -> dict[str, str]:
    """Return what the numbers depend on beside the code: commit, versions and machine."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", repo, *arguments], capture_output=True, text=True).stdout.strip()

    parts = ("--", "kdtune", "recipes", "configs")
    uncommitted = git("status", "--porcelain", *parts) + git("diff", "HEAD", *parts)
    changed = hashlib.sha256(uncommitted.encode()).hexdigest()[:12]
    cpuinfo = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "commit": git("rev-parse", "HEAD") + (f" with changes {changed}" if uncommitted else ""),
        "torch": version("torch"),
        "torchao": version("torchao"),
        "machine": f"{platform.platform()} {processor[1] if processor else platform.processor()}",
    }


def compare(first: dict[str, Any], second: dict[str, Any], rename: Rename = str) -> list[tuple[str, str]]:
    """Return for each run of either record its name and "equal", or its first difference.

    `rename` translates the first record's metric names to the second's.
    """
    verdicts = []
    for name in dict.fromkeys([*first["runs"], *second["runs"]]):
        missing = [which for which, found in (("first", first), ("second", second)) if name not in found["runs"]]
        if missing:
            verdicts.append((name, f"missing in the {missing[0]} record"))
        else:
            verdicts.append((name, difference(first["runs"][name], second["runs"][name], rename) or "equal"))
    return verdicts


def difference(first: Run, second: Run, rename: Rename) -> str | None:
    """Return how the second run differs from the first, or None: the first metric and the largest, then the tensors."""
    texts, largest = [], 0.0
    for step in sorted({*first["steps"], *second["steps"]}, key=int):
        if step not in first["steps"] or step not in second["steps"]:
            return f"step {step} is missing in the {'second' if step in first['steps'] else 'first'} record"
        for key, value in first["steps"][step].items():
            other = second["steps"][step].get(rename(key))
            if other is None:
                return f"step {step}: {rename(key)} is missing in the second record"
            if other != value:
                a, b = float.fromhex(value), float.fromhex(other)
                relative = abs(a - b) / max(abs(a), abs(b), sys.float_info.min)
                largest = max(largest, relative)
                texts.append(f"step {step} {rename(key)}: {a!r} and {b!r}, relative {relative:.1e}")
    names = {*first["tensors"], *second["tensors"]}
    tensors = sorted(name for name in names if first["tensors"].get(name) != second["tensors"].get(name))
    shown = texts[:1]
    if len(texts) > 1:
        shown.append(f"{len(texts)} metrics in all, relative {largest:.1e} at most")
    if tensors:
        shown.append(f"{len(tensors)} of {len(names)} tensors of final/, such as {tensors[0]}")
    return "; ".join(shown) or None


def new_metrics(first: dict[str, Any], second: dict[str, Any], rename: Rename = str) -> set[str]:
    """Return the metrics that only the second record has."""
    before, after = (
        {key for run in it["runs"].values() for row in run["steps"].values() for key in row} for it in (first, second)
    )
    return after - set(map(rename, before))


def print_comparison(first: dict[str, Any], second: dict[str, Any], only: str, rename: Rename) -> int:
    """Print a line a case; return the number of cases that differ."""
    for key, value in first["made_of"].items():
        print(f"{key}: {value}" + ("" if second["made_of"][key] == value else f"  |  {second['made_of'][key]}"))
    first, second = (
        {**it, "runs": {name: run for name, run in it["runs"].items() if re.search(only, name)}}
        for it in (first, second)
    )
    verdicts = compare(first, second, rename)
    width = max((len(name) for name, _ in verdicts), default=0)
    for name, verdict in verdicts:
        print(f"{name:{width}}  {verdict}")
    if added := new_metrics(first, second, rename):
        print(f"only in the second record: {', '.join(sorted(added))}")
    num_different = sum(verdict != "equal" for _, verdict in verdicts)
    print(f"{len(verdicts) - num_different} of {len(verdicts)} equal")
    return num_different or int(not verdicts)


def renaming(pairs: Sequence[str]) -> Rename:
    """Return a function that replaces whole dotted names, each pair being OLD=NEW."""
    names = dict(pair.split("=") for pair in pairs)
    pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")(?!\w)")
    return (lambda text: pattern.sub(lambda match: names[match[1]], text)) if names else str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases and write their numbers")
    recording.add_argument("out", type=Path)
    recording.add_argument("--repo", type=Path, default=ROOT, help="the checkout to run; default: this one")
    recording.add_argument("--quickstart", type=Path, metavar="MODELS", help="folder with the quickstart's two models")
    recording.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep what the runs write and print in this folder"
    )
    recording.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of every case")
    comparing = commands.add_parser("compare", help="compare two records; exit with 1 if they differ")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    for one in (recording, comparing):
        one.add_argument("--only", default="", metavar="REGEX", help="only the cases whose names match")
        one.add_argument(
            "--rename", action="append", default=[], metavar="OLD=NEW", help="another name of a key or metric"
        )
    arguments = parser.parse_args()
    rename = renaming(arguments.rename)
    if arguments.command == "record":
        chosen = (arguments.only, arguments.quickstart, rename, arguments.keep, arguments.set)
        sys.exit(bool(record(arguments.out, arguments.repo, *chosen)))
    first, second = (json.loads(path.read_text()) for path in (arguments.first, arguments.second))
    sys.exit(bool(print_comparison(first, second, arguments.only, rename)))


if __name__ == "__main__":
    main()
