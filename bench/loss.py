"""Time and memory of the distillation loss, forward and backward with both output projections, at Llama 3 sizes.

    python bench/loss.py                                             # 1,024 tokens, fp32 and bf16, frozen head
    python bench/loss.py --impl matmul,fused --divergence ForwardKL,JensenShannon,AdaptiveKL
    python bench/loss.py --tokens 1024,2048,4096 --head frozen,trainable --dtype float32 --impl fused,plain,matmul

    python bench/loss.py --report                                    # the tables of docs/benchmarks.md, on an idle machine
    python bench/loss.py --impl matmul,fused,torchtune --python torchtune=ENVIRONMENT/bin/python

Several ways, each case in a fresh process:

    fused    kdtune.losses.KDLoss
    compiled the same with compile=True
    rounded  the same with logits_dtype=torch.bfloat16, for bf16; rounded+compiled: both
    topk64, sampled50   the fused one of a teacher's 64 most likely ids and their tail, and of 50 draws
    comparison, comparison+compiled   softmax, divergence and gradient of fp32 logits that are there: fused without its products
    plain    full fp32 logits of both models, F.cross_entropy and F.kl_div
    matmul   the floor: only the products that any exact loss needs, in the dtype as it is: both logits, the gradient of
             the hidden states and, with a trainable head, of its weight; by tiles of 16,032 ids, in reused memory
    torchtune, trl, liger   the losses of other tools (other_losses.py), each by the interpreter of an environment that has it; they
             run with the C library's own allocator settings, `fused` and the floor with those of a kdtune run

Time is the shortest of the repetitions, "processor s" the fewest processor seconds, which other processes disturb less, and
"x floor" their ratio. Memory is what is added to weights, inputs and their gradients: on a CPU the peak of the
resident set over its size after a call with 8 tokens, on CUDA the peak of the allocator. "others" is how many cores
other processes kept busy meanwhile: repeat what was measured beside them. Ratios travel between machines better than
seconds.

Expected before measuring, on a CPU: fused takes 1.2 to 1.4 times the floor in fp32 (chunks of 342 tokens multiply some
10 % slower than 1,024 at once, softmax and divergence cost about as much again) and adds about 0.3 GiB at any number
of tokens, plus the gradient of a trainable head; plain takes 1.5 times the floor and adds 3.4 GiB for every 1,024
tokens. In bf16 on a CPU with bf16 units fused multiplies twice for each product of logits, and softmax and divergence stay
in fp32: 2 to 2.5 times the floor; rounded multiplies once, 1.3 to 1.6 times. Without such units fused costs what it costs in fp32 and
a little for raising the heads to it. Another divergence adds 0.05 to 0.2 times the fp32 floor, adaptive KL 0.3.
"""

import argparse
import ctypes
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import other_losses
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = other_losses.Call
TILE = 16032
# The tables of docs/benchmarks.md: a quarter of an hour on two idle cores.
FP32, BF16 = "matmul,fused,compiled", "matmul,fused,compiled,rounded,rounded+compiled"
EVERY = (
    "ForwardKL,ReverseKL,SymmetricKL,JensenShannon,TotalVariation,SkewForwardKL,SkewReverseKL,AdaptiveKL,AlphaBeta,"
    "ConcreteScore,ArgMaxCrossEntropy"
)
REPORT = [
    {
        "tokens": "1024",
        "head": "frozen,trainable",
        "dtype": "float32",
        "impl": FP32,
        "divergence": "ForwardKL",
        "reps": 2,
    },
    {
        "tokens": "1024",
        "head": "frozen,trainable",
        "dtype": "bfloat16",
        "impl": BF16,
        "divergence": "ForwardKL",
        "reps": 2,
    },
    {"tokens": "4096,8192", "head": "frozen", "dtype": "float32", "impl": FP32, "divergence": "ForwardKL", "reps": 1},
    {"tokens": "4096,8192", "head": "frozen", "dtype": "bfloat16", "impl": BF16, "divergence": "ForwardKL", "reps": 1},
    {"tokens": "1024", "head": "frozen", "dtype": "float32", "impl": FP32, "divergence": EVERY, "reps": 1},
]
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the distillation loss.")
    parser.add_argument("--impl", default="matmul,fused,plain")
    parser.add_argument("--tokens", default="1024")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--head", default="frozen", help="frozen, trainable or both, comma-separated")
    parser.add_argument("--student-dim", type=int, default=2048)
    parser.add_argument("--teacher-dim", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument(
        "--chunk-size", type=int, default=None, help="tokens a chunk of the fused loss; default: its own choice"
    )
    parser.add_argument("--divergence", default="ForwardKL", help="names in kdtune.losses, comma-separated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--python", action="append", default=[], metavar="IMPL=PATH", help="another tool's interpreter")
    parser.add_argument("--report", action="store_true", help="all tables of docs/benchmarks.md, one after the other")
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)  # one case, in this process
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(run_case(args)))
    elif args.report:
        for part in REPORT:
            print_table(argparse.Namespace(**(vars(args) | part)))
    else:
        print_table(args)


