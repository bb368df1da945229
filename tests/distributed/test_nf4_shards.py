"""A base in 4 bits (QLoRA) in shards: the same bits as on one process, a share of them on each."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from kdtune import distributed, parallel
from kdtune.checkpoint import Checkpointer, save_model
from kdtune.distributed import full_tensor, to_local
from kdtune.models import Transformer, adapted_linears, apply_lora, llama
from kdtune.models.nf4 import BY_ROWS, dequantized, nf4_parts
from kdtune.tokenizers import byte_tokenizer

# Of 3 processes each can have as many rows of the feed-forward's 192, but not of the others' 64 or 32.
SIZES = {"vocab_size": 260, "embed_dim": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "intermediate_dim": 192,
         "max_seq_len": 64}  # fmt: skip
NUM_CUT = {2: 12, 3: 4, 4: 12}
ADAPTER = partial(apply_lora, use_dora=True, quantize_base=True)
TOKENS = torch.arange(24).view(2, 12)


def build(model: Path, world: distributed.World | None, dtype: torch.dtype, recompute: bool = False) -> Transformer:
    """The model with new adapters, on the processes of a world or whole."""
    torch.manual_seed(0)
    built = parallel.build_model(
        None, Checkpointer(model), adapter=ADAPTER, dtype=dtype, activation_checkpointing=recompute,
        **({"world": world} if world else {}),
    )  # fmt: skip
    for linear in adapted_linears(built).values():
        # Or B is zero, and A has no gradient.
        torch.nn.init.constant_(to_local(linear.lora_b.weight.detach()), 0.1)
    return built


def compare(model: Path, dtype: torch.dtype, ranks: int) -> None:
    """Bits of the base, magnitudes, outputs, merged weights and gradients, on this process of so many."""
    with distributed.start_world(torch.device("cpu")) as world:
        expected, found = build(model, None, dtype), build(model, world, dtype, recompute=ranks == 4)
        pairs = list(zip(adapted_linears(found).values(), adapted_linears(expected).values(), strict=True))
        assert sum(isinstance(linear.weight, DTensor) for linear, _ in pairs) == NUM_CUT[ranks]
        for linear, plain in pairs:
            share = ranks if isinstance(linear.weight, DTensor) else 1
            parts, all_parts = nf4_parts(to_local(linear.weight)), nf4_parts(plain.weight)
            assert all(share * parts[name].numel() == all_parts[name].numel() for name in BY_ROWS)
            assert torch.equal(full_tensor(dequantized(linear.weight)), dequantized(plain.weight))
            assert torch.equal(full_tensor(linear.magnitude), plain.magnitude)
            assert torch.equal(full_tensor(linear.merged_weight()), plain.merged_weight())
        for _ in range(2):  # the second finds the gathered weights freed
            outputs = [one(TOKENS).float() for one in (found, expected)]
            assert torch.equal(*outputs)
            for one in outputs:
                one.square().mean().backward()
        for linear, plain in pairs:
            gradient = full_tensor(linear.lora_a.weight.grad) / ranks  # every process had all tokens
            rtol = 1e-5 if dtype == torch.float32 else 1e-2  # a third of a bf16 number is rounded
            torch.testing.assert_close(gradient, plain.lora_a.weight.grad, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [
        (2, torch.bfloat16),
        (3, torch.float32),
        *(
            pytest.param(
                *one, marks=pytest.mark.slow("the same layers on other numbers of processes; 3 do not divide all rows")
            )
            for one in ((2, torch.float32), (3, torch.bfloat16), (4, torch.float32), (4, torch.bfloat16))
        ),
    ],
)
def test_shards_are_those_of_the_whole(ranks: int, dtype: torch.dtype, launch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(llama(**SIZES, tie_embeddings=True), tmp_path / "model", tokenizer=byte_tokenizer())
    launch.call(compare, tmp_path / "model", dtype, ranks, ranks=ranks)
