"""Folders and files that no one's tools write, but anyone's can hold: one message each, with nothing built or filled by it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import LLAMA3_1, assert_same_weights, tiny_model
from safetensors.torch import load_file
from test_checkpoint_huggingface import INDEX, change_json, refused

from kdtune.checkpoint import Checkpointer, load_model, save_model, write_quantized
from kdtune.errors import CheckpointError, ConfigError
from kdtune.models import Transformer, TransformerConfig, llama, weight_shapes
from kdtune.models.quantization import quantize

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tie", [True, False])
def test_weight_shapes_are_those_of_the_model(tie: bool) -> None:
    for model in (tiny_model(tie=tie), llama(vocab_size=11, embed_dim=12, num_layers=3, num_heads=6, num_kv_heads=2,
                                             head_dim=4, intermediate_dim=7, tie_embeddings=tie)):  # fmt: skip
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert list(weight_shapes(model.config).items()) == list(expected.items())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_hidden_layers": 9_999}, "the config describes 9999 layers, the files hold "),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000: must be above 0 and at most 10000"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers=1000"),
        ({"head_dim": 60_000}, "[240000, 32] expected (as 'layers.0.attn.q_proj.weight')"),
        ({"head_dim": 2 * 10**8}, "head_dim=200000000: must be above 0 and at most 65536"),
        ({"hidden_size": 2**28, "head_dim": 8}, "[96, 268435456] expected"),
        ({"vocab_size": 2**40}, "vocab_size=1099511627776: must be above 0 and at most 268435456"),
        ({"vocab_size": 2**28}, "[268435456, 32] expected"),
        ({"intermediate_size": 2**63}, "intermediate_dim=9223372036854775808: must be above 0"),
        ({"num_attention_heads": 2**28, "num_key_value_heads": 1, "head_dim": 65_536}, "expected (as 'layers.0.attn.q_proj"),
        ({"max_position_embeddings": 10**18}, "max_seq_len=1000000000000000000: must be above 0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf; want a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; want a positive number"),
        ({"rope_parameters": None, "rope_theta": 10**400}, "rope_theta=1000"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 4.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "low_freq_factor=4.0 and high_freq_factor=4.0"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": float("inf")}}, "embeddings=inf; want a positive"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'; want true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=None; want true or false"),
    ],
)  # fmt: skip
def test_sizes_that_are_none(
    folder: Path, setting: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared with what the files hold before anything is built by them."""

    def build(*_: object) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(Transformer, "__init__", build)
    change_json(folder / "config.json", **setting)
    refused(folder, message)
    with pytest.raises(CheckpointError):
        Checkpointer(folder).model_config()


def test_quantized_folders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(vocab_size=64, embed_dim=64, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=64)
    quantize(model, "int8_weight_only")
    write_quantized(model, Path(tmp_path), scheme="int8_weight_only")
    monkeypatch.setattr(Transformer, "__init__", None)
    change_json(tmp_path / "config.json", num_hidden_layers=9_999)
    refused(tmp_path, "the config describes 9999 layers, the files hold ")
    with pytest.raises(CheckpointError, match="describes 9999 layers"):
        Checkpointer(tmp_path).model_config()


@pytest.mark.parametrize("size", ["num_layers", "vocab_size", "head_dim", "embed_dim", "intermediate_dim", "num_heads"])
def test_a_builder_has_limits_too(size: str) -> None:
    sizes = {"vocab_size": 64, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "intermediate_dim": 64, "head_dim": 8}
    with torch.device("meta"), pytest.raises(ConfigError, match=f"{size}=1000000000: must be above 0 and at most"):
        llama(**{**sizes, "num_kv_heads": 1, size: 10**9})