def print_table(args: argparse.Namespace) -> None:
    """Runs every case in its own process and prints one line each, with its ratio to the floor of the same case."""
    torch_note = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, hidden {args.student_dim}/{args.teacher_dim}"
    )
    print(f"{device_name(args.device)}; {torch_note}, vocabulary {args.vocab:,}")
    print(
        f"{'tokens':>6} {'dtype':>9} {'head':>10} {'loss':>16} {'seconds':>8} {'processor s':>11} {'x floor':>8} {'GiB added':>10} "
        f"{'others':>7}"
    )
    impls = sorted(args.impl.split(","), key=lambda impl: impl != "matmul")  # the floor first: the others refer to it
    divergences = args.divergence.split(",")
    interpreters = dict(one.split("=", 1) for one in args.python)
    # The floor, plain logits and torchtune know the forward KL only.
    rows = [
        (impl, one)
        for impl in impls
        for one in (divergences if impl not in ("matmul", "plain", "torchtune") else ["ForwardKL"])
    ]
    for tokens, dtype, head in itertools.product(args.tokens.split(","), args.dtype.split(","), args.head.split(",")):
        floor = None
        for impl, divergence in rows:
            case = ["--impl", impl, "--tokens", tokens, "--dtype", dtype, "--head", head, "--divergence", divergence]
            case += ["--reps", str(args.reps)]
            command = [interpreters.get(impl, sys.executable), __file__, *sys.argv[1:], *case, "--case"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "killed").splitlines()[-1]
                print(f"{tokens:>6} {dtype:>9} {head:>10} {impl:>16} failed: {reason}")
                continue
            result = json.loads(done.stdout)
            floor = result["processor"] if impl == "matmul" else floor
            ratio = f"{result['processor'] / floor:.2f}" if floor else "-"
            numbers = f"{result['seconds']:8.3f} {result['processor']:11.3f} {ratio:>8} {result['gib']:10.2f} {result['others']:7.2f}"
            print(f"{tokens:>6} {dtype:>9} {head:>10} {impl:>16} {numbers} {divergence}", flush=True)


