"""Losses beside the plain divergence: on two processes the gradient of one, in float64."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdtune import config, data, tokenizers, training
from kdtune.data import TokenizerPair, quickstart_dataset
from kdtune.distributed import Parallelism, World, full_tensor
from kdtune.losses import KDLoss
from kdtune.models import Transformer, llama
from kdtune.parallel import shard_model
from kdtune.teachers import OnlineTeacher, check_vocabularies
from kdtune.tokenizers import byte_tokenizer

HIDDEN = {"_component_": "kdtune.losses.HiddenStateLoss", "weight": 2.0, "layers": [0.5, 1.0]}


def float64_model(*, width: int, vocab_size: int, seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = llama(vocab_size=vocab_size, embed_dim=width, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=40,
                  max_seq_len=256)  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def gradients(name: str, folder: Path, student: Transformer, world: World, ranks: list[int]) -> dict[str, torch.Tensor]:
    """Of the loss over two examples a rank, by parameter: of the model, and of a term's own maps."""
    teacher_tokenizer = tokenizers.load(folder)
    own = byte_tokenizer(max_seq_len=96)
    tokenizer: Any = own if name == "hidden" else TokenizerPair(own, teacher_tokenizer)
    dataset = quickstart_dataset(tokenizer, split="train[:4]", prompt="plain")
    batches = [dataset.collate([dataset[2 * rank], dataset[2 * rank + 1]], tokenizer.pad_id) for rank in range(2)]
    teacher_model = float64_model(
        width=48, vocab_size=320 if name == "hidden" else teacher_tokenizer.vocab_size, seed=1
    )
    kd_loss = config.instantiate({"_component_": f"kdtune.losses.{'ForwardKL' if name == 'hidden' else name}"})
    divergence = check_vocabularies(tokenizer, 320, teacher_model.config.vocab_size, kd_loss)
    cfg = SimpleNamespace(hidden_loss=HIDDEN if name == "hidden" else None, seed=3, kd_ratio=0.6, teacher_targets=None,
                          loss_settings=dict)  # fmt: skip
    layers = (1, 2) if name == "hidden" else ()
    teacher = OnlineTeacher(teacher_model, layers)
    loss_fn: KDLoss = training.build_kd_loss(cfg, divergence, student, teacher, world)
    num_tokens = sum(batch.num_valid_tokens for batch in batches)
    for rank in ranks:
        batch: data.Batch = batches[rank]
        hidden = student(**batch.inputs, return_hidden=True, **loss_fn.forward_options)
        loss, _ = loss_fn(hidden, student.output, teacher(batch), batch.targets)
        (loss / num_tokens).backward()
    maps = [] if loss_fn.module is None else list(loss_fn.module.named_parameters())
    found = [*student.named_parameters(), *maps]
    return {key: full_tensor(one.grad) for key, one in found if one.grad is not None}


def compare(name: str, folder: Path, layout: dict[str, int]) -> None:
    with Parallelism(**layout).start_world(torch.device("cpu")) as world:
        sharded = shard_model(float64_model(width=32, vocab_size=320, seed=0), Parallelism(**layout), world)
        found = gradients(name, folder, sharded, world, [world.dp_rank])
        alone = World(torch.device("cpu"))
        expected = gradients(name, folder, float64_model(width=32, vocab_size=320, seed=0), alone, [0, 1])
        assert found.keys() == expected.keys() and ("maps.0.weight" in found) == (name == "hidden")
        for key, one in expected.items():
            assert one.dtype == torch.float64 and one.norm() > 0, key
            torch.testing.assert_close(
                found[key], one, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("layout", [{"dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 1}], ids=["FSDP", "replicas"])
@pytest.mark.parametrize("name", ["hidden", "ULD", "HybridULD", "presets.alm"])
def test_two_processes_have_the_gradient_of_one(
    name: str, layout: dict[str, int], launch, other_tokenizer: Path
) -> None:
    launch.call(compare, name, other_tokenizer, layout, ranks=2)
