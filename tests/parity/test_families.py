"""The families of docs/extending.md against transformers and peft: logits, gradients, adapters, pruning, quantization, files."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import peft
import pytest
import torch
import transformers

from kdtune.checkpoint import Checkpointer, save_model, write_quantized
from kdtune.errors import CheckpointError
from kdtune.generation import generate
from kdtune.models import LLAMA, Transformer, apply_lora, merge_adapters, weight_shapes
from kdtune.models.quantization import quantize
from kdtune.pruning import keep_layers

DOCS = Path(__file__).parent.parent.parent / "docs/extending.md"
FAMILIES = ("QWEN2", "QWEN3")
TOKENS = torch.randint(96, (2, 11), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def my_qwen(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The document's own file."""
    (code,) = re.findall(r"```python\n# my_qwen.py\n(.*?)```", DOCS.read_text(), flags=re.S)
    folder = tmp_path_factory.mktemp("family")
    (folder / "qwen_of_the_docs.py").write_text(code)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("qwen_of_the_docs")
    finally:
        sys.path.remove(str(folder))


def reference(name: str, folder: Path, *, tied: bool = False) -> Any:
    """A random model of transformers, saved in the folder; its norms and biases are far from where they start."""
    torch.manual_seed(0)
    if name == "QWEN2":
        config: Any = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)
    else:  # heads that are not hidden_size / num_attention_heads wide
        config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=tied, head_dim=24)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    frequencies = model.model.rotary_emb.inv_freq
    model.save_pretrained(folder)
    model.model.rotary_emb.inv_freq = frequencies.float()
    return model


def reread(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def assert_same_logits(ours: Transformer, theirs: Any) -> None:
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_gradients_and_files(name: str, tied: bool, my_qwen: ModuleType, tmp_path: Path) -> None:
    reference(name, tmp_path / "base", tied=tied)
    theirs, family = reread(tmp_path / "base"), getattr(my_qwen, name)
    model = Checkpointer(tmp_path / "base", family=family).load()
    assert {key: tuple(weight.shape) for key, weight in model.state_dict().items()} == weight_shapes(model.config)
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert_same_logits(model, theirs)

    model(TOKENS).square().mean().backward()
    theirs(TOKENS).logits.square().mean().backward()
    for key, parameter in theirs.named_parameters():
        found = model.get_parameter(family.hf_keys.to_kdtune(key)).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))

    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(TOKENS[:1], attention_mask=torch.ones_like(TOKENS[:1]), **greedy)[0, TOKENS.shape[1] :]
    assert generate(model, TOKENS[0].tolist(), max_new_tokens=8, stop_ids=[]) == expected.tolist()

    save_model(model, tmp_path / "saved", base=tmp_path / "base")
    again = reread(tmp_path / "saved")
    assert type(again).__name__ == family.architecture
    own = {"_name_or_path": again.config._name_or_path, "head_dim": model.config.head_dim}  # Qwen2's is a quotient
    assert again.config.to_dict() == {**theirs.config.to_dict(), **own}
    assert torch.equal(again(TOKENS).logits, theirs(TOKENS).logits)
    assert Checkpointer(tmp_path / "saved").load(Transformer(model.config)).config.family == family


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_and_without_a_base(name: str, my_qwen: ModuleType, tmp_path: Path) -> None:
    reference(name, tmp_path / "base")
    model = Checkpointer(tmp_path / "base", family=getattr(my_qwen, name)).load()
    pruned = keep_layers(model, [0, 2])
    for base in (tmp_path / "base", None):
        save_model(pruned, tmp_path / f"pruned-{base is None}", base=base)
        assert_same_logits(pruned, reread(tmp_path / f"pruned-{base is None}"))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_beside_biases(name: str, use_dora: bool, my_qwen: ModuleType, tmp_path: Path) -> None:
    base = reference(name, tmp_path / "base")
    family = getattr(my_qwen, name)
    model = Checkpointer(tmp_path / "base", family=family).load()
    apply_lora(model, lora_rank=2, lora_attn_modules=["q_proj", "k_proj", "output_proj"], use_dora=use_dora)
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if key.endswith("bias"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_b" in key or "magnitude" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    save_model(model, tmp_path / "adapter", base=tmp_path / "base", save_weights="adapter")
    adapted = peft.PeftModel.from_pretrained(reread(tmp_path / "base"), str(tmp_path / "adapter"))
    assert_same_logits(model, adapted)
    assert not torch.allclose(adapted(TOKENS).logits, base(TOKENS).logits, atol=0.1)
    merged = Checkpointer(tmp_path / "base", adapter_dir=tmp_path / "adapter", family=family).load()
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merge_adapters(model)(TOKENS), merged(TOKENS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized(name: str, my_qwen: ModuleType, tmp_path: Path) -> None:
    reference(name, tmp_path / "base")
    family = getattr(my_qwen, name)
    model = Checkpointer(tmp_path / "base", family=family).load(dtype=torch.float32)
    quantize(model, "int8_weight_only")
    (tmp_path / "int8").mkdir()
    write_quantized(model, tmp_path / "int8", scheme="int8_weight_only", base=tmp_path / "base")
    assert Checkpointer(tmp_path / "int8", family=family).problems() == []
    assert torch.equal(Checkpointer(tmp_path / "int8", family=family).load()(TOKENS), model(TOKENS))


def test_what_a_family_does_not_compute_is_refused(my_qwen: ModuleType, tmp_path: Path) -> None:
    reference("QWEN2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def problem(family: Any, **changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        (found,) = Checkpointer(tmp_path, family=family).problems()
        return found

    sliding = {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}
    assert "sliding_window=8 is not supported; want None" in problem(my_qwen.QWEN2, **sliding)
    mixed = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    assert "layer_types=" in problem(my_qwen.QWEN2, **mixed) and "want 'full_attention' alone" in problem(
        my_qwen.QWEN2, **mixed
    )
    assert "want Qwen3ForCausalLM (model_type 'qwen3'), which family=Qwen3 stands for" in problem(my_qwen.QWEN3)
    unnamed = problem(None)
    assert "want LlamaForCausalLM (model_type 'llama'); the checkpointer's `family` names one of your own" in unnamed
    with pytest.raises(CheckpointError, match="proj.bias"):
        Checkpointer(tmp_path, family=replace(my_qwen.QWEN2, hf_keys=LLAMA.hf_keys)).load()
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 32, "use_sliding_window": False}))
    assert Checkpointer(tmp_path, family=my_qwen.QWEN2).problems() == []


