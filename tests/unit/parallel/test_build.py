"""A model is built in one order, from objects."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kdtune.checkpoint import Checkpointer, save_model
from kdtune.distributed import SINGLE_PROCESS, Parallelism
from kdtune.errors import ConfigError
from kdtune.models import Transformer, apply_lora, has_adapters, llama
from kdtune.parallel import build_model, meta_model, model_config

SIZES = {"vocab_size": 96, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "intermediate_dim": 64, "max_seq_len": 64}
builder = partial(llama, **SIZES, tie_embeddings=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(builder(), tmp_path / "model")
    return tmp_path / "model"


def test_the_steps_come_in_the_documented_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("build.apply_activation_checkpointing", "build.apply_compile", "tensor_parallel.apply_tensor_parallel",
                 "fsdp.apply_fsdp"):  # fmt: skip
        function = noted(name.partition(".")[2], lambda *args, **kwargs: None)
        monkeypatch.setattr(f"kdtune.parallel.{name}", function)
    monkeypatch.setattr("kdtune.parallel.build.device_mesh", lambda *args: "a mesh")
    monkeypatch.setattr(Checkpointer, "load", noted("weights", Checkpointer.load))
    model = build_model(
        noted("builder", builder), Checkpointer(folder), dtype=torch.float32, adapter=noted("adapter", apply_lora),
        activation_checkpointing=True, compile=True,
    )  # fmt: skip
    assert has_adapters(model) and not any(parameter.is_meta for parameter in model.parameters())
    assert done == ["builder", "adapter", "apply_tensor_parallel", "apply_activation_checkpointing", "apply_compile",
                    "apply_fsdp", "weights"]  # fmt: skip


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_of_the_checkpoints_config_is_what_its_folder_holds(folder: Path, dtype: torch.dtype | None) -> None:
    given, own = (build_model(one, Checkpointer(folder), dtype=dtype, trainable=False) for one in (builder, None))
    expected = Checkpointer(folder).load(dtype=dtype)
    for model in (given, own):
        for (name, found), (_, stored) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
            assert found.dtype == (dtype or torch.float32) and torch.equal(found, stored), name
            assert not found.requires_grad


def test_random_weights_are_drawn_in_fp32_and_adapters_in_the_models_dtype() -> None:
    torch.manual_seed(0)
    drawn = builder().to(torch.bfloat16)
    expected = apply_lora(drawn).state_dict()
    torch.manual_seed(0)
    found = build_model(builder, None, dtype=torch.bfloat16, adapter=apply_lora).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_a_model_will_be_is_known_without_weights(folder: Path) -> None:
    assert model_config(builder, None) == model_config(None, Checkpointer(folder)) == builder().config
    model = meta_model(None, Checkpointer(folder), adapter=apply_lora, dtype=torch.bfloat16)
    assert isinstance(model, Transformer) and has_adapters(model)
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    "build", [partial(build_model, dtype=None), partial(meta_model, dtype=torch.float32), model_config]
)
def test_a_model_of_nothing_is_refused(build: Any) -> None:
    with pytest.raises(ConfigError, match="neither a builder nor a checkpointer is given; set one of them"):
        build(None, None)


def test_sizes_that_do_not_fit_the_processes_are_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointer, "load", lambda *args, **kwargs: pytest.fail("a weight was read"))
    with pytest.raises(ConfigError, match="dp_replicate=1 dp_shard=2 tp=1: needs 2 processes, found 1"):
        build_model(
            None, Checkpointer(folder), dtype=torch.float32, world=SINGLE_PROCESS, parallelism=Parallelism(dp_shard=2)
        )
