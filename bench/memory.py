"""What each memory option of training saves and costs, and what bf16 weights keep of small updates.

    python bench/memory.py                                                  # every option, in a process of its own
    python bench/memory.py --options plain,"optimizer_in_backward=true"     # some of them
    python bench/memory.py --updates models/SmolLM2-135M-Instruct           # weight_update at three learning rates

The step is one of finetuning (cross entropy; a teacher's memory is the same for every option) of SmolLM2-135M's shapes with random
weights. "peak" is the largest resident set of a warm-up and `--steps` further steps, less that after the imports; seconds are
those of the processor (all threads) in the fastest of the further steps, compilation left out. Both are divided by those of "plain":
fp32, all parameters trained, torch.optim.AdamW.

Expected before measuring, for 512 tokens in fp32 (weights and gradients 0.5 GB each, state 1.1 GB, activations 0.7 GB, so 2.9 GB in
all): full checkpointing 0.8 of the peak and 1.3 times the seconds; every second layer half of both; selective 0.9 and 1.1 times;
updates in backward 0.8, no more seconds; 8-bit state 0.75, 4-bit 0.7, with 1.1 times the seconds; bf16 0.5, with an fp32 copy 0.8;
LoRA 0.5 and two thirds of the seconds. The updates that survive at a learning rate of 1e-6: 2 % of those in fp32 if they are rounded to
nearest, all of them on average if stochastically or with an fp32 copy.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kdtune import checkpoint, config, data, losses, models, parallel, tokenizers, training
from kdtune._assets import find_recipe
from kdtune.config.recipe import import_recipe
from kdtune.data.transforms import make_example
from kdtune.training.fp32_updates import update_in_fp32

SHAPE = {
    "vocab_size": 49152,
    "embed_dim": 576,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "intermediate_dim": 1536,
}
LORA = "adapter=kdtune.models.apply_lora"
BF16 = "dtype=bf16"
OPTIONS = {
    "plain": [],
    "activation_checkpointing=full": ["activation_checkpointing=full"],
    "activation_checkpointing=2": ["activation_checkpointing=2"],
    "activation_checkpointing=selective": ["activation_checkpointing=selective"],
    "optimizer_in_backward=true": ["optimizer_in_backward=true"],
    "optimizer=torchao.optim.AdamW8bit": ["optimizer=torchao.optim.AdamW8bit"],
    "optimizer=torchao.optim.AdamW4bit": ["optimizer=torchao.optim.AdamW4bit"],
    "optimizer=torchao.optim.AdamWFp8": ["optimizer=torchao.optim.AdamWFp8"],
    "4 micro-batches": ["gradient_accumulation_steps=4"],
    "dtype=bf16": [BF16],
    "dtype=bf16 weight_update=stochastic": [BF16, "weight_update=stochastic"],
    "dtype=bf16 weight_update=fp32_master": [BF16, "weight_update=fp32_master"],
    "LoRA": [LORA],
    "QLoRA": [LORA, "adapter.quantize_base=true"],
    "compile=true": ["compile=true"],
    "together": [
        BF16,
        "weight_update=stochastic",
        "activation_checkpointing=full",
        "optimizer_in_backward=true",
        "optimizer=torchao.optim.AdamW8bit",
    ],
}
# The last: full checkpointing, updates in backward, 8-bit state and bf16 weights with stochastic rounding.
RATES = (1e-5, 1e-6, 1e-7)
UPDATES = {
    "bf16, nearest": (torch.bfloat16, None),
    "bf16, stochastic": (torch.bfloat16, "stochastic"),
    "bf16 weights of fp32_master": (torch.bfloat16, "fp32_master"),
    "fp32": (torch.float32, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and processor seconds of each memory option.")
    parser.add_argument("--options", default=",".join(OPTIONS))
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a document")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--updates", help="folder or file of a model: measure weight_update on it instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.updates:
        return updates(args.updates)
    if args.child is not None:
        return print(json.dumps(measure(OPTIONS[args.child], args)))
    print(f"CPU, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.documents} x {args.length} tokens")
    print("| option | peak, MiB | of plain | processor s a step | of plain |\n|---|---|---|---|---|")
    plain: dict[str, float] = {}
    for name in args.options.split(","):
        command = [
            sys.executable,
            __file__,
            "--child",
            name,
            *(f"--{key}={getattr(args, key)}" for key in ("documents", "length", "steps")),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        plain = plain or found
        peak, seconds = found["peak"], found["seconds"]
        print(
            f"| {name} | {peak / 2**20:,.0f} | {peak / plain['peak']:.2f} | {seconds:.2f} | {seconds / plain['seconds']:.2f} |",
            flush=True,
        )


def measure(overrides: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Return the peak in bytes and the processor seconds of a step."""
    common = [
        "adapter=null",
        "optimizer.lr=1e-5",
        "gradient_accumulation_steps=1",
        "clip_grad_norm=null",
        "lr_scheduler=null",
    ]
    cfg = config.load("tiny/finetune", [*common, *overrides], import_recipe(find_recipe("finetune")).schema)
    before = peak_bytes()
    torch.manual_seed(0)
    model = parallel.build_model(
        lambda: models.llama(**SHAPE, max_seq_len=2048, tie_embeddings=True), None, dtype=models.dtype_from_name(cfg.dtype),
        adapter=config.factory(cfg.adapter), compile=cfg.compile, activation_checkpointing=cfg.checkpointed,
    )  # fmt: skip
    optimizer, _ = training.build_optimizer(cfg, model, 1)
    loss_fn = losses.KDLoss(kd_ratio=0.0, compile=cfg.compile)
    ids = torch.Generator().manual_seed(1)
    examples = [
        make_example(torch.randint(49152, (args.length,), generator=ids).numpy(), [True] * args.length)
        for _ in range(args.documents)
    ]
    count = cfg.gradient_accumulation_steps
    batches = [data.collate(examples[number::count], pad_id=0).without_padding() for number in range(count)]
    total, seconds = sum(batch.num_valid_tokens for batch in batches), []
    for _ in range(1 + args.steps):
        start = time.process_time()
        for batch in batches:
            hidden = model(**batch.inputs, return_hidden=True)
            (loss_fn(hidden, model.output, None, batch.targets)[0] / total).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - start)
    return {"peak": peak_bytes() - before, "seconds": min(seconds[1:])}