def test_a_gguf_file_without_interleaved_rows(my_qwen: ModuleType, tmp_path: Path) -> None:
    """Named as the gguf package names Qwen2's tensors; llama.cpp reorders the q and k of Llama alone."""
    theirs = reference("QWEN2", tmp_path / "base")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 3)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1000.0)
    for name, parameter in theirs.named_parameters():
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(renamed, parameter.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    biases = {f"blk.{{}}.attn_{name}.bias": f"layers.{{}}.attn.{name}_proj.bias" for name in "qkv"}
    keys = replace(LLAMA.gguf_keys.plus(biases), is_interleaved=False)
    family = replace(my_qwen.QWEN2, gguf_architecture="qwen2", gguf_keys=keys)
    model = Checkpointer(tmp_path / "m.gguf", family=family).load()
    torch.testing.assert_close(model(TOKENS), theirs.float()(TOKENS).logits, rtol=1e-4, atol=1e-4)
    (problem,) = Checkpointer(tmp_path / "m.gguf", family=my_qwen.QWEN2).problems()
    assert "general.architecture='qwen2'; want safetensors, for family=Qwen2" in problem
    (problem,) = Checkpointer(tmp_path / "m.gguf").problems()
    assert "general.architecture='qwen2'; want 'llama'" in problem


def test_fresh_weights(my_qwen: ModuleType) -> None:
    """As transformers starts: biases 0, gains 1."""
    model = my_qwen.qwen(vocab_size=96, embed_dim=32, num_layers=1, num_heads=4, intermediate_dim=64)
    assert model.config.family is my_qwen.QWEN2
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    assert [tuple(bias.shape) for bias in biases] == [(32,), (16,), (16,)] and not any(bias.any() for bias in biases)
    model = Transformer(replace(model.config, qkv_bias=False, qk_norm=True, family=my_qwen.QWEN3))
    assert torch.equal(model.layers[0].attn.q_norm.weight, torch.ones(8))
