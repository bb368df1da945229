"""Tokens per second of generation, beside transformers' and the floors of the machine, in one run.

    python bench/generation.py models/SmolLM2-135M-Instruct
    python bench/generation.py models/SmolLM2-135M-Instruct --dtype bfloat16 --alone 0 --batch-size 0 --samples 80 --slots 64

    one at a time: kdtune.generation.generate and AutoModelForCausalLM.generate, greedy
    a batch: kdtune.generation.complete and AutoModelForCausalLM.generate with left padding, greedy, as many new ids for each
    samples: two of each prompt at temperature 1, which end with a stop id or at the limit; transformers in batches of 32
    floor, weights: every weight read once for a token of each text, at the speed at which as many bytes are read here
    floor, products: every linear and the head with a token of each text, and nothing else

Both answer the same prompts on the same weights in turn, so that other load on the machine falls on both; of a batch each does so
``--rounds`` times, and the fastest counts. Equal answers are counted. As in a run, the C library keeps freed memory. Expected
before measuring, with a model of 135M parameters on two cores of a CPU: one at a time as transformers, within 1.5 times the
floor's time; in batches of 32 at least twice transformers' tokens, and within twice the larger floor's time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from kdtune.checkpoint import load_model, save_model
from kdtune.distributed.allocator import keep_freed_memory
from kdtune.generation import Sampling, complete, generate
from kdtune.models import Transformer
from kdtune.tokenizers import load

TOPICS = ("rain", "bread", "the Moon", "bees", "a violin", "gravity", "salt", "a good friend", "winter", "the sea")
QUESTIONS = (
    "What is {}?",
    "Write three sentences about {}, and explain to a child of eight why it matters to us.",
    "Write a short poem about {}.",
    "Which are the five most surprising facts about {}, and who found them out?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second of greedy generation.")
    parser.add_argument("folder", help="a model with its tokenizer, in any format kdtune reads")
    parser.add_argument("--alone", type=int, default=6, help="prompts that are answered one at a time; 0: none")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts of a batch; 0: none")
    parser.add_argument("--samples", type=int, default=0, help="samples, at most 80")
    parser.add_argument("--slots", type=int, default=32, help="of the samples")
    parser.add_argument("--compile", action="store_true", help="kdtune's forwards of new tokens, also of a batch")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    keep_freed_memory()
    tokenizer = load(arguments.folder)
    model = load_model(arguments.folder, dtype=getattr(torch, arguments.dtype)).eval()
    texts = [question.format(topic) for topic in TOPICS for question in QUESTIONS]
    prompts = [
        tokenizer.tokenize_messages([{"role": "user", "content": text}], add_generation_prompt=True)[0]
        for text in texts
    ]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}, prompts "
          f"of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {arguments.new_tokens} new ones each")  # fmt: skip
    theirs = as_transformers(model)
    num_new = arguments.new_tokens
    if arguments.alone:
        compare_alone(model, theirs, prompts[: arguments.alone], num_new)
    if arguments.batch_size:
        compare_batches(
            model, theirs, prompts[: arguments.batch_size], num_new, arguments.rounds, compile=arguments.compile
        )
    if arguments.samples:
        twice = [prompt for prompt in prompts for _ in range(2)][: arguments.samples]
        compare_samples(model, theirs, twice, num_new, arguments.slots, tokenizer.stop_ids)


def as_transformers(model: Transformer) -> Any:
    """The same weights in transformers' model."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/hf")
        return AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=model.dtype).eval()


@torch.no_grad()
def their_answers(theirs: Any, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """Greedy answers by transformers, of prompts that are padded on the left."""
    ids, mask = padded(prompts)
    answers = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return answers[:, ids.shape[1] :].tolist()


@torch.no_grad()
def their_samples(theirs: Any, prompts: list[list[int]], num_new: int, stop_ids: Collection[int]) -> list[list[int]]:
    """Samples by transformers at temperature 1, up to a stop id."""
    found = []
    for first in range(0, len(prompts), 32):
        ids, mask = padded(prompts[first : first + 32])
        answers = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=num_new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=list(stop_ids), pad_token_id=0,
        )  # fmt: skip
        for answer in answers[:, ids.shape[1] :].tolist():
            ends = [place for place, token in enumerate(answer) if token in stop_ids]
            found.append(answer[: ends[0] + 1] if ends else answer)
    return found


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that are padded on the left, and their mask."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def timed(work: Callable[..., Any], *arguments: Any, **settings: Any) -> tuple[float, Any]:
    """Seconds that it takes, and what it returns."""
    start = time.perf_counter()
    result = work(*arguments, **settings)
    return time.perf_counter() - start, result


