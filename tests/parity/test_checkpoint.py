"""Checkpoints against transformers: what it reads of ours, and what we read of its own and of the real SmolLM2."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdtune import tokenizers
from kdtune.checkpoint import load_model, save_model
from kdtune.models import RopeScaling, Transformer, llama

transformers = pytest.importorskip("transformers")

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "Once upon a time there was a small teapot that wanted to be a ship.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144",
    "Die Würde des Menschen ist unantastbar.",
    "今日はとても良い天気ですね。",
    "¿Dónde está la biblioteca?",
    "Water boils at 100 °C at sea level; at 3000 m it boils at about 90 °C.",
    "SELECT name, COUNT(*) FROM users GROUP BY name HAVING COUNT(*) > 1;",
    "🙂 emoji 🚀 and   several    spaces\t\ttabs",
    "To make tea, first heat the water. Then add the leaves and wait for four minutes.",
    "If all bloops are razzies and all razzies are lazzies, then all bloops are lazzies.",
    "Привет, как дела?",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "A",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"b\"}}",
    "<|im_start|>user\nHello<|im_end|>\n",
    "In 1969 two people walked on the Moon for the first time.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen.",
    "\n\n# Title\n\n- first\n- second\n\n> quote\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> tuple[Transformer, Any, list[Tensor]]:
    """Our SmolLM2, transformers' own reading of the same file, and the texts' ids."""
    file = next(smollm2_gguf.glob("*.gguf"))
    model = load_model(smollm2_gguf, dtype=torch.float32).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2_gguf, gguf_file=file.name, dtype=torch.float32)
    tokenizer = tokenizers.load(file)
    ids = [torch.tensor([tokenizer.encode(text, add_eos=False)]) for text in TEXTS]
    return model, theirs.eval(), ids


@pytest.mark.real
def test_real_smollm2_has_transformers_logits(real: tuple[Transformer, Any, list[Tensor]]) -> None:
    model, theirs, ids = real
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.norm_eps == 1e-5 and model.config.tie_embeddings
    differences = []
    with torch.inference_mode():
        for tokens_BS in ids:
            ours, expected = model(tokens_BS), theirs(tokens_BS).logits
            difference = (ours - expected).abs().max().item()
            # Compared here, one by one: max() over the list would pass over a NaN.
            assert difference < 1e-3 and expected.std() > 1
            assert torch.equal(ours.argmax(-1), expected.argmax(-1))
            differences.append(difference)
        # Zero is possible (on one thread both do the same operations), so show that the comparison sees a small change.
        weight = model.layers[10].attn.q_proj.weight
        before = weight.clone()
        weight[5] *= 1.5
        changed = (model(ids[0]) - theirs(ids[0]).logits).abs().max().item()
        weight.copy_(before)
    print(f"max abs difference over {len(ids)} texts: {max(differences):.1e}; with one row of q changed: {changed:.1e}")
    assert changed > 1e-3


@pytest.mark.real
def test_real_smollm2_dequantizes_to_transformers_weights(real: tuple[Transformer, Any, list[Tensor]]) -> None:
    model, theirs, _ = real
    expected = theirs.state_dict()
    assert torch.equal(model.tok_embeddings.weight, expected["model.embed_tokens.weight"])
    for layer in (0, 13, 29):
        attn, reference = model.layers[layer].attn, f"model.layers.{layer}.self_attn"
        assert torch.equal(attn.q_proj.weight, expected[f"{reference}.q_proj.weight"])
        assert torch.equal(attn.k_proj.weight, expected[f"{reference}.k_proj.weight"])
        assert torch.equal(
            model.layers[layer].mlp.down_proj.weight, expected[f"model.layers.{layer}.mlp.down_proj.weight"]
        )


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_smollm2_written_out_is_a_transformers_folder(
    real: tuple[Transformer, Any, list[Tensor]], smollm2_gguf: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """With the tokenizer and terms of the base: everything a user needs to hand the folder on."""
    model, _, ids = real
    ours = load_model(smollm2_gguf, dtype=dtype) if dtype != torch.float32 else model
    tokenizer = tokenizers.load(smollm2_gguf)
    save_model(ours, tmp_path / "out", base=smollm2_gguf, tokenizer=tokenizer)
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (smollm2_gguf / "LICENSE").read_bytes()
    theirs = load_in_transformers(tmp_path / "out", ours)
    if dtype == torch.float32:
        with torch.inference_mode():
            assert (theirs(ids[0]).logits - ours(ids[0])).abs().max() < 1e-3
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        plain = reread.encode(text, split_special_tokens=True, add_special_tokens=False)
        assert plain == tokenizer.encode(text, add_bos=False, add_eos=False)
    ids_out = theirs.generate(ids[0], max_new_tokens=2, do_sample=False)
    assert ids_out.shape[1] > ids[0].shape[1]
    assert theirs.generation_config.eos_token_id in (tokenizer.eos_id, sorted(tokenizer.stop_ids))


def load_in_transformers(folder: Path, ours: Transformer) -> Any:
    """Loaded as a user would, with no key missing, left over or of another shape, and the bits equal to ours."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert theirs.dtype == ours.tok_embeddings.weight.dtype
    state, expected = theirs.state_dict(), ours.state_dict()
    assert len(state) == len(expected)
    for name, tensor in expected.items():
        other = state[hf_name(name)]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    return theirs.eval()


def hf_name(name: str) -> str:
    """Written apart from kdtune's own map."""
    if name in ("tok_embeddings.weight", "output.weight", "norm.weight"):
        table = {"tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm"}
        return table[name.removesuffix(".weight")] + ".weight"
    for ours, theirs in (
        ("attn_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        ("output_proj", "o_proj"),
        (".attn.", ".self_attn."),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}"


SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)


def tiny(*, tie: bool, scaled: bool, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    return llama(
        vocab_size=96,
        embed_dim=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_dim=56,
        max_seq_len=256,
        rope_base=500_000.0,
        rope_scaling=SCALING if scaled else None,
        tie_embeddings=tie,
    ).to(dtype)


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled rope"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_written_folders_load_in_transformers(
    tmp_path: Path, tie: bool, scaled: bool, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    ours = tiny(tie=tie, scaled=scaled, dtype=dtype)
    save_model(ours, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (max_shard_bytes < 2**30)
    theirs = load_in_transformers(tmp_path / "m", ours)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tie
    tokens_BS = torch.randint(0, 96, (2, 100))
    with torch.inference_mode():
        difference = (theirs(tokens_BS).logits.float() - ours(tokens_BS).float()).abs().max()
    assert difference < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_folders_that_transformers_wrote_load_here(tmp_path: Path, tie: bool) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        dtype="bfloat16",
    )
    theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "single")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "single", tmp_path / "sharded"):
        ours = load_model(folder)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[hf_name(name)]), name
    # And out again: the base's generation settings are kept.
    settings = json.loads((tmp_path / "single" / "generation_config.json").read_text())
    (tmp_path / "single" / "generation_config.json").write_text(
        json.dumps({**settings, "temperature": 0.6, "do_sample": True})
    )
    save_model(ours, tmp_path / "out", base=tmp_path / "single")
    again = load_in_transformers(tmp_path / "out", ours)
    assert again.generation_config.temperature == 0.6
