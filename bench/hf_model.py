"""A native family against the same model computed by transformers: loss, time and memory of forward and backward.

    python bench/hf_model.py models/SmolLM2-135M-Instruct

Documents end to end are computed four ways: by kdtune's decoder, by transformers' behind `kdtune.models.hf_model`, and by transformers
alone, with the mask that it makes from positions and padded. Each way is a process of its own, whose processor seconds are counted;
the loss is kdtune's fused one.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtune.checkpoint import Checkpointer, load_model, save_model
from kdtune.losses import KDLoss, Targets
from kdtune.models import Documents, OutputHead, hf_model

WAYS = ("kdtune", "hf_model", "transformers, mask of positions", "transformers, padded")
STEPS = 3


def lengths() -> list[int]:
    """Sixteen documents of 32 to 224 tokens, 2,048 in all."""
    drawn = torch.randint(32, 225, (15,), generator=torch.Generator().manual_seed(0)).tolist()
    scaled = [length * 1920 // sum(drawn) for length in drawn]
    return [*scaled, 2048 - sum(scaled)]


def hidden_of(way: str, folder: str, dtype: torch.dtype) -> tuple[Callable[[Tensor, Documents], Tensor], Any, Any]:
    """A function of tokens and documents that gives hidden states [1, T, D], the head, and the module with the parameters."""
    if way in ("kdtune", "hf_model"):
        model = Checkpointer(folder, family=hf_model if way == "hf_model" else None).load(dtype=dtype)
        return lambda tokens, documents: model(tokens, documents=documents, return_hidden=True), model.output, model
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    head = OutputHead.of(causal.lm_head.weight)

    # With use_cache=True, its default, transformers makes no such mask, and the documents see each other.
    def end_to_end(tokens: Tensor, documents: Documents) -> Tensor:
        return causal.model(
            input_ids=tokens, position_ids=documents.positions_T[None], use_cache=False
        ).last_hidden_state

    def padded(tokens: Tensor, documents: Documents) -> Tensor:
        rows_T = torch.arange(len(documents.lengths)).repeat_interleave(torch.tensor(documents.lengths))
        rows = tokens.new_zeros(len(documents.lengths), documents.longest)
        rows[rows_T, documents.positions_T] = tokens[0]
        return causal.model(input_ids=rows).last_hidden_state[rows_T, documents.positions_T][None]

    return padded if way.endswith("padded") else end_to_end, head, causal


def measure(way: str, folder: str, dtype: torch.dtype) -> dict[str, float]:
    """The loss of a token, the gradient's norm, processor seconds a step, and the peak of the resident set in GiB."""
    hidden, head, module = hidden_of(way, folder, dtype)
    documents = Documents.of_lengths(lengths())
    tokens = torch.randint(49152, (1, 2048), generator=torch.Generator().manual_seed(1))
    targets, loss_fn = Targets.from_labels(tokens.roll(-1, 1)), KDLoss(kd_ratio=0.0)
    seconds = []
    for _ in range(STEPS):
        module.zero_grad(set_to_none=True)
        start = time.process_time()
        loss, _ = loss_fn(hidden(tokens, documents), head, None, targets)
        (loss / 2048).backward()
        seconds.append(time.process_time() - start)
    norm = torch.nn.utils.get_total_norm([one.grad for one in module.parameters() if one.grad is not None])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"loss": float(loss) / 2048, "norm": float(norm), "seconds": min(seconds[1:]), "GiB": peak}


def main() -> None:
    """Print a line for each way and dtype."""
    with tempfile.TemporaryDirectory() as made:
        folder = f"{made}/model"
        save_model(load_model(Path(sys.argv[1])), folder)
        for dtype in ("float32", "bfloat16"):
            for way in WAYS:
                done = subprocess.run(
                    [sys.executable, __file__, way, folder, dtype], capture_output=True, text=True, check=True
                )
                found = json.loads(done.stdout)
                print(dtype, way, *(f"{name} {value:.6g}" for name, value in found.items()), sep="\t", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3]))))
    else:
        main()