def compare_alone(model: Transformer, theirs: Any, prompts: list[list[int]], num_new: int) -> None:
    """Print the rows of one prompt at a time."""
    seconds, equal = [0.0, 0.0], 0
    for number, prompt in enumerate([prompts[0], *prompts]):
        ours, answer = timed(generate, model, prompt, max_new_tokens=num_new, stop_ids=())
        other, (expected,) = timed(their_answers, theirs, [prompt], num_new)
        if number > 0:  # the first is to warm up
            seconds = [seconds[0] + ours, seconds[1] + other]
            equal += answer == expected
    print(f"one at a time, {equal} of {len(prompts)} answers equal")
    print_rows(model, dict(zip(("kdtune", "transformers"), seconds, strict=True)), len(prompts) * num_new, 1)


def compare_batches(
    model: Transformer, theirs: Any, prompts: list[list[int]], num_new: int, rounds: int, *, compile: bool
) -> None:
    """Print the rows of a batch."""
    settings: dict[str, Any] = {
        "stop_ids": (),
        "seeds": range(len(prompts)),
        "slots": len(prompts),
        "compile": compile,
    }

    def ours(sampling: Sampling, num_new: int = num_new) -> list[list[int]]:
        return [one.ids for one in complete(model, prompts, max_new_tokens=num_new, sampling=sampling, **settings)]

    # To warm up: compiled for one number of places, and then for any.
    ours(Sampling(), num_new if compile else 2), their_answers(theirs, prompts, 2)
    ways = {
        "kdtune": lambda: ours(Sampling()),
        "transformers": lambda: their_answers(theirs, prompts, num_new),
        "kdtune, drawn": lambda: ours(Sampling(1.0)),
    }
    seconds, answers = dict.fromkeys(ways, float("inf")), {}
    for _ in range(rounds):
        for name, way in ways.items():
            taken, answers[name] = timed(way)
            seconds[name] = min(seconds[name], taken)
    equal = sum(a == b for a, b in zip(answers["kdtune"], answers["transformers"], strict=True))
    print(f"{len(prompts)} at a time, {equal} answers equal")
    print_rows(model, seconds, len(prompts) * num_new, len(prompts))


def compare_samples(
    model: Transformer, theirs: Any, prompts: list[list[int]], num_new: int, slots: int, stop_ids: Collection[int]
) -> None:
    """Print the rows of samples."""
    settings: dict[str, Any] = {
        "max_new_tokens": num_new,
        "sampling": Sampling(1.0),
        "stop_ids": stop_ids,
        "slots": slots,
    }
    torch.manual_seed(0)
    seconds, found = timed(complete, model, prompts, seeds=range(len(prompts)), with_log_probs=True, **settings)
    other, expected = timed(their_samples, theirs, prompts, num_new, stop_ids)
    print(f"{len(prompts)} samples, {sum(one.is_finished for one in found)} of kdtune's with a stop id")
    for name, ids, taken in (("kdtune", [one.ids for one in found], seconds), ("transformers", expected, other)):
        total = sum(map(len, ids))
        print(f"  {name:<16}{total / taken:8.1f} tokens/s  {total / len(prompts):.0f} a sample, {taken:.1f} s")


def print_rows(model: Transformer, seconds: dict[str, float], num_tokens: int, num_rows: int) -> None:
    """Print tokens per second of each way, and of the floors."""
    rates = {name: num_tokens / value for name, value in seconds.items()}
    floors = {"floor, weights": reading(model), "floor, products": products(model, num_rows)}
    for name, rate in (rates | {name: num_rows / value for name, value in floors.items()}).items():
        print(f"  {name:<16}{rate:8.1f} tokens/s {num_rows / rate * 1e3:8.1f} ms a step")
    share = rates["kdtune"] * max(floors.values()) / num_rows
    print(f"  kdtune: {rates['kdtune'] / rates['transformers']:.2f} x transformers, {share:.0%} of the larger floor")


def reading(model: Transformer, repetitions: int = 10) -> float:
    """Seconds that it takes to read as many bytes as the model's weights have, the shortest of the repetitions."""
    num_bytes = sum(parameter.nbytes for parameter in set(model.parameters()))
    buffer = torch.ones(num_bytes // 4)
    return min(timed(buffer.sum)[0] for _ in range(repetitions))


@torch.no_grad()
def products(model: Transformer, num_rows: int, repetitions: int = 10) -> float:
    """Seconds that the products of one token of each text take, the shortest of the repetitions."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(num_rows, linear.in_features, dtype=linear.weight.dtype) for linear in linears]

    def multiply() -> None:
        for linear, rows in zip(linears, inputs, strict=True):
            linear(rows)

    return min(timed(multiply)[0] for _ in range(repetitions))


if __name__ == "__main__":
    main()
