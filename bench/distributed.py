"""What the distributed path costs: the distillation recipe's step on one process with FSDP2 and a process group, and without.

    python bench/distributed.py                                 # on CUDA where there is one, else on the CPU
    python bench/distributed.py --batch-size 1 --rounds 50      # where what is added to a step weighs more

The same random student and teacher are built twice in one process, once as a run without torchrun has them and once through
`kdtune.parallel.shard_model` in a world of one. Both take the same steps (forward of both models, loss, backward, clipping,
AdamW) in turn, the one that begins alternating, so that other load on the machine falls on both. The ratio is the median of the
rounds' ratios, on a CPU also of processor seconds, which other load changes less (with OMP_NUM_THREADS=1); the losses of all
steps are compared too.

Expected before measuring: less than 3 % on a CPU, where a step takes a second (what is added are copies of weights and gradients
into FSDP's buffers, some 0.4 GB a step, and a few hooks a layer), and up to 10 % on a GPU, where the same step takes some 15 ms.
Found on a CPU: docs/benchmarks.md.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from kdtune import distributed, losses, parallel, teachers, training
from kdtune._assets import find_recipe
from kdtune.config.recipe import import_recipe
from kdtune.data import Batch
from kdtune.models import Transformer, llama

Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the distributed path on one process.")
    parser.add_argument("--layers", type=int, default=4, help="of the student, each of SmolLM2-135M's size")
    parser.add_argument("--teacher-layers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each path")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}, {arguments.layers} layers "
          f"beside {arguments.teacher_layers}, {arguments.batch_size} x {arguments.tokens} tokens")  # fmt: skip
    compare_paths(arguments, device)


def compare_paths(arguments: argparse.Namespace, device: torch.device) -> None:
    """Prints both paths' seconds a step, the ratio, and how far their losses are apart."""
    alone = make_step(arguments, distributed.World(device))
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with distributed.start_world(device) as world:
        steps = {"single device": alone, "distributed": make_step(arguments, world)}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        difference = 0.0
        for number in range(-2, arguments.rounds):
            found = {}
            for name in sorted(steps, reverse=number % 2 == 0):
                start = time.perf_counter(), time.process_time()
                found[name] = steps[name]()
                if number >= 0:  # the first two warm up
                    seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            difference = max(difference, abs(found["distributed"] / found["single device"] - 1))
    clocks = ("wall clock", "processor") if device.type == "cpu" else ("wall clock",)
    for clock, what in enumerate(clocks):
        alone_s, distributed_s = ([pair[clock] for pair in seconds[name]] for name in steps)
        ratios = sorted(ours / theirs for ours, theirs in zip(distributed_s, alone_s, strict=True))
        quarter = len(ratios) // 4
        print(f"{what}: single device {statistics.median(alone_s):.4f} s a step, "
              f"distributed {statistics.median(distributed_s):.4f} s, "
              f"ratio {statistics.median(ratios):.4f} "
              f"(half of the rounds: {ratios[quarter]:.4f} to {ratios[-1 - quarter]:.4f})")  # fmt: skip
    print(f"losses differ by at most {difference:.1e} of themselves")


def make_step(arguments: argparse.Namespace, world: distributed.World) -> Step:
    """A function that takes one step of the recipe and gives its loss in nats a token."""
    recipe = import_recipe(find_recipe("knowledge_distillation"))
    kd_step = recipe.function.__globals__["kd_step"]
    dtype = getattr(torch, arguments.dtype)

    def build(num_layers: int, seed: int) -> Transformer:
        torch.manual_seed(seed)
        with world.device:
            model: Transformer = llama(
                vocab_size=49152, embed_dim=576, num_layers=num_layers, num_heads=9, num_kv_heads=3, intermediate_dim=1536,
                max_seq_len=2048, tie_embeddings=True,
            ).to(dtype)  # fmt: skip
        return model

    parallelism = distributed.Parallelism()
    teacher = build(arguments.teacher_layers, 0).requires_grad_(False)
    parallel.shard_model(teacher, parallelism, world)
    student = parallel.shard_model(build(arguments.layers, 1), parallelism, world)
    kd_loss = losses.KDLoss(losses.ForwardKL(), kd_ratio=0.5)
    optimizer = torch.optim.AdamW(training.trainable_parameters(student), lr=1e-5)
    generator = torch.Generator().manual_seed(world.rank)

    def step() -> float:
        tokens, labels = torch.randint(49152, (2, arguments.batch_size, arguments.tokens), generator=generator)
        batch = Batch.from_labels(tokens, labels)
        (num_valid_tokens,) = world.sum([batch.num_valid_tokens])
        loss, _ = kd_step(student, teachers.OnlineTeacher(teacher), kd_loss, batch.to(world.device))
        (loss / num_valid_tokens).backward()
        training.clip_grad_norm_(student.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Waits for the device, as the recipe does when it reads the loss.
        return world.sum([loss.item()])[0] / num_valid_tokens

    return step


if __name__ == "__main__":
    main()
