"""Safetensors in: whole, sharded, tied or not, and every way in which a folder can be wrong."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_samples import LLAMA3_1, assert_same_weights, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdtune.checkpoint import Checkpointer, load_model, save_model
from kdtune.errors import CheckpointError, ConfigError
from kdtune.models import Transformer

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(tiny_model(tie=False), tmp_path / "sharded", max_shard_bytes=30_000)
    return tmp_path / "sharded"


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder: Path, *parts: str, model: Transformer | None = None) -> None:
    """Loading says all of it, and `problems` says the same without loading (where no model is given)."""
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(folder).load(model)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    if model is None:
        assert Checkpointer(folder).problems() == [str(caught.value)]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_what_was_saved_bit_for_bit(tmp_path: Path, tie: bool, dtype: torch.dtype) -> None:
    model = tiny_model(tie=tie, dtype=dtype, scaling=None if tie else LLAMA3_1)
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tie
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded(tokens), model(tokens))


def test_sharded_equals_single(sharded: Path, tmp_path: Path) -> None:
    assert len(list(sharded.glob("model-0000*-of-0000*.safetensors"))) > 2
    assert_same_weights(load_model(sharded), tiny_model(tie=False))
    # The files may be named too, in any order; without the index as well.
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    (sharded / INDEX).rename(tmp_path / "elsewhere")
    assert_same_weights(Checkpointer(sharded, files[::-1]).load(), tiny_model(tie=False))
    refused(sharded, files[0], INDEX, "checkpoint_files")


def test_dtype_is_converted_per_tensor(folder: Path) -> None:
    loaded = load_model(folder, dtype=torch.bfloat16)
    assert_same_weights(loaded, tiny_model().to(torch.bfloat16))


def test_as_stored_means_as_most_of_the_weights(folder: Path) -> None:
    def lower_matrices(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.ndim == 2}

    change_weights(folder, lower_matrices)
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.bfloat16}


def test_given_models_are_filled_in_place(folder: Path) -> None:
    with torch.device("meta"):
        meta = tiny_model_on_meta()
    assert Checkpointer(folder).load(meta) is meta
    assert_same_weights(meta, tiny_model())
    other = tiny_model(seed=1)
    parameters = list(other.parameters())
    other.layers[0].attn.q_proj.weight.requires_grad_(False)
    assert Checkpointer(folder).load(other) is other
    assert_same_weights(other, tiny_model())
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    assert not other.layers[0].attn.q_proj.weight.requires_grad


def tiny_model_on_meta() -> Transformer:
    return Transformer(tiny_model().config)


def test_given_model_must_be_the_folders(folder: Path) -> None:
    refused(folder, str(folder), "rope_base=5000.0, stored 10000.0", model=tiny_model(rope_base=5000.0))
    refused(folder, "num_layers=3, stored 2", model=tiny_model(layers=3))
    # A shorter context is no other model.
    shorter = Transformer(type(tiny_model().config)(**{**vars(tiny_model().config), "max_seq_len": 8}))
    Checkpointer(folder).load(shorter)
    assert shorter.config.max_seq_len == 8


def test_model_config_reads_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr("kdtune.checkpoint.huggingface._read", read)
    assert Checkpointer(folder).model_config() == tiny_model().config
    (folder / "model.safetensors").unlink()
    assert Checkpointer(folder, ["model.safetensors"]).model_config() == tiny_model().config


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_extra_rotary_frequencies_are_ignored(folder: Path, name: str) -> None:
    change_weights(folder, lambda t: t.update({name: torch.ones(4)}))
    assert_same_weights(load_model(folder), tiny_model())


def without_prefix(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("architectures", [["LlamaModel"], ["LlamaForCausalLM"]])
def test_weights_saved_from_the_model_without_a_head(folder: Path, architectures: list[str]) -> None:
    """transformers' LlamaModel leaves the part before the layers out of the names."""
    change_json(folder / "config.json", architectures=architectures)
    change_weights(folder, without_prefix)
    change_weights(folder, lambda t: t.update({"rotary_emb.inv_freq": torch.ones(4)}))
    assert_same_weights(load_model(folder), tiny_model())
    change_weights(folder, lambda t: t.pop("layers.1.self_attn.q_proj.weight"))
    refused(folder, "tensor 'layers.1.self_attn.q_proj.weight' missing")


def test_an_untied_head_that_is_missing(tmp_path: Path) -> None:
    model = tiny_model(tie=False)
    save_model(model, tmp_path / "m")
    change_weights(tmp_path / "m", without_prefix)
    assert_same_weights(load_model(tmp_path / "m"), model)
    change_weights(tmp_path / "m", lambda t: t.pop("lm_head.weight"))
    refused(tmp_path / "m", "tensor 'lm_head.weight' missing", "from LlamaForCausalLM (LlamaModel has no head)")


