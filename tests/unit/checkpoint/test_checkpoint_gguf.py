"""GGUF in: dequantized, q and k put in order, and damaged files told from whole ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_samples import LLAMA3_1, assert_same_weights, tiny_model, write_gguf
from gguf import GGMLQuantizationType, GGUFReader

from kdtune.checkpoint import Checkpointer, gguf, load_model
from kdtune.errors import CheckpointError
from kdtune.gguf_file import read_gguf
from kdtune.models.rope import inverse_frequencies


@pytest.mark.parametrize("tie", [True, False])
def test_unquantized_is_bit_exact(tmp_path: Path, tie: bool) -> None:
    model = tiny_model(tie=tie)
    write_gguf(tmp_path / "m.gguf", model)
    for place in (tmp_path, tmp_path / "m.gguf"):
        loaded = load_model(place)
        assert_same_weights(loaded, model)
        # 1e-5 is stored as the 32-bit float 9.9999997e-06.
        assert loaded.config == model.config
        assert Checkpointer(place).problems() == []
    assert Checkpointer(tmp_path, ["m.gguf"]).model_config() == model.config


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantized_blocks(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A few rows at a time, and not a divisor of the number of rows.
    monkeypatch.setattr(gguf, "_PIECE_BYTES", 7 * 32 * 4)
    expected = write_gguf(tmp_path / "m.gguf", tiny_model(), kind=GGMLQuantizationType[kind])
    loaded = load_model(tmp_path, dtype=torch.float32).state_dict()
    assert expected.keys() == loaded.keys() - {"output.weight"}
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert load_model(tmp_path).tok_embeddings.weight.dtype == stored


def test_llama3_1_frequencies_come_from_the_factors(tmp_path: Path) -> None:
    model = tiny_model(scaling=LLAMA3_1, rope_base=500_000.0)
    plain = inverse_frequencies(8, 500_000.0, None)
    factors = (plain / inverse_frequencies(8, 500_000.0, LLAMA3_1)).numpy()
    write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors})
    assert load_model(tmp_path).config == model.config
    assert_same_weights(load_model(tmp_path), model)
    write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(
        CheckpointError, match=r"m.gguf: .*rope_freqs.weight is not the frequency scaling that config.json calls llama3"
    ):
        load_model(tmp_path)


def test_a_file_without_vocabulary(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model(), vocabulary=False)
    assert load_model(tmp_path).config == tiny_model().config


def test_every_truncation_is_an_error_and_none_crashes(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_model())
    content = file.read_bytes()
    for keep in (0, 3, 4, 10, 24, 30, 100, 500, 1500, 3000, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match=r"m.gguf: "):
            load_model(tmp_path)
        assert len(Checkpointer(tmp_path).problems()) == 1


def test_garbage_in_the_header_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_model())
    content = file.read_bytes()
    for start in (0, 4, 8, 16, 24):
        file.write_bytes(content[:start] + b"\xfe" * 8 + content[start + 8 :])
        with pytest.raises(CheckpointError, match=r"m.gguf: "):
            load_model(tmp_path)


def test_other_architectures_and_tensors_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model(), architecture="cohere")
    with pytest.raises(CheckpointError, match=r"m.gguf: .*general.architecture='cohere'; want 'llama'"):
        load_model(tmp_path)
    write_gguf(tmp_path / "m.gguf", tiny_model(), extra={"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    with pytest.raises(CheckpointError, match=r"m.gguf: .*blk.0.attn_q.bias"):
        load_model(tmp_path)


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_model(), kind=GGMLQuantizationType.Q8_0)
    header, expected = read_gguf(file), GGUFReader(file)
    metadata = {name: field.contents() for name, field in expected.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == metadata
    tensors = {t.name: (tuple(t.shape.tolist()[::-1]), t.tensor_type, t.data_offset) for t in expected.tensors}
    assert header.tensors == tensors


def test_two_files_need_a_choice(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_model())
    write_gguf(tmp_path / "b.gguf", tiny_model(seed=1))
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a.gguf, b.gguf\); name one in checkpoint_files"):
        load_model(tmp_path)
    assert_same_weights(Checkpointer(tmp_path, ["b.gguf"]).load(), tiny_model(seed=1))
    assert_same_weights(load_model(tmp_path / "a.gguf"), tiny_model())


def test_parts_of_a_split_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter

    writer_close = GGUFWriter.write_header_to_file

    def with_split(self: GGUFWriter, *args: object) -> None:
        self.add_uint16("split.count", 3)
        writer_close(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(GGUFWriter, "write_header_to_file", with_split)
    write_gguf(tmp_path / "m-00001-of-00003.gguf", tiny_model())
    with pytest.raises(CheckpointError, match=r"split.count=3: one part of a split model; join the parts"):
        load_model(tmp_path)