def run_case(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the fastest repetition, GiB added at the peak, cores that others kept busy."""
    dtype, trainable, num_tokens = getattr(torch, args.dtype), args.head == "trainable", int(args.tokens)
    torch.manual_seed(0)
    weight, teacher_weight = (
        random_weight(args.vocab, dim, dtype, args.device) for dim in (args.student_dim, args.teacher_dim)
    )
    if args.device == "cpu" and args.impl not in other_losses.CALLS:
        from kdtune.distributed.allocator import keep_freed_memory

        keep_freed_memory()  # as every run does
    call = CALLS[args.impl](weight, teacher_weight, trainable, args.chunk_size, args.divergence)

    def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden, teacher_hidden = (
            torch.empty(1, tokens, dim, dtype=dtype, device=args.device).normal_()
            for dim in (args.student_dim, args.teacher_dim)
        )
        return hidden.requires_grad_(), teacher_hidden, torch.randint(args.vocab, (1, tokens), device=args.device)

    call(*inputs(8))
    batch = inputs(num_tokens)
    before, busy_before, started = memory(args.device, reset=True), busy(), time.perf_counter()
    seconds, processor = [], []
    for _ in range(args.reps):
        batch[0].grad = None
        synchronize(args.device)
        start, processor_start = time.perf_counter(), time.process_time()
        call(*batch)
        synchronize(args.device)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - processor_start)
    others = (busy() - busy_before) / (time.perf_counter() - started)
    gradients = batch[0].nbytes + (weight.nbytes if trainable else 0)
    found = {"seconds": min(seconds), "processor": min(processor), "others": max(0.0, others)}
    return found | {"gib": (memory(args.device) - before - gradients) / GIB}


def fused(
    weight: Tensor, teacher_weight: Tensor, trainable: bool, chunk_size: int | None, divergence: str, **settings: Any
) -> Call:
    from kdtune import losses
    from kdtune.losses import HiddenSignal, KDLoss

    output, teacher_output = head(weight, trainable), head(teacher_weight, False)
    if targets := settings.pop("targets", None):
        settings["teacher_targets"] = getattr(losses, targets[0])(targets[1])
    loss_fn = KDLoss(getattr(losses, divergence)(), chunk_size=chunk_size, **settings)

    def call(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> None:
        loss, _ = loss_fn(hidden, output, HiddenSignal(teacher_hidden, teacher_output), labels)
        (loss / labels.numel()).backward()
        output.weight.grad = None

    return call


def comparison(
    weight: Tensor, teacher_weight: Tensor, trainable: bool, _: int | None, divergence: str, compile: bool = False
) -> Call:
    from kdtune import losses
    from kdtune.losses.comparison import Settings, compare_, compiled
    from kdtune.losses.products import block_size, slices

    compare = compiled(weight.device.type) if compile else compare_
    settings = Settings(getattr(losses, divergence)(), 0.5, len(weight), None, None, True)
    logits, teacher_logits = (torch.randn(64, len(weight), device=weight.device) for _ in range(2))

    @torch.no_grad()
    def call(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> None:
        for labels_C in labels.flatten().split(len(logits)):  # the gradients of one chunk are the logits of the next
            for block in slices(len(labels_C), block_size(logits)):
                compare((logits[block],), (teacher_logits[block],), labels_C[block], None, settings)

    return call


def plain(weight: Tensor, teacher_weight: Tensor, trainable: bool, _: int | None, divergence: str) -> Call:
    output, teacher_output = head(weight, trainable), head(teacher_weight, False)

    def call(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> None:
        logits = output(hidden).float().flatten(0, 1)
        with torch.no_grad():
            teacher_logits = teacher_output(teacher_hidden).float().flatten(0, 1)
        kd = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean")
        (0.5 * F.cross_entropy(logits, labels.flatten()) + 0.5 * kd).backward()
        output.weight.grad = None

    return call


def matmul(weight: Tensor, teacher_weight: Tensor, trainable: bool, _: int | None, divergence: str) -> Call:
    @torch.no_grad()
    def call(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> None:
        hidden, teacher_hidden = hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight) if trainable else None
        logits = hidden.new_empty(len(hidden), TILE)
        for start in range(0, len(weight), TILE):
            tile, teacher_tile = weight[start : start + TILE], teacher_weight[start : start + TILE]
            out = logits[:, : len(tile)]
            torch.mm(hidden, tile.T, out=out)
            torch.mm(teacher_hidden, teacher_tile.T, out=out)
            torch.mm(out, tile, out=grad_hidden)
            if grad_weight is not None:
                torch.mm(out.T, hidden, out=grad_weight[start : start + TILE])

    return call


CALLS: dict[str, Callable[[Tensor, Tensor, bool, int | None, str], Call]] = {
    **other_losses.CALLS,
    "fused": fused,
    "compiled": partial(fused, compile=True),
    "rounded": partial(fused, logits_dtype=torch.bfloat16),
    "rounded+compiled": partial(fused, logits_dtype=torch.bfloat16, compile=True),
    "comparison": comparison,
    "comparison+compiled": partial(comparison, compile=True),
    "topk64": partial(fused, targets=("TopKTargets", 64)),
    "sampled50": partial(fused, targets=("SampledTargets", 50)),
    "plain": plain,
    "matmul": matmul,
}


def random_weight(rows: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """A few random rows again and again, each time scaled anew: drawing all of them takes longer than the loss."""
    some = torch.empty(min(rows, 4096), dim, dtype=dtype, device=device).normal_(std=0.02)
    weight = torch.empty(rows, dim, dtype=dtype, device=device)
    for part in weight.split(len(some)):
        torch.mul(some[: len(part)], torch.rand(len(part), 1, dtype=dtype, device=device) + 0.5, out=part)
    return weight


def head(weight: Tensor, trainable: bool) -> nn.Linear:
    output = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    output.weight = nn.Parameter(weight, requires_grad=trainable)
    return output


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def memory(device: str, *, reset: bool = False) -> int:
    """Bytes at the peak so far, or, with reset, in use now."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device)
        return torch.cuda.max_memory_allocated(device)
    if reset and sys.platform == "linux":
        # What a call before has freed is kept for the next one, and would be taken for memory of before.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def busy() -> float:
    """CPU seconds that all other processes have used so far; 0 where /proc/stat is missing."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [
        int(x) for x in stat.read_text().splitlines()[0].split()[1:9]
    ]  # user nice system idle iowait irq softirq steal
    own = resource.getrusage(resource.RUSAGE_SELF)
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    flags = " with bf16 units" if cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text() else ""
    return (names[0].split(":")[1].strip() if names else platform.processor() or "CPU") + flags


if __name__ == "__main__":
    main()
