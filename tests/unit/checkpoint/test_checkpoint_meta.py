"""Meta's .pth files: rows put in order, parts joined, nothing executed."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from checkpoint_samples import LLAMA3_1, assert_same_weights, meta_state, tiny_model, write_meta, write_params

from kdtune.checkpoint import Checkpointer, load_model
from kdtune.errors import CheckpointError
from kdtune.models import Transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_with_rows_in_our_order(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(tie=False, dtype=dtype)
    write_meta(tmp_path, model)
    loaded = load_model(tmp_path)
    assert_same_weights(loaded, model)
    assert Checkpointer(tmp_path).problems() == []
    assert Checkpointer(tmp_path).model_config().num_kv_heads == 2


def test_llama2_leaves_the_vocabulary_to_the_embeddings(tmp_path: Path) -> None:
    write_meta(tmp_path, tiny_model(tie=False), vocab_size=-1)
    assert_same_weights(load_model(tmp_path), tiny_model(tie=False))


def test_scaled_rope(tmp_path: Path) -> None:
    write_meta(tmp_path, tiny_model(tie=False), use_scaled_rope=True)
    assert load_model(tmp_path).config.rope_scaling == LLAMA3_1
    with pytest.raises(CheckpointError, match="rope_scaling=None, stored RopeScaling"):
        Checkpointer(tmp_path).load(tiny_model(tie=False))


def test_a_given_model_says_what_params_json_does_not(tmp_path: Path) -> None:
    """Llama 3.2 1B is tied, its file holds the head all the same, and its RoPE factor is 32."""
    tied = tiny_model()
    write_meta(tmp_path, tied, use_scaled_rope=True)
    model = tiny_model(seed=1, scaling=type(LLAMA3_1)(32.0, 1.0, 4.0, 8192))
    Checkpointer(tmp_path).load(model)
    assert_same_weights(model, tied)
    assert model.output.weight is model.tok_embeddings.weight
    write_meta(tmp_path, tiny_model(tie=False), use_scaled_rope=True)
    with pytest.raises(CheckpointError, match=r"'output.weight': differs from the embedding"):
        Checkpointer(tmp_path).load(model)


def test_head_absent_means_tied(tmp_path: Path) -> None:
    write_params(tmp_path, tiny_model())
    state = meta_state(tiny_model())
    del state["output.weight"]
    torch.save(state, tmp_path / "consolidated.00.pth")
    assert_same_weights(load_model(tmp_path), tiny_model())


@pytest.mark.parametrize("embedding_dim", [0, 1], ids=["llama3", "llama2"])
def test_model_parallel_parts_are_joined(tmp_path: Path, embedding_dim: int) -> None:
    model = tiny_model(tie=False)
    dims = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": embedding_dim}
    for part in range(2):
        state = {}
        for name, tensor in meta_state(model).items():
            dim = dims.get(name.split(".")[-2])
            state[name] = tensor if dim is None else tensor.chunk(2, dim)[part].clone()
        torch.save(state, tmp_path / f"consolidated.{part:02}.pth")
    write_params(tmp_path, model)
    assert_same_weights(load_model(tmp_path), model)
    files = ["consolidated.00.pth", "consolidated.01.pth"]
    assert_same_weights(Checkpointer(tmp_path, files).load(), model)

    state["layers.0.attention.wq.weight"] = torch.zeros(7, 32)
    torch.save(state, tmp_path / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"'layers.0.attention.wq.weight': shape .* do not join to \[32, 32\]"):
        load_model(tmp_path)
    del state["layers.0.attention.wq.weight"]
    torch.save(state, tmp_path / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated.01.pth: tensor 'layers.0.attention.wq.weight': only in"):
        load_model(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth: missing" in Checkpointer(tmp_path, files).problems()[0]


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["zip", "old"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / "consolidated.00.pth"
    write_params(tmp_path, tiny_model())
    if how == "zip":
        torch.save({"norm.weight": Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"norm.weight": Bomb(mark)}))
    for check in (load_model, lambda folder: Checkpointer(folder).model_config()):
        with pytest.raises(CheckpointError, match=r"consolidated.00.pth: .*safetensors|not a whole .pth"):
            check(tmp_path)
    assert len(Checkpointer(tmp_path).problems()) == 1
    assert not mark.exists()


def test_damaged_files(tmp_path: Path) -> None:
    write_meta(tmp_path, tiny_model(tie=False))
    file = tmp_path / "consolidated.00.pth"
    content = file.read_bytes()
    for keep in (0, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match=r"consolidated.00.pth: "):
            load_model(tmp_path)
    torch.save([torch.ones(1)], file)
    with pytest.raises(CheckpointError, match="holds no dictionary of tensors"):
        load_model(tmp_path)
    file.write_bytes(content)
    (tmp_path / "params.json").unlink()
    assert Checkpointer(tmp_path).problems() == [f"{tmp_path / 'params.json'}: missing; download it again"]


def test_params_that_do_not_fit(tmp_path: Path) -> None:
    model: Transformer = tiny_model(tie=False)
    write_meta(tmp_path, model, n_layers=3)
    with pytest.raises(CheckpointError, match=r"9 tensors .* missing"):
        load_model(tmp_path)
    write_meta(tmp_path, model, surprise=1)
    with pytest.raises(CheckpointError, match=r"params.json: unsupported settings \['surprise'\]"):
        load_model(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps({"dim": 32}))
    with pytest.raises(CheckpointError, match=r"params.json: n_heads is missing"):
        load_model(tmp_path)