def test_the_published_sizes_are_far_from_the_limits() -> None:
    with torch.device("meta"):
        TransformerConfig(
            vocab_size=2**20, embed_dim=2**17, num_layers=1000, num_heads=2**10, num_kv_heads=8, head_dim=2**10,
            intermediate_dim=2**20, max_seq_len=2**30, norm_eps=1e-12, rope_base=1e12, rope_scaling=LLAMA3_1,
            tie_embeddings=False,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "is nested too deeply"), ("[" * 100_000, "is nested too deeply"), ("9" * 5000, "is not JSON"),
        ("", "is not JSON"), ("null", "holds a NoneType"), ('"text"', "holds a str"), (b"\xff\xfe{", "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_json_that_is_none(folder: Path, name: str, text: str | bytes, message: str) -> None:
    if name == INDEX:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    refused(folder, f"{folder / name}: {message}")


def test_a_byte_order_mark_is_harmless(folder: Path) -> None:
    for file in folder.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert_same_weights(load_model(folder), tiny_model())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("weights.bin", "pickled weights are not loaded"), ("pytorch_model.pt", "pickled weights are not loaded"),
        ("..", "the name of a .safetensors file in this folder"), (".", "the name of a"), ("", "the name of a"),
        ("../model.safetensors", "the name of a"), ("/etc/passwd", "the name of a"), ("a/b.safetensors", "the name of a"),
        (None, "the name of a"), (["a.safetensors"], "the name of a"), ("weights", "the name of a"),
        ("a\0.safetensors", "missing; download it again"), ("x" * 300 + ".safetensors", "missing; download it again"),
    ],
)  # fmt: skip
def test_an_index_that_names_what_is_no_weights(folder: Path, file: object, message: str) -> None:
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(CheckpointError, match="(?s)" + message):
        load_model(folder)
    assert any(message in problem for problem in Checkpointer(folder).problems())


def file_of(header: Any, num_bytes: int = 4096) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def entry(shape: object = (32,), dtype: object = "F32", offsets: object = (0, 128)) -> dict[str, Any]:
    return {"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 7, struct.pack("<Q", 10**9) + b"{}", struct.pack("<Q", 2**63) + b"{}", b"\xff" * 64,
        file_of(b"{"), file_of(b"[]"), file_of(b"null"), file_of(DEEP.encode()), file_of(b"\xff\xfe"), file_of({}),
        file_of(entry(shape=[-32])), file_of(entry(shape=[2**62, 2**62])), file_of(entry(shape="32")), file_of(entry(shape=None)),
        file_of(entry(shape=[33])), file_of(entry(dtype="F99")), file_of(entry(dtype=None)), file_of(entry(dtype="BOOL")),
        file_of(entry(offsets=[0, 10**9])), file_of(entry(offsets=[128, 0])), file_of(entry(offsets=[-1, 127])),
        file_of(entry(offsets=[])), file_of({"model.norm.weight": 5}), file_of({"model.norm.weight": None}),
        file_of({"__metadata__": {"a": 5}}), file_of(entry() | {"b": entry()["model.norm.weight"]}),
        file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
        file_of(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', 1),
        file_of(b'{"a":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}', 2),
    ],
    ids=range(30),
)  # fmt: skip
def test_headers_that_are_none(folder: Path, content: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 1000
    assert len(Checkpointer(folder).problems()) == 1


def test_files_cut_off_or_damaged_anywhere(folder: Path) -> None:
    """Every file of the folder, at places spread over it: loaded as it was, or refused by its name."""
    expected = tiny_model()
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        generator = torch.Generator().manual_seed(len(whole))
        places = torch.randint(len(whole), (12,), generator=generator).tolist()
        for at in places:
            for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]):
                file.write_bytes(damaged)
                try:
                    loaded = load_model(folder)
                except CheckpointError as error:
                    assert str(folder) in str(error)
                else:
                    assert loaded.state_dict().keys() == expected.state_dict().keys()
        file.write_bytes(whole)
    assert len(load_file(folder / "model.safetensors")) == len(expected.state_dict()) - 1
