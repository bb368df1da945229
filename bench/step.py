"""The same distillation job in kdtune, torchtune 0.6.1 and TRL 1.16: tokens of real text a second, peak memory, held-out KL.

    python bench/step.py --teacher models/SmolLM2-135M-Instruct --data alpaca.jsonl                 # kdtune alone
    python bench/step.py --teacher ... --data ... --tools kdtune,torchtune,trl --envs bench/envs    # makes the environments
    python bench/step.py --teacher ... --data ... --tools kdtune,trl --dtype bf16 --kd-ratio 1 --row-length 512

The student is some evenly spaced layers of the teacher, with LoRA on all linears (`--rank 0`: all parameters trained). kdtune
tokenizes the rows once and the other tools are given its ids, in the same order; all make the same steps with AdamW and a
cosine schedule. Each job is a process of its own, one after the other, `--rounds` times in turns. Every tool logs each step
by the same few lines (peers/probe.py); the first two steps are left out, and steps during which others kept more than a tenth of a
core busy are named. The trained students are compared on held-out rows, by kdtune.

The floor of a step are its operations at the rate of one of the teacher's products of as many tokens, measured in the same run: those of
all real tokens in the layers, attention and adapters, and of tokens with a label in the heads, none of padding.

With `--row-length` rows have one length: kdtune and torchtune pack whole examples, TRL gets the stream cut into rows. torchtune's loss
keeps the teacher's entropy, and TRL has no cross entropy (its runs are those of kd_ratio 1): compare the held-out KL. On a
CPU; on CUDA the peers' configs need another device.

Expected before measuring, on two CPU cores, against the faster peer: 1.6 times the tokens a second in fp32 and 1.5 in bf16
(no padding in the layers, a fused loss, an allocator that keeps its memory), and half to two thirds of the memory.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import shapes
import torch

from kdtune import checkpoint, data, evaluation, losses, models, pruning, teachers, tokenizers
from kdtune.distributed import World

HERE = Path(__file__).parent
TOOLS = ("kdtune", "torchtune", "trl")
REQUIREMENTS = {
    "torchtune": ["torch==2.13.0", "torchtune==0.6.1", "torchao==0.10.0", "psutil", "setuptools"],
    "trl": ["torch==2.13.0", "trl==1.16.0", "peft==0.21.2", "transformers==5.23.0"],
}
WARM_UP = 2
HELD_OUT = 32


@dataclass(frozen=True)
class Job:
    """What every tool is told."""

    teacher: str
    student: str
    texts: str  # jsonl for kdtune
    rows: str  # the same examples in ids, for the others
    log: str
    out: str
    dtype: str
    kd_ratio: float
    rank: int
    steps: int
    batch_size: int
    row_length: int | None
    lr: float


def main() -> None:
    parser = argparse.ArgumentParser(description="One distillation job in kdtune, torchtune and TRL.")
    parser.add_argument("--teacher", required=True, help="folder or file that kdtune reads")
    parser.add_argument("--data", required=True, help="JSON lines of instruction, input, output")
    parser.add_argument("--tools", default="kdtune", help=", ".join(TOOLS))
    parser.add_argument(
        "--envs", default="bench/envs", help="folder of the peers' environments, made where they are missing"
    )
    parser.add_argument("--out", default="runs/bench-step")
    parser.add_argument("--layers", type=int, default=12, help="of the student")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--kd-ratio", type=float, default=0.5)
    parser.add_argument("--rank", type=int, default=64, help="of LoRA; 0: all parameters are trained")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--row-length", type=int, help="tokens of a packed row")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("overrides", nargs="*", help="config overrides of kdtune's job")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = Path(args.out).resolve()
    teacher, student = make_models(args.teacher, args.layers, out / "models")
    texts, rows = write_rows(args.data, teacher, args.steps * args.batch_size * (4 if args.row_length else 1), out)
    runs: dict[str, list[Path]] = {}
    for number in range(args.rounds):
        for tool in args.tools.split(",")[:: -1 if number % 2 else 1]:
            name = f"{tool}-{args.dtype}-kd{args.kd_ratio:g}-r{args.rank}-{args.row_length or 'padded'}-{number}"
            job = Job(str(teacher), str(student), str(texts), str(rows), str(out / f"{name}.jsonl"), str(out / name), args.dtype,
                      args.kd_ratio, args.rank, args.steps, args.batch_size, args.row_length, args.lr)  # fmt: skip
            command = COMMANDS[tool](job, python_of(tool, Path(args.envs)), args.overrides)
            run(command, out / f"{name}.log", args.threads)
            runs.setdefault(tool, []).append(Path(job.log))
    report(runs, rows, args, teacher, out)
    if "kdtune" in runs:
        floor = floor_seconds(rows, args, student, teacher) / (args.steps - WARM_UP)
        found = statistics.fmean(step["seconds"] for log in runs["kdtune"] for step in read_steps(log, rows, args))
        print(f"the floor is {floor:.3g} s a step; kdtune takes {found / floor:.2f} times that")


def make_models(source: str, num_layers: int, folder: Path) -> tuple[Path, Path]:
    """Return Hugging Face folders of the teacher and of the student, made where they are missing."""
    teacher, student = folder / "teacher", folder / f"student-{num_layers}"
    if not (student / "config.json").exists():
        model = checkpoint.load_model(source, dtype=torch.float32, device="cpu")
        tokenizer = tokenizers.load(source)
        checkpoint.save_model(model, teacher, tokenizer=tokenizer, is_chat=True)
        layers = pruning.evenly_spaced(model.config.num_layers, num_layers)
        checkpoint.save_model(pruning.keep_layers(model, layers), student, tokenizer=tokenizer, is_chat=True)
    return teacher, student


def write_rows(source: str, teacher: Path, count: int, out: Path) -> tuple[Path, Path]:
    """Return files of the first examples, as texts and as ids with unshifted labels; held-out texts stand beside them."""
    lines = [line for line in Path(source).read_text().splitlines() if line.strip()]
    texts, held_out, rows = out / "texts.jsonl", out / "held_out.jsonl", out / "rows.json"
    texts.write_text("\n".join(lines[:count]) + "\n")
    held_out.write_text("\n".join(lines[-HELD_OUT:]) + "\n")
    dataset = data.alpaca_dataset(tokenizers.load(teacher), source=str(texts))
    examples = [dataset[index] for index in range(len(dataset))]
    ids = [{"tokens": one.tokens.tolist(), "labels": [-100, *one.labels.tolist()[:-1]]} for one in examples]
    rows.write_text(json.dumps(ids))
    return texts, rows


def python_of(tool: str, envs: Path) -> str:
    """Return the interpreter of a tool's environment, made where it is missing."""
    if tool == "kdtune":
        return sys.executable
    folder = envs.absolute() / tool
    if not (folder / "done").exists():
        print(f"making the environment of {tool} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "-q", *REQUIREMENTS[tool]], check=True)
        (folder / "done").touch()
    return str(folder / "bin/python")


def run(command: Sequence[str], log: Path, threads: int) -> None:
    """Run one job with its output in a file; a job that fails ends the benchmark with its last lines."""
    number = str(threads)
    environment = os.environ | {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "PYTHONPATH": path()}
    print(f"{log.stem} ...", flush=True)
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        sys.exit(f"{log}: exit status {done.returncode}\n" + "\n".join(log.read_text().splitlines()[-5:]))


def path() -> str:
    """Return the import path of a job: what peers/ has, then what this process has."""
    return os.pathsep.join([str(HERE / "peers"), *filter(None, [os.environ.get("PYTHONPATH")])])


def kdtune_command(job: Job, python: str, overrides: Sequence[str]) -> list[str]:
    """Return the command of kdtune's job."""
    settings = {
        "output_dir": job.out, "tokenizer.path": job.teacher, "checkpointer.checkpoint_dir": job.student,
        "teacher_checkpointer.checkpoint_dir": job.teacher, "dtype": job.dtype, "dataset.source": job.texts,
        "batch_size": job.batch_size, "optimizer.lr": job.lr, "kd_ratio": job.kd_ratio, "max_steps_per_epoch": job.steps,
        "metric_logger.path": job.log, "adapter.lora_rank": job.rank, "adapter.lora_alpha": 2 * job.rank,
    }  # fmt: skip
    if job.row_length:
        settings |= {"tokenizer.max_seq_len": job.row_length, "dataset.packed": True}
    given = [f"{name}={value}" for name, value in settings.items() if job.rank or not name.startswith("adapter.")]
    config = str(HERE / "peers/kdtune.yaml")
    return [python, "-m", "kdtune", "run", "knowledge_distillation", "--config", config, *given,
            *([] if job.rank else ["~adapter", "~save_weights"]), *overrides]  # fmt: skip


def torchtune_command(job: Job, python: str, overrides: Sequence[str]) -> list[str]:
    """Return the command of torchtune's job."""
    shape = json.loads((Path(job.teacher) / "config.json").read_text())
    layers = json.loads((Path(job.student) / "config.json").read_text())["num_hidden_layers"]
    settings = {
        "output_dir": job.out, "shape.vocab_size": shape["vocab_size"], "shape.num_heads": shape["num_attention_heads"],
        "shape.num_kv_heads": shape["num_key_value_heads"], "shape.embed_dim": shape["hidden_size"],
        "shape.intermediate_dim": shape["intermediate_size"], "shape.rope_base": int(rope_base(shape)),
        "layers.teacher": shape["num_hidden_layers"], "layers.student": layers, "model.lora_rank": job.rank,
        "model.lora_alpha": 2 * job.rank, "tokenizer.pad_id": tokenizers.load(job.teacher).pad_id,
        "checkpointer.checkpoint_dir": job.student, "teacher_checkpointer.checkpoint_dir": job.teacher,
        "dataset.path": job.rows, "batch_size": job.batch_size, "optimizer.lr": job.lr, "kd_ratio": job.kd_ratio,
        "max_steps_per_epoch": job.steps, "metric_logger.path": job.log, "dtype": job.dtype,
    }  # fmt: skip
    if job.row_length:
        settings |= {"dataset.packed_to": job.row_length, "dataset.packed": True}
    if not job.rank:
        sys.exit("--rank 0: torchtune's recipe on one device trains adapters only; leave torchtune out")
    tune = str(Path(python).parent / "tune")
    config = ["--config", str(HERE / "peers/torchtune.yaml")]
    return [
        tune,
        "run",
        "knowledge_distillation_single_device",
        *config,
        *(f"{name}={value}" for name, value in settings.items()),
    ]


def trl_command(job: Job, python: str, overrides: Sequence[str]) -> list[str]:
    """Return the command of TRL's job."""
    settings = Path(job.log).with_suffix(".job.json")
    settings.write_text(json.dumps(asdict(job)))
    return [python, str(HERE / "peers/trl_job.py"), str(settings)]


COMMANDS = {"kdtune": kdtune_command, "torchtune": torchtune_command, "trl": trl_command}


def rope_base(shape: dict[str, Any]) -> float:
    """Return RoPE's base of a config.json, at its place in transformers 4 or 5."""
    return float(shape.get("rope_theta") or shape["rope_parameters"]["rope_theta"])


def read_steps(log: Path, rows: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Return the measured steps: seconds, processor seconds, cores that others kept busy, tokens of real text."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lengths = [len(row["tokens"]) for row in json.loads(rows.read_text())]
    steps = []
    for before, line in itertools.pairwise(lines):
        seconds, processor = line["clock"] - before["clock"], line["processor"] - before["processor"]
        first = (len(steps) + 1) * args.batch_size
        tokens = args.row_length * args.batch_size if args.row_length else sum(lengths[first : first + args.batch_size])
        others = max(0.0, line["everybody"] - before["everybody"] - processor) / seconds
        steps.append(
            {"seconds": seconds, "processor": processor, "others": others, "tokens": tokens, "peak": line["peak_gib"]}
        )
    return steps[WARM_UP - 1 :]


def floor_seconds(rows: Path, args: argparse.Namespace, student: Path, teacher: Path) -> float:
    """Return the seconds that the measured steps' operations take at the rate of one of the teacher's products of a step's tokens."""
    size = args.batch_size * (args.row_length or 1)
    begin, end, place = WARM_UP * size, args.steps * size, 0
    measured = []
    for row in json.loads(rows.read_text()):
        if begin <= place < end:
            measured.append(row)
        place += len(row["tokens"]) if args.row_length else 1
    lengths = [len(row["tokens"]) for row in measured]
    num_tokens, num_valid = sum(lengths), sum(label >= 0 for row in measured for label in row["labels"])
    ours, theirs = (checkpoint.load_model(one, dtype=torch.float32, device="cpu") for one in (student, teacher))
    passes = 2 if args.rank else 3  # with adapters the base's weights have no gradient
    flops = num_tokens * shapes.flops_per_token(theirs, lengths, 1, with_head=False)
    flops += num_tokens * shapes.flops_per_token(ours, lengths, passes, with_head=False)
    if args.rank:
        names = ["q_proj", "v_proj", "output_proj"]
        adapted = models.apply_lora(ours, lora_rank=args.rank, lora_attn_modules=names, apply_lora_to_mlp=True)
        flops += num_tokens * 3 * 2 * sum(one.numel() for one in adapted.parameters() if one.requires_grad)
    heads = [(theirs.config, 1), (ours.config, passes)]
    flops += num_valid * sum(2 * times * config.vocab_size * config.embed_dim for config, times in heads)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    return flops / shapes.matmul_rate(torch.device("cpu"), dtype, num_tokens // (args.steps - WARM_UP), theirs.config)


def report(runs: dict[str, list[Path]], rows: Path, args: argparse.Namespace, teacher: Path, out: Path) -> None:
    """Print a row per tool and round, with its ratio to kdtune's of the same round."""
    lines = []
    for number in range(args.rounds):
        found = {tool: read_steps(logs[number], rows, args) for tool, logs in runs.items()}
        for tool, steps in found.items():
            pairs = list(zip(steps, found.get("kdtune", steps), strict=True))
            ratio = {
                name: statistics.median(one[name] / ours[name] for one, ours in pairs)
                for name in ("seconds", "processor")
            }
            mean = {
                name: statistics.fmean(step[name] for step in steps)
                for name in ("seconds", "processor", "tokens", "others")
            }
            median = statistics.median(step["seconds"] for step in steps)
            numbers = [
                median,
                mean["tokens"] / mean["seconds"],
                mean["processor"],
                ratio["seconds"],
                ratio["processor"],
            ]
            numbers += [
                steps[-1]["peak"],
                mean["others"],
                held_out_kl(runs[tool][number].with_suffix(""), teacher, out),
            ]
            lines.append(f"| {number + 1} | {tool} | {' | '.join(f'{value:.3g}' for value in numbers)} |")
    print(f"\ntorch {torch.__version__}, {args.threads} threads, {args.dtype}, kd_ratio {args.kd_ratio:g}, LoRA rank {args.rank}, "
          f"batches of {args.batch_size}, rows of {args.row_length or 'one example'}; steps {WARM_UP + 1} to {args.steps}")  # fmt: skip
    columns = "round, tool, s/step (median), real tokens/s, processor s/step, x kdtune's time, processor, peak GiB, others, held-out KL"
    print(f"| {columns.replace(', ', ' | ')} |\n|{'---|' * len(columns.split(', '))}")
    print("\n".join(lines), flush=True)


def held_out_kl(run_dir: Path, teacher: Path, out: Path) -> float:
    """Return KL(teacher || student) per token of the student that a job left, in fp32."""
    folder = max((path.parent for path in run_dir.rglob("config.json")), key=lambda path: path.stat().st_mtime)
    tokenizer = tokenizers.load(teacher, max_seq_len=512)
    dataset = data.alpaca_dataset(tokenizer, source=str(out / "held_out.jsonl"))
    ours, theirs = (checkpoint.load_model(path, dtype=torch.float32, device="cpu").eval() for path in (folder, teacher))
    found = evaluation.evaluate_kd(
        ours, teachers.OnlineTeacher(theirs), losses.KDLoss(kd_ratio=1.0), list(data.batches(dataset, 4, tokenizer.pad_id)),
        world=World(torch.device("cpu")),
    )  # fmt: skip
    return found["kd_loss"]


if __name__ == "__main__":
    main()
