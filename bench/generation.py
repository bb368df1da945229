"""Tokens per second of greedy generation, beside transformers' and the floor of the matrix products, in one run.

    python bench/generation.py models/SmolLM2-135M-Instruct
    python bench/generation.py models/SmolLM2-135M-Instruct --prompts 20 --new-tokens 128 --batch-size 8

    kdtune         kdtune.generation.generate, prompt by prompt
    transformers   AutoModelForCausalLM.generate on the same weights, prompt by prompt, in turn with kdtune
    batch          kdtune.generation.generate_batch
    floor          the products of every linear and the head with one token, and nothing else

Each prompt is answered by both before the next one, so that other load on the machine falls on both. Equal answers are
counted. Expected before measuring, with a model of 135M parameters on a CPU: kdtune within 1.3 times the floor's time,
transformers some 1.3 times kdtune's, because it does more in Python for each token.
"""

import argparse
import tempfile
import time

import torch
from torch import nn

from kdtune.checkpoint import load_model, save_model
from kdtune.generation import generate, generate_batch
from kdtune.models import Transformer
from kdtune.tokenizers import load

TOPICS = ("rain", "bread", "the Moon", "bees", "a violin", "gravity", "salt", "a good friend", "winter", "the sea")
QUESTIONS = ("What is {}?", "Write three sentences about {}, and explain to a child of eight why it matters to us.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second of greedy generation.")
    parser.add_argument("folder", help="a model with its tokenizer, in any format kdtune reads")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    tokenizer = load(arguments.folder)
    model = load_model(arguments.folder, dtype=getattr(torch, arguments.dtype)).eval()
    texts = [question.format(topic) for question in QUESTIONS for topic in TOPICS][: arguments.prompts]
    prompts = [
        tokenizer.tokenize_messages([{"role": "user", "content": text}], add_generation_prompt=True)[0]
        for text in texts
    ]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}, {len(prompts)} prompts "
          f"of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {arguments.new_tokens} new ones each")  # fmt: skip
    compare(model, prompts, arguments.new_tokens, arguments.batch_size)


def compare(model: Transformer, prompts: list[list[int]], num_new: int, batch_size: int) -> None:
    """Prints the table."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/hf")
        theirs = AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=model.tok_embeddings.weight.dtype).eval()
    seconds = {"kdtune": 0.0, "transformers": 0.0}
    equal = 0
    for number, prompt in enumerate([prompts[0], *prompts]):
        start = time.perf_counter()
        ours = generate(model, prompt, max_new_tokens=num_new, stop_ids=())
        middle = time.perf_counter()
        ids = torch.tensor([prompt])
        with torch.no_grad():
            answer = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        end = time.perf_counter()
        if number == 0:  # to warm up
            continue
        seconds["kdtune"] += middle - start
        seconds["transformers"] += end - middle
        equal += ours == answer[0, len(prompt) :].tolist()
    num_tokens = num_new * len(prompts)
    for name, value in seconds.items():
        print(f"{name:<14}{num_tokens / value:8.1f} tokens/s")
    start = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        generate_batch(model, prompts[first : first + batch_size], max_new_tokens=num_new, stop_ids=())
    print(f"{'batch of ' + str(batch_size):<14}{num_tokens / (time.perf_counter() - start):8.1f} tokens/s")
    print(f"{'floor':<14}{1 / floor(model):8.1f} tokens/s")
    print(f"equal answers: {equal} of {len(prompts)}")


@torch.no_grad()
def floor(model: Transformer, repetitions: int = 20) -> float:
    """Seconds that the products of one token take, the shortest of the repetitions."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(1, linear.in_features, dtype=linear.weight.dtype) for linear in linears]
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for linear, row in zip(linears, inputs, strict=True):
            linear(row)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
