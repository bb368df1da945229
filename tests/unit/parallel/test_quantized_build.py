"""A model that is quantized as it is read: the weights of one that is read first, without its memory, and what is refused."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdtune.checkpoint import Checkpointer, save_model, write_adapter, write_quantized
from kdtune.errors import CheckpointError
from kdtune.models import Transformer, apply_lora, llama
from kdtune.models.quantization import is_quantized, linear_quantizer, megabytes, quantize, target_linears
from kdtune.parallel import build_model, problems

SIZES = {
    "vocab_size": 96,
    "embed_dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_dim": 256,
    "max_seq_len": 64,
}
builder = partial(llama, **SIZES, tie_embeddings=True)
ON_A_CPU = ["int8_weight_only", "int8_dynamic", "float8_weight_only", "intx_4bit", "nf4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `model`, `adapter` and `quantized`, of one model."""
    root = tmp_path_factory.mktemp("quantized_build")
    torch.manual_seed(0)
    save_model(builder(), root / "model")
    adapted = apply_lora(Checkpointer(root / "model").load(), lora_rank=2, apply_lora_to_output=True, use_dora=True)
    for name, parameter in adapted.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    (root / "adapter").mkdir()
    write_adapter(adapted, root / "adapter", base=root / "model")
    model = Checkpointer(root / "model").load()
    quantize(model, "int8_weight_only")
    (root / "quantized").mkdir()
    write_quantized(model, root / "quantized", scheme="int8_weight_only")
    return root


def check_same_weights(found: Transformer, expected: Transformer) -> None:
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(found(tokens), expected(tokens))
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert is_quantized(ours) == is_quantized(theirs) == name.endswith("proj.weight")
        assert not ours.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ON_A_CPU)
def test_the_weights_are_those_of_a_model_that_is_read_first(scheme: str, dtype: torch.dtype, folders: Path) -> None:
    source = Checkpointer(folders / "model")
    found = build_model(None, source, dtype=dtype, trainable=False, quantization=scheme)
    quantize(expected := source.load(dtype=dtype), scheme)
    check_same_weights(found, expected)


def test_an_adapter_is_merged_before_its_base_is_quantized(folders: Path) -> None:
    source = Checkpointer(folders / "model", adapter_dir=folders / "adapter")
    found = build_model(None, source, dtype=torch.float32, trainable=False, quantization="int8")
    quantize(expected := source.load(dtype=torch.float32), "int8")
    check_same_weights(found, expected)


def test_random_weights_are_those_of_the_seed(folders: Path) -> None:
    torch.manual_seed(3)
    found = build_model(builder, None, dtype=torch.float32, trainable=False, quantization="nf4")
    torch.manual_seed(3)
    quantize(expected := builder(), "nf4")
    check_same_weights(found, expected)


def test_one_linear_at_a_time_is_in_memory_unquantized(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = builder()

    def watched(scheme: str) -> Any:
        def quantize_linear(name: str, linear: torch.nn.Linear) -> None:
            linears = target_linears(model).values()
            assert [one for one in linears if one.weight.numel() and not is_quantized(one.weight)] == [linear]
            linear_quantizer(scheme)(name, linear)

        return quantize_linear

    monkeypatch.setattr("kdtune.checkpoint.tensors.linear_quantizer", watched)
    Checkpointer(folders / "model").load(model, quantization="int8")
    assert megabytes(model) < 0.4 * 4e-6 * model.config.num_parameters


def config(folders: Path, **keys: Any) -> SimpleNamespace:
    """The keys of a distillation config that a check reads."""
    node = {"_component_": "kdtune.checkpoint.Checkpointer", "checkpoint_dir": str(folders / "model")}
    parallelism = {"_component_": "kdtune.distributed.Parallelism"}
    return SimpleNamespace(
        **{
            "parallelism": parallelism,
            "dtype": "fp32",
            "teacher_checkpointer": node,
            "teacher_quantization": "int8",
            **keys,
        }
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher_quantization": "int3"}, "teacher_quantization=int3: unknown; one of int8_weight_only.*int4"),
        (
            {"teacher_quantization": "float8_dynamic"},
            "teacher_quantization=float8_dynamic: needs a CUDA device.*nf4 work",
        ),
        ({"teacher_quantization": "int4"}, "teacher_quantization=int4: needs a CUDA device of compute capability 8.0"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(keys: dict[str, Any], message: str, folders: Path) -> None:
    found = problems(config(folders, **keys), torch.device("cpu"))
    assert any(re.search(message, problem) for problem in found), found


@pytest.mark.parametrize(
    ("sizes", "is_allowed"),
    [({}, False), ({"dp_shard": 1, "dp_replicate": -1}, True), ({"dp_shard": 1, "tp": 2}, False)],
)
def test_quantized_weights_are_not_divided(
    sizes: dict[str, int], is_allowed: bool, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    parallelism = {"_component_": "kdtune.distributed.Parallelism", **sizes}
    found = problems(config(folders, parallelism=parallelism), torch.device("cpu"))
    message = "teacher_quantization=int8: with parallelism, for the teacher, quantized weights are not divided; allowed is a copy"
    assert any(problem.startswith(message) for problem in found) != is_allowed


def test_a_quantized_folder_is_not_quantized_again(folders: Path) -> None:
    node = {"_component_": "kdtune.checkpoint.Checkpointer", "checkpoint_dir": str(folders / "quantized")}
    (found,) = problems(config(folders, teacher_checkpointer=node), torch.device("cpu"))
    assert found.startswith("teacher_quantization=int8: ") and "quantized already" in found
    with pytest.raises(CheckpointError, match="quantized already; leave int8 out"):
        Checkpointer(folders / "quantized").load(quantization="int8")
