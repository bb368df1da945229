"""Time and memory of the distillation loss, forward and backward with both output projections, at Llama 3 sizes.

    python bench/loss.py                                             # 1,024 tokens, fp32 and bf16, frozen head
    python bench/loss.py --impl matmul,fused --divergence ForwardKL,JensenShannon,AdaptiveKL
    python bench/loss.py --tokens 1024,2048,4096 --head frozen,trainable --dtype float32 --impl fused,plain,matmul

Several ways, each case in a fresh process:

    fused    kdtune.losses.KDLoss
    compiled the same with compile=True
    rounded  the same with logits_dtype=torch.bfloat16, for bf16
    plain    full fp32 logits of both models, F.cross_entropy and F.kl_div
    matmul   the floor: only the products that any exact loss needs, in the dtype as it is: both logits, the gradient of
             the hidden states and, with a trainable head, of its weight; by tiles of 16,032 ids, in reused memory

Time is the shortest of the repetitions, "processor s" the fewest processor seconds, which other processes disturb less, and
"x floor" their ratio. Memory is what is added to weights and inputs: on a CPU the peak of the
resident set over its size after a call with 8 tokens, on CUDA the peak of the allocator. "others" is how many cores
other processes kept busy meanwhile: repeat what was measured beside them. Ratios travel between machines better than
seconds.

Expected before measuring, on a CPU: fused takes 1.2 to 1.4 times the floor in fp32 (chunks of 261 tokens multiply some
10 % slower than 1,024 at once, softmax and divergence cost about as much again) and adds about 0.3 GiB at any number
of tokens, plus the gradient of a trainable head; plain takes 1.5 times the floor and adds 3.4 GiB for every 1,024
tokens. In bf16 on a CPU with bf16 units fused multiplies twice for each product of the floor and softmax and divergence stay
in fp32: 2 to 3 times the floor; rounded multiplies once, 1.3 to 1.6 times. Without such units fused costs what it costs in fp32 and
a little for raising the heads to it. Another divergence adds 0.05 to 0.2 times the fp32 floor, adaptive KL 0.3.
"""

import argparse
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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtune import losses
from kdtune.distributed.allocator import keep_freed_memory
from kdtune.losses import HiddenSignal, KDLoss

TILE = 16032
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
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)  # one case, in this process
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(run_case(args)))
    else:
        print_table(args)


def print_table(args: argparse.Namespace) -> None:
    """Runs every case in its own process and prints one line each, with its ratio to the floor of the same case."""
    torch_note = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, hidden {args.student_dim}/{args.teacher_dim}"
    )
    print(f"{device_name(args.device)}; {torch_note}, vocabulary {args.vocab:,}")
    print(
        f"{'tokens':>6} {'dtype':>9} {'head':>10} {'loss':>8} {'seconds':>8} {'processor s':>11} {'x floor':>8} {'GiB added':>10} "
        f"{'others':>7}"
    )
    impls = sorted(args.impl.split(","), key=lambda impl: impl != "matmul")  # the floor first: the others refer to it
    divergences = args.divergence.split(",")
    # The floor and plain logits know the forward KL only.
    rows = [
        (impl, one) for impl in impls for one in (divergences if impl not in ("matmul", "plain") else ["ForwardKL"])
    ]
    for tokens, dtype, head in itertools.product(args.tokens.split(","), args.dtype.split(","), args.head.split(",")):
        floor = None
        for impl, divergence in rows:
            case = ["--impl", impl, "--tokens", tokens, "--dtype", dtype, "--head", head, "--divergence", divergence]
            command = [sys.executable, __file__, *sys.argv[1:], *case, "--case"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "killed").splitlines()[-1]
                print(f"{tokens:>6} {dtype:>9} {head:>10} {impl:>8} failed: {reason}")
                continue
            result = json.loads(done.stdout)
            floor = result["processor"] if impl == "matmul" else floor
            ratio = f"{result['processor'] / floor:.2f}" if floor else "-"
            numbers = f"{result['seconds']:8.3f} {result['processor']:11.3f} {ratio:>8} {result['gib']:10.2f} {result['others']:7.2f}"
            print(f"{tokens:>6} {dtype:>9} {head:>10} {impl:>8} {numbers} {divergence}", flush=True)


def run_case(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the fastest repetition, GiB added at the peak, cores that others kept busy."""
    if args.device == "cpu":
        keep_freed_memory()  # as every run does
    dtype, trainable, num_tokens = getattr(torch, args.dtype), args.head == "trainable", int(args.tokens)
    torch.manual_seed(0)
    weight, teacher_weight = (
        torch.empty(args.vocab, dim, dtype=dtype, device=args.device).normal_(std=0.02)
        for dim in (args.student_dim, args.teacher_dim)
    )
    settings = {} if args.impl in ("matmul", "plain") else {"divergence": getattr(losses, args.divergence)()}
    call = CALLS[args.impl](weight, teacher_weight, trainable, args.chunk_size, **settings)

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
    found = {"seconds": min(seconds), "processor": min(processor)}
    return found | {"gib": (memory(args.device) - before) / GIB, "others": max(0.0, others)}


Call = Callable[[Tensor, Tensor, Tensor], None]


def fused(
    weight: Tensor, teacher_weight: Tensor, trainable: bool, chunk_size: int | None, *, divergence: Any, **settings: Any
) -> Call:
    output, teacher_output = head(weight, trainable), head(teacher_weight, False)
    loss_fn = KDLoss(divergence, chunk_size=chunk_size, **settings)

    def call(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> None:
        loss, _ = loss_fn(hidden, output, HiddenSignal(teacher_hidden, teacher_output), labels)
        (loss / labels.numel()).backward()
        output.weight.grad = None

    return call


def plain(weight: Tensor, teacher_weight: Tensor, trainable: bool, _: int | None) -> Call:
    output, teacher_output = head(weight, trainable), head(teacher_weight, False)

    def call(hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> None:
        logits = output(hidden).float().flatten(0, 1)
        with torch.no_grad():
            teacher_logits = teacher_output(teacher_hidden).float().flatten(0, 1)
        kd = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean")
        (0.5 * F.cross_entropy(logits, labels.flatten()) + 0.5 * kd).backward()
        output.weight.grad = None

    return call


def matmul(weight: Tensor, teacher_weight: Tensor, trainable: bool, _: int | None) -> Call:
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


CALLS: dict[str, Callable[[Tensor, Tensor, bool, int | None], Call]] = {
    "fused": fused,
    "compiled": partial(fused, compile=True),
    "rounded": partial(fused, logits_dtype=torch.bfloat16),
    "plain": plain,
    "matmul": matmul,
}


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
    statm = Path("/proc/self/statm")
    if reset and statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
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
