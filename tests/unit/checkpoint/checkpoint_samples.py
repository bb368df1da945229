"""Tiny models and the files of other formats, made here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from torch import Tensor

from kdtune.checkpoint.atomic import atomic_folder
from kdtune.checkpoint.state import state_writer
from kdtune.models import RopeScaling, Transformer, llama

LLAMA3_1 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


def tiny_model(
    *,
    tie: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    vocab: int = 96,
    scaling: RopeScaling | None = None,
    rope_base: float = 10_000.0,
) -> Transformer:
    """4 heads on 2 kv heads of 8: q and k are permuted differently."""
    torch.manual_seed(seed)
    model = llama(
        vocab_size=vocab,
        embed_dim=32,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        intermediate_dim=64,
        max_seq_len=64,
        tie_embeddings=tie,
        rope_scaling=scaling,
        rope_base=rope_base,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1))
    return model.to(dtype)


def assert_same_weights(found: Transformer, expected: Transformer) -> None:
    """Equal names, dtypes and bits."""
    theirs, ours = found.state_dict(), expected.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head in Meta's order: row 2i from half-split row i, row 2i + 1 from row i + half. Written as a loop."""
    head_dim = len(weight) // heads
    result = torch.empty_like(weight)
    for head in range(heads):
        for i in range(head_dim // 2):
            result[head * head_dim + 2 * i] = weight[head * head_dim + i]
            result[head * head_dim + 2 * i + 1] = weight[head * head_dim + i + head_dim // 2]
    return result


_META_PARTS = {
    "attn_norm": "attention_norm",
    "attn.q_proj": "attention.wq",
    "attn.k_proj": "attention.wk",
    "attn.v_proj": "attention.wv",
    "attn.output_proj": "attention.wo",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_GGUF_PARTS = {
    "attn_norm": "attn_norm",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.output_proj": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
}


def meta_state(model: Transformer) -> dict[str, Tensor]:
    """The weights as Meta names and orders them."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("layers."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            name = f"layers.{layer}.{_META_PARTS[part]}.weight"
        state[name] = _permuted(name, tensor, "wq", "wk")
    return state


def _permuted(name: str, tensor: Tensor, query: str, key: str) -> Tensor:
    if f"{query}." in name:
        return interleaved(tensor, 4)
    return interleaved(tensor, 2) if f"{key}." in name else tensor.clone()


def write_meta(folder: Path, model: Transformer, **params: object) -> None:
    """consolidated.00.pth and params.json, with the rotary table that old files carry."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**meta_state(model), "rope.freqs": torch.ones(4)}, folder / "consolidated.00.pth")
    write_params(folder, model, **params)


def write_params(folder: Path, model: Transformer, **params: object) -> None:
    config = model.config
    values = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 64,
        "ffn_dim_multiplier": 0.7,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
    }
    (folder / "params.json").write_text(json.dumps({**values, **params}))


def write_gguf(
    file: Path,
    model: Transformer,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
    vocabulary: bool = True,
) -> dict[str, Tensor]:
    """Writes the model by the gguf package; returns what each of our tensors was rounded to, in our row order."""
    config = model.config
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
        writer.add_token_types([1] * config.vocab_size)
        writer.add_token_merges(["a b", "c d"])
    rounded = {}
    for name, tensor in model.state_dict().items():
        if config.tie_embeddings and name == "output.weight":
            continue
        theirs = {
            "tok_embeddings.weight": "token_embd.weight",
            "norm.weight": "output_norm.weight",
            "output.weight": "output.weight",
        }
        if name.startswith("layers."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            theirs[name] = f"blk.{layer}.{_GGUF_PARTS[part]}.weight"
        values = _permuted(theirs[name], tensor, "attn_q", "attn_k").float().numpy()
        if tensor.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(theirs[name], values)
            rounded[name] = tensor.float()
        else:
            packed = quantize(values, kind)
            writer.add_tensor(theirs[name], packed, raw_dtype=kind)
            rounded[name] = _block_values(_row_order_packed(packed, name), kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def _row_order_packed(packed: np.ndarray, name: str) -> np.ndarray:
    """The packed rows of q and k put back into our order, by looking each row up."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads is None:
        return packed
    order = interleaved(torch.arange(len(packed)).unsqueeze(1), heads).squeeze(1)
    result = np.empty_like(packed)
    result[order.numpy()] = packed
    return result


def _block_values(packed: np.ndarray, kind: GGMLQuantizationType) -> Tensor:
    """Dequantizes Q8_0 and Q4_1 blocks of 32 values, and bf16 and f16, by their definitions."""
    if kind == GGMLQuantizationType.F16:
        return torch.from_numpy(packed.view(np.float16).astype(np.float32))
    if kind == GGMLQuantizationType.BF16:
        bits = packed.view(np.uint16).astype(np.uint32) << 16
        return torch.from_numpy(bits.view(np.float32))
    rows = []
    for row in packed:
        values: list[float] = []
        if kind == GGMLQuantizationType.Q8_0:
            for block in row.reshape(-1, 34):
                scale = float(block[:2].view(np.float16)[0])
                values += [scale * int(one) for one in block[2:].view(np.int8)]
        else:
            assert kind == GGMLQuantizationType.Q4_1
            for block in row.reshape(-1, 20):
                scale, least = (float(one) for one in block[:4].view(np.float16))
                values += [scale * int(one & 15) + least for one in block[4:]]
                values += [scale * int(one >> 4) + least for one in block[4:]]
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float32)


def save_state(folder: Path, **state: Any) -> None:
    """Write a resume state without the model that a step folder has beside it."""
    with atomic_folder(folder) as hidden:
        state_writer(**state)(hidden, None)