def peak_bytes() -> int:
    """Return the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def updates(source: str, num_steps: int = 3) -> None:
    """Print how much of the weights' movement in fp32 each form of bf16 weights makes, by learning rate; AdamW without decay."""
    examples = data.quickstart_dataset(tokenizers.load(source, max_seq_len=96))
    batches = [data.collate([examples[number]], pad_id=0) for number in range(num_steps)]
    print("| learning rate | weights | moved, of fp32's movement | weights that moved | fall of a batch's loss |")
    print("|---|---|---|---|---|")
    start = [one.detach() for one in load(source, torch.bfloat16).parameters()]
    for rate in RATES:
        whole: list[torch.Tensor] = []
        for name in reversed(UPDATES):
            dtype, weight_update = UPDATES[name]
            model = load(source, dtype)
            optimizer = torch.optim.AdamW(training.trainable_parameters(model), lr=rate, weight_decay=0.0)
            if weight_update:
                update_in_fp32(optimizer, weight_update)
            before = loss_of(model, batches[0]).item()
            for batch in batches:
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            moved = [one.detach().float() - was.float() for one, was in zip(model.parameters(), start, strict=True)]
            whole = whole or moved
            along = sum((one.double() * other).sum() for one, other in zip(moved, whole, strict=True))
            share = sum((one != 0).sum() for one in moved) / sum(one.numel() for one in moved)
            survives = along / sum(other.double().square().sum() for other in whole)
            print(
                f"| {rate:g} | {name} | {survives:.1%} | {share:.1%} | {before - loss_of(model, batches[0]).item():.2e} |",
                flush=True,
            )
            del model, optimizer, moved


def load(source: str, dtype: torch.dtype) -> Any:
    """Return the model with the weights that bf16 holds, in a dtype."""
    return checkpoint.load_model(Path(source), dtype=torch.bfloat16, device="cpu").to(dtype)


def loss_of(model: Any, batch: data.Batch) -> torch.Tensor:
    """Return the mean cross entropy of a batch."""
    hidden = model(**batch.inputs, return_hidden=True)
    return losses.KDLoss(kd_ratio=0.0)(hidden, model.output, None, batch.targets)[0] / batch.num_valid_tokens


if __name__ == "__main__":
    main()
