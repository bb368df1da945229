"""A distillation step of two Llama shapes with random weights: time, model FLOPs utilization, memory.

    python bench/shapes.py                                              # one CUDA device: 1B <- 8B, LoRA, bf16, 4,096 tokens
    python bench/shapes.py --compile --documents 16                     # the same tokens in 16 documents
    python bench/shapes.py --student tiny --teacher tiny --tokens 256   # anything else, such as a CPU

The micro-batch is documents of random lengths end to end, all of whose tokens have a label. "utilization" is that of the model's
operations, without recomputation, over the rate of large matrix products that is measured in the same run. Operations of
a token: 2 per weight of a linear in a forward, 2 more for the gradient of its input in the student, whose base is
frozen; attention counts the half that causality leaves.

Expected before measuring, on an H100 or H200: half of the measured product rate and more, under 40 GB.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from kdtune import data, losses, models, teachers, training
from kdtune.data.transforms import make_example

REPETITIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Utilization and memory of a distillation step.")
    parser.add_argument("--student", default="llama3_2_1b", help="builder in kdtune.models, or tiny")
    parser.add_argument("--teacher", default="llama3_1_8b", help="builder in kdtune.models, or tiny")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=REPETITIONS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), models.dtype_from_name(args.dtype)
    torch.manual_seed(0)
    teacher = random_model(args.teacher, device, dtype).requires_grad_(False).eval()
    student = models.apply_lora(
        random_model(args.student, device, dtype),
        lora_rank=args.rank, lora_alpha=2 * args.rank, lora_attn_modules=["q_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True,
    ).train()  # fmt: skip
    lengths = document_lengths(args.tokens, args.documents)
    batch = random_batch(lengths, min(student.config.vocab_size, teacher.config.vocab_size)).to(device)
    if args.compile:
        for layer in [*student.layers, *teacher.layers]:
            layer.compile()
    step = kd_step(student, teachers.OnlineTeacher(teacher), losses.KDLoss(compile=args.compile), batch)
    for _ in range(2):
        step()
    seconds = fastest(step, device, args.steps)
    flops = sum(lengths) * flops_per_token(student, lengths, passes=2) + sum(lengths) * flops_per_token(
        teacher, lengths, passes=1
    )
    rate = matmul_rate(device, dtype, args.tokens, teacher.config)
    print(f"{device_name(device)}, torch {torch.__version__}: {args.student} <- {args.teacher}, {args.dtype}, LoRA rank {args.rank}, "
          f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens{', compiled' if args.compile else ''}")  # fmt: skip
    print(f"{seconds:.4f} s a step, {sum(lengths) / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.2f} TFLOP/s, utilization "
          f"{flops / seconds / rate:.1%} of {rate / 1e12:.2f} TFLOP/s measured in products, peak {peak_gib(device):.2f} GiB")  # fmt: skip


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> models.Transformer:
    """Return a model of a builder's shape with random weights, made on the device."""
    shape = {
        "vocab_size": 512,
        "embed_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_dim": 128,
    }
    with torch.device(device):
        model = models.llama(**shape, max_seq_len=4096) if name == "tiny" else getattr(models, name)()
    return model.to(dtype)


def document_lengths(num_tokens: int, num_documents: int) -> list[int]:
    """Return random lengths of at least 2 that add up to num_tokens."""
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, num_tokens // 2), num_documents - 1, replace=False)) * 2
    return np.diff([0, *cuts, num_tokens]).tolist()


def random_batch(lengths: list[int], vocab_size: int) -> data.Batch:
    """Return a micro-batch of documents of random ids."""
    ids = np.random.default_rng(1)
    return data.collate(
        [make_example(ids.integers(vocab_size, size=size), [True] * size) for size in lengths], pad_id=0
    )


def kd_step(
    student: models.Transformer, teacher: teachers.OnlineTeacher, loss_fn: losses.KDLoss, batch: data.Batch
) -> Callable[[], None]:
    """Return a step as the recipe makes it: both models, loss, backward, optimizer."""
    optimizer = torch.optim.AdamW(training.trainable_parameters(student), lr=1e-4, fused=True)

    def step() -> None:
        hidden = student(**batch.inputs, return_hidden=True)
        loss, _ = loss_fn(hidden, student.output, teacher(batch), batch.targets)
        (loss / batch.num_valid_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops_per_token(model: models.Transformer, lengths: list[int], passes: int, *, with_head: bool = True) -> float:
    """Return the operations of a token in a forward, with passes=2 also those of the gradients of inputs; no adapters."""
    config = model.config
    linear = sum(
        module.weight.numel()
        for name, module in model.layers.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora" not in name
    )
    head = config.vocab_size * config.embed_dim * with_head
    seen = sum(length * (length + 1) / 2 for length in lengths) / sum(lengths)  # tokens that a token attends to
    attention = 2 * 2 * seen * config.num_heads * config.head_dim * config.num_layers
    return passes * 2 * (linear + head) + attention * (1 if passes == 1 else 3)


def fastest(step: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Return the seconds of the fastest repetition, the device waited for."""
    seconds = []
    for _ in range(repetitions):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype, num_tokens: int, config: models.TransformerConfig) -> float:
    """Return operations per second of the product of a step's tokens with a feed-forward weight of the teacher."""
    hidden = torch.randn(num_tokens, config.embed_dim, device=device).to(dtype)
    weight = torch.randn(config.intermediate_dim, config.embed_dim, device=device).to(dtype)
    out = torch.empty(num_tokens, config.intermediate_dim, device=device, dtype=dtype)
    for _ in range(3):
        torch.mm(hidden, weight.T, out=out)
    seconds = fastest(lambda: torch.mm(hidden, weight.T, out=out), device, 20)
    return 2 * num_tokens * weight.numel() / seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