def test_tied_head_in_the_file(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same_weights(load_model(folder), tiny_model())
    change_weights(folder, lambda t: t["lm_head.weight"][3, 4].add_(0.1))
    with pytest.raises(
        CheckpointError, match=r"'lm_head.weight': differs from the embedding .*tie_word_embeddings: true"
    ):
        load_model(folder)


def test_untied_head_missing(tmp_path: Path) -> None:
    save_model(tiny_model(tie=False), tmp_path / "m")
    change_weights(tmp_path / "m", lambda t: t.pop("lm_head.weight"))
    refused(tmp_path / "m", "tensor 'lm_head.weight' missing, shape [96, 32] expected", "tie_word_embeddings: true")


def test_missing_tensor(folder: Path) -> None:
    change_weights(folder, lambda t: t.pop(Q_PROJ))
    refused(folder, str(folder), f"tensor '{Q_PROJ}' missing, shape [32, 32] expected")


def test_unexpected_tensors(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    refused(folder, "model.safetensors", "model.layers.0.self_attn.q_proj.bias")
    change_weights(folder, lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"))
    change_weights(folder, lambda t: t.update({"model.layers.7.input_layernorm.weight": torch.zeros(32)}))
    refused(folder, "model.safetensors: tensor 'model.layers.7.input_layernorm.weight': unexpected", "[32] found")


def test_wrong_shape(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({Q_PROJ: torch.zeros(16, 32)}))
    refused(folder, f"model.safetensors: tensor '{Q_PROJ}': shape [16, 32] found, [32, 32] expected")


def test_wrong_kind_of_dtype(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)}))
    refused(folder, f"tensor '{Q_PROJ}': dtype int8 found; float32, float16, bfloat16 or float64 expected")
    change_weights(folder, lambda t: t.update({Q_PROJ: torch.zeros(32, 32).to(torch.float8_e4m3fn)}))
    refused(folder, f"tensor '{Q_PROJ}': dtype float8_e4m3fn found")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    refused(folder, f"{file}: not a whole safetensors file", "cut off or corrupt")


def test_corrupt_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:40] = b"\xff" * 20
    file.write_bytes(content)
    refused(folder, str(file), "cut off or corrupt")


def test_sharded_folder_with_a_file_missing(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    for file in files[1:]:
        file.unlink()
    with pytest.raises(CheckpointError, match=f"{files[1].name}: missing"):
        load_model(sharded)
    assert Checkpointer(sharded).problems() == [f"{file}: missing; download it again" for file in files[1:]]


def test_index_that_does_not_fit_the_files(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    good = index["weight_map"]
    files = sorted(set(good.values()))
    moved = next(name for name, file in good.items() if file == files[0])
    change_json(sharded / INDEX, weight_map={**good, moved: files[1]})
    refused(sharded, f"{files[1]}: tensor '{moved}' is not in it", f"lies in {files[0]}")
    change_json(sharded / INDEX, weight_map={**good, "model.layers.9.input_layernorm.weight": files[1]})
    refused(sharded, files[1], "model.layers.9.input_layernorm.weight", "no file holds it")
    change_json(sharded / INDEX, weight_map={name: file for name, file in good.items() if name != moved})
    refused(sharded, f"{files[0]}: tensor '{moved}'", "not listed")
    for bad in ({**good, moved: "../secret.safetensors"}, {**good, moved: 3}, {}, [1]):
        change_json(sharded / INDEX, weight_map=bad)
        refused(sharded, INDEX)
    (sharded / INDEX).write_text('{"weight_map": {')
    refused(sharded, f"{INDEX}: is not JSON")


def test_two_files_with_the_same_tensor(sharded: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    save_file(load_file(sharded / files[0]), sharded / "again.safetensors")
    with pytest.raises(CheckpointError, match=f"also in .*{files[0]}|also in again.safetensors"):
        Checkpointer(sharded, [*files, "again.safetensors"]).load()


def test_config_missing_or_unreadable(folder: Path) -> None:
    config = folder / "config.json"
    text = config.read_text()
    config.unlink()
    assert Checkpointer(folder).problems() == [f"{config}: missing; download it again"]
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        load_model(folder)
    config.write_text(text[:-10])
    refused(folder, f"{config}: is not JSON")
    config.write_text("[1]")
    refused(folder, f"{config}: holds a list")
    config.write_text(text)
    change_json(config, attention_bias=True)
    refused(folder, f"{config}: attention_bias=True is not supported")


def test_weights_of_another_size_than_the_config(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=3)
    refused(folder, "9 tensors (first: 'model.layers.2.input_layernorm.weight') missing, shape [32] expected")
    change_json(folder / "config.json", num_hidden_layers=1)
    refused(folder, "unexpected (9 such)")


def test_folders_without_weights(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "missing: no such folder")
    refused(tmp_path, "no weights found; model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({}))
    refused(tmp_path, f"{tmp_path / name}: pickled weights are not loaded", "safetensors", "save_pretrained")
    if not name.endswith(".json"):
        with pytest.raises(CheckpointError, match="can run code"):
            Checkpointer(tmp_path, [name]).load()


def test_checkpoint_files_that_cannot_be(folder: Path) -> None:
    assert Checkpointer(folder, ["no.safetensors"]).problems() == [
        f"{folder / 'no.safetensors'}: missing; download it again"
    ]
    for files in (["model.safetensors", "x.gguf"], ["config.json"], ["a.gguf", "b.gguf"]):
        with pytest.raises(CheckpointError, match="checkpoint_files="):
            Checkpointer(folder, files).load()
    bad: list[object] = ["model.safetensors", {"filename_format": "a"}, []]
    for value in bad:
        with pytest.raises((CheckpointError, ConfigError), match=r"checkpoint_files=.*a list of file names expected"):
            Checkpointer(folder, value)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is a file, and checkpoint_files"):
        Checkpointer(folder / "model.safetensors", ["model.safetensors"])
    assert_same_weights(load_model(folder / "model.safetensors"), tiny_model())
