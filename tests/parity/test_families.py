"""Every family against transformers, peft and the gguf package: logits, gradients, caches, documents, adapters, files."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from kdtune.checkpoint import Checkpointer, load_model, save_model, write_quantized
from kdtune.errors import CheckpointError, ConfigError
from kdtune.generation import generate
from kdtune.models import (
    FAMILIES,
    LLAMA,
    MISTRAL,
    OLMO2,
    QWEN2,
    Documents,
    KVCache,
    Transformer,
    apply_lora,
    merge_adapters,
    on_meta_device,
    read_hf_config,
    weight_shapes,
    write_hf_config,
)
from kdtune.models.attention import norm_of
from kdtune.models.quantization import quantize
from kdtune.pruning import keep_layers

# Longer than every window below.
TOKENS = torch.randint(96, (2, 13), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1000.0, "sliding_window": None, "pad_token_id": None,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FACTORS = {
    "attention_multiplier": 0.6,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_scaling": 4.0,
}
GEMMA: dict[str, Any] = {
    "rope_theta": None,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}
# Heads that are not hidden_size / num_attention_heads wide, windows shorter than the text, tied and untied.
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, window": ("mistral", {"sliding_window": 5, "head_dim": 24}),
    "mistral": ("mistral", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "ministral": ("ministral", {"sliding_window": 4, "layer_types": MIXED, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3, window": (
        "qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 3, "layer_types": MIXED, "tie_word_embeddings": True},
    ),
    "olmo2": ("olmo2", {"head_dim": 8}),
    "olmo2, tied": ("olmo2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3, pattern": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": False}),
    "granite": ("granite", FACTORS | {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 5, "head_dim": 12, "query_pre_attn_scalar": 12} | GEMMA),
    "gemma3, other": (
        "gemma3_text",
        {"sliding_window": 3, "layer_types": MIXED, "head_dim": 24, "query_pre_attn_scalar": 7, "tie_word_embeddings": False} | GEMMA,
    ),
    "granite, untied": ("granite", FACTORS | {"num_key_value_heads": 4}),
}  # fmt: skip
ONE_OF_EACH = ["mistral, window", "ministral", "qwen2", "qwen3", "olmo2", "smollm3", "granite", "gemma3"]


def config_of(name: str, **changes: Any) -> Any:
    model_type, settings = REFERENCES[name]
    return transformers.AutoConfig.for_model(model_type, **(SIZES | settings | changes))


def reference(name: str, folder: Path, **changes: Any) -> Any:
    """A random model of transformers, saved in the folder; its norms and biases are far from where they start."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def reread(folder: Path) -> Any:
    """The model in a folder by transformers, in float64: it rounds norms and rotary tables to fp32, so these are computed here."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rotary = model.model.rotary_emb

    def tables(hidden: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        frequencies = rotary.inv_freq if layer_type is None else getattr(rotary, f"{layer_type}_inv_freq")
        angles = position_ids[..., None].double() * frequencies.double()
        twice = torch.cat((angles, angles), -1)
        return twice.cos(), twice.sin()

    rotary.forward = tables
    for module in model.modules():
        if type(module).__name__ == "Gemma3RMSNorm":
            module.forward = lambda hidden, norm=module: (
                hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.eps) * (1 + norm.weight)
            )
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda hidden, norm=module: (
                hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
            )
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
    return model


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.detach().abs().max().item())


def float64(folder: Path) -> Transformer:
    return load_model(folder, dtype=torch.float64)


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_gradients_and_files(name: str, tmp_path: Path) -> None:
    in_fp32 = reference(name, tmp_path / "base")
    theirs, model = reread(tmp_path / "base"), float64(tmp_path / "base")
    assert {key: tuple(weight.shape) for key, weight in model.state_dict().items()} == weight_shapes(model.config)
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.family.model_type == REFERENCES[name][0]
    expected = theirs(TOKENS).logits
    assert expected.abs().max() > 1
    assert_same(model(TOKENS), expected)
    assert_same(load_model(tmp_path / "base")(TOKENS), in_fp32(TOKENS).logits, 1e-5)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    in_bf16 = load_model(tmp_path / "base", dtype=torch.bfloat16)(TOKENS)
    # Of OLMo 2, transformers rounds queries and keys after their rotation alone, we before it too, as for the others.
    assert_same(in_bf16, rounded(TOKENS).logits, 0.05 if model.config.family is OLMO2 else 0.0)

    model(TOKENS).square().mean().backward()
    expected.square().mean().backward()
    for key, parameter in theirs.named_parameters():
        assert_same(model.get_parameter(model.config.family.hf_keys.to_kdtune(key)).grad, parameter.grad, 1e-9)

    save_model(model.float(), tmp_path / "saved", base=tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(in_fp32)
    own = {"_name_or_path": again.config._name_or_path, "head_dim": model.config.head_dim}  # Qwen2's is a quotient
    if model.config.windows:  # unused beside layer_types
        own |= {key: value for key, value in again.config.to_dict().items() if key == "max_window_layers"}
    assert again.config.to_dict() == {**in_fp32.config.to_dict(), **own}
    assert torch.equal(again(TOKENS).logits, in_fp32(TOKENS).logits)
    assert load_model(tmp_path / "saved").config == model.config


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_caches_documents_and_padding(name: str, tmp_path: Path) -> None:
    in_fp32 = reference(name, tmp_path)
    theirs, model = reread(tmp_path), float64(tmp_path)
    expected = theirs(TOKENS).logits
    for chunks in ([7, 1, 1, 1, 1, 1, 1], [2, 9, 2]):
        cache = KVCache(model.config, 2, 13)
        assert_same(torch.cat([model(part, kv_cache=cache) for part in TOKENS.split(chunks, dim=1)], 1), expected)

    texts = TOKENS[:1].split([9, 1, 3], dim=1)
    alone = torch.cat([theirs(text).logits for text in texts], 1)
    assert_same(model(TOKENS[:1], documents=Documents.of_lengths([9, 1, 3])), alone)

    attended = torch.ones(2, 13, dtype=torch.bool)
    attended[1, :4] = False
    positions = (attended.long().cumsum(-1) - 1).clamp(min=0)
    padded = theirs(TOKENS, attention_mask=attended.long(), position_ids=positions).logits
    mask = attended[:, None, :] & torch.ones(13, 13, dtype=torch.bool).tril()
    assert_same(model(TOKENS, input_pos=positions, mask=mask)[attended], padded[attended])
    cache = KVCache(model.config, 2, 13)
    model(TOKENS[:, :12], input_pos=positions[:, :12], mask=mask[:, :12, :12], kv_cache=cache)
    last = model(TOKENS[:, 12:], input_pos=positions[:, 12:], mask=mask[:, 12:], kv_cache=cache)
    assert_same(last, padded[:, 12:])

    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    told = in_fp32.generate(TOKENS[:1], attention_mask=torch.ones_like(TOKENS[:1]), **greedy)[0, 13:].tolist()
    assert generate(load_model(tmp_path), TOKENS[0].tolist(), max_new_tokens=8, stop_ids=[]) == told


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "qwen3, window"])
@torch.no_grad()
def test_pruned_and_without_a_base(name: str, tmp_path: Path) -> None:
    reference(name, tmp_path / "base")
    model = float64(tmp_path / "base")
    pruned = keep_layers(model, [1, 2])
    for base in (tmp_path / "base", None):
        folder = tmp_path / f"pruned-{base is None}"
        save_model(pruned, folder, base=base)
        assert_same(reread(folder)(TOKENS).logits, pruned(TOKENS))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_step_of_adapters(name: str, use_dora: bool, tmp_path: Path) -> None:
    reference(name, tmp_path / "base")
    model = float64(tmp_path / "base")
    apply_lora(model, lora_rank=2, lora_attn_modules=["q_proj", "k_proj", "output_proj"], use_dora=use_dora)
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if key.endswith("bias"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_b" in key or "magnitude" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    save_model(model, tmp_path / "adapter", base=tmp_path / "base", save_weights="adapter")
    theirs = peft.PeftModel.from_pretrained(reread(tmp_path / "base"), str(tmp_path / "adapter"), is_trainable=True)
    assert not torch.allclose(theirs(TOKENS).logits, reread(tmp_path / "base")(TOKENS).logits, atol=0.1)
    merged = Checkpointer(tmp_path / "base", adapter_dir=tmp_path / "adapter").load(dtype=torch.float64)
    assert_same(merged(TOKENS), model(TOKENS), 1e-6)

    for compute, parameters in ((model, model.parameters()), (lambda ids: theirs(ids).logits, theirs.parameters())):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        functional.cross_entropy(compute(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
    assert not torch.allclose(model(TOKENS), merged(TOKENS), atol=1e-3)
    assert_same(model(TOKENS), theirs(TOKENS).logits, 1e-9)
    assert_same(merge_adapters(model)(TOKENS), theirs(TOKENS).logits, 1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_quantized(name: str, tmp_path: Path) -> None:
    reference(name, tmp_path / "base")
    model = load_model(tmp_path / "base")
    quantize(model, "int8_weight_only")
    (tmp_path / "int8").mkdir()
    write_quantized(model, tmp_path / "int8", scheme="int8_weight_only", base=tmp_path / "base")
    assert Checkpointer(tmp_path / "int8").problems() == []
    assert torch.equal(Checkpointer(tmp_path / "int8").load()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_nf4_base(name: str, tmp_path: Path) -> None:
    """Adapters that start from 0 leave the logits of the base, whose matrices are rounded to 16 values."""
    reference(name, tmp_path, hidden_size=64, intermediate_size=128, head_dim=32)
    model = load_model(tmp_path)
    plain = model(TOKENS)
    adapted = apply_lora(model, lora_rank=2, lora_attn_modules=["q_proj"], quantize_base=True)(TOKENS)
    error = (adapted - plain).norm() / plain.norm()
    assert 0.001 < error < 0.5
    adapted.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def write_gguf(file: Path, theirs: Any, architecture: str, **lengths: float) -> None:
    """The model by the gguf package, as llama.cpp's converter names its tensors and settings."""
    config = theirs.config
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"])
    if architecture == "granite":
        lengths |= {"attention_scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier}
        lengths |= {"residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}
    if architecture == "gemma3":
        lengths["sliding_window"] = config.sliding_window
    for key, value in lengths.items():
        getattr(writer, f"add_{key}")(value)
    for name, parameter in theirs.named_parameters():
        values = parameter.detach().float() + (architecture == "gemma3" and "norm" in name)
        if architecture in ("llama", "smollm3", "granite") and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("mistral", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("olmo2", "olmo2"),
        ("smollm3, pattern", "smollm3"),
        ("granite", "granite"),
        ("gemma3", "gemma3"),
    ],
)
@torch.no_grad()
def test_a_gguf_file(name: str, architecture: str, tmp_path: Path) -> None:
    """llama.cpp reorders the q and k of its architecture llama, and of those that it derives from it."""
    # The file does not say the base of Gemma's layers with a window.
    base = {"sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    changes = {"rope_parameters": GEMMA["rope_parameters"] | base} if name == "gemma3" else {}
    theirs = reference(name, tmp_path / "base", **changes)
    head_dim = load_model(tmp_path / "base").config.head_dim
    lengths = {"key_length": head_dim, "value_length": head_dim, "rope_dimension_count": head_dim}
    write_gguf(tmp_path / "m.gguf", theirs, architecture, **lengths)
    model = Checkpointer(tmp_path / "m.gguf").load()
    assert_same(model(TOKENS), theirs(TOKENS).logits, 1e-5)
    # Mistral's files say llama, so that they are read as Llama's, which computes the same.
    assert model.config.family.gguf_architecture == architecture
    save_model(model, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(again(TOKENS).logits, theirs(TOKENS).logits, 1e-5)


def test_the_family_of_a_gguf_file(tmp_path: Path) -> None:
    theirs = reference("mistral", tmp_path / "base")
    write_gguf(tmp_path / "m.gguf", theirs, "llama")
    assert Checkpointer(tmp_path / "m.gguf").load().config.family is LLAMA
    assert Checkpointer(tmp_path / "m.gguf", family=MISTRAL).load().config.family is MISTRAL
    write_gguf(tmp_path / "w.gguf", theirs, "llama", sliding_window=5)
    (problem,) = Checkpointer(tmp_path / "w.gguf").problems()
    assert "llama.attention.sliding_window=5 is not supported" in problem
    write_gguf(tmp_path / "o.gguf", theirs, "gemma")
    (problem,) = Checkpointer(tmp_path / "o.gguf").problems()
    assert (
        "general.architecture='gemma'; want 'llama' or 'qwen2' or 'qwen3' or 'olmo2' or 'smollm3' or 'granite' or 'gemma3'"
        in problem
    )
    (problem,) = Checkpointer(tmp_path / "o.gguf", family=replace(QWEN2, gguf_keys=None)).problems()
    assert "want safetensors, for family=Qwen2" in problem


PUBLISHED = {
    "mistral_7b_v0_1": 7_241_732_096, "mistral_7b_v0_2": 7_241_732_096, "mistral_7b_v0_3": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400, "mistral_small_22b": 22_247_282_688, "mistral_small_24b": 23_572_403_200,
    "ministral_8b": 8_019_808_256,
    "qwen2_0_5b": 494_032_768, "qwen2_1_5b": 1_543_714_304, "qwen2_7b": 7_615_616_512,
    "qwen2_5_0_5b": 494_032_768, "qwen2_5_1_5b": 1_543_714_304, "qwen2_5_3b": 3_085_938_688, "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664, "qwen2_5_32b": 32_763_876_352, "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920, "qwen3_1_7b": 1_720_574_976, "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200, "qwen3_32b": 32_762_123_264,
    "olmo2_1b": 1_484_916_736, "olmo2_7b": 7_298_617_344, "olmo2_13b": 13_716_198_400, "olmo2_32b": 32_234_279_936,
    "smollm3_3b": 3_075_098_624, "granite3_3_2b": 2_533_539_840, "granite3_3_8b": 8_170_864_640,
    "gemma3_270m": 268_098_176, "gemma3_1b": 999_885_952,
}  # fmt: skip


def test_every_size_has_its_published_number_of_parameters() -> None:
    """transformers builds each from our config.json, and has as many parameters of the same names and shapes."""
    others = {
        name: (family, size) for family in FAMILIES if family is not LLAMA for name, (_, size) in family.sizes.items()
    }
    assert others.keys() == PUBLISHED.keys()
    for name, (family, size) in others.items():
        config = replace(size, family=family)
        written = transformers.AutoConfig.for_model(**write_hf_config(config))
        assert read_hf_config(written.to_dict()) == config
        with on_meta_device():
            theirs = transformers.AutoModelForCausalLM.from_config(written)
        shapes = {family.hf_keys.to_kdtune(key): tuple(value.shape) for key, value in theirs.state_dict().items()}
        assert shapes == weight_shapes(config), name
        assert sum(value.numel() for value in theirs.parameters()) == config.num_parameters == PUBLISHED[name], name


REFUSED: list[tuple[str, Mapping[str, Any], str]] = [
    ("mistral", {"sliding_window": 5, "layer_types": MIXED}, "layer_types with 'full_attention'.*MinistralForCausalLM"),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; want 'silu'"),
    ("mistral", {"sliding_window": -5}, "sliding_window=-5; want a positive integer"),
    ("mistral", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; want at most 10000"),
    ("ministral", {"num_hidden_layers": "3", "layer_types": None}, "num_hidden_layers='3'; want a positive integer"),
    ("gemma3", {"rope_parameters": {"sliding_attention": [1]}}, "sliding_attention=.1.; want an object of settings"),
    ("smollm3", {"no_rope_layers": "1"}, "no_rope_layers='1'; want 3 values"),
    ("ministral", {"layer_types": ["chunked_attention"] * 3}, "layer_types=.*chunked_attention.* is not supported"),
    ("ministral", {"layer_types": ["full_attention"] * 2}, "layer_types has 2 values; want num_hidden_layers=3"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": None, "max_window_layers": "2"},
     "max_window_layers='2'"),
    ("qwen2", {"layer_types": MIXED}, "layer_types with 'sliding_attention', and use_sliding_window is not true"),
    ("olmo2", {"attention_bias": True}, "attention_bias=True is not supported; want False"),
    ("smollm3", {"no_rope_layers": [1, 2, 1]}, r"no_rope_layers=\[1, 2, 1\]; want 3 values of 0 and 1"),
    ("smollm3", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported; want None"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, "rope_type='linear'"),
    ("granite", {"residual_multiplier": 0}, "residual_multiplier=0; want a positive number"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported; want False"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_a_family_does_not_compute_is_refused(name: str, changes: Mapping[str, Any], message: str) -> None:
    document = config_of(name).to_dict()
    read_hf_config(document)
    if "rope_scaling" in changes:
        document.pop("rope_parameters")
    with pytest.raises(CheckpointError, match=message):
        read_hf_config({**document, **changes})


def test_a_family_that_cannot_describe_a_model_is_refused(tmp_path: Path) -> None:
    config = read_hf_config(config_of("mistral, window").to_dict())
    with pytest.raises(ConfigError, match=r"config.json of Llama cannot say \{'windows': \(5, 5, 5\)\}"):
        write_hf_config(replace(config, family=LLAMA))
    with pytest.raises(ConfigError, match=r"config.json of Mistral cannot say \{'windows': \(None, 5, 5\)\}"):
        write_hf_config(replace(config, windows=(None, 5, 5)))
    with pytest.raises(ConfigError, match="windows: 1 values; must be one for each of 3 layers"):
        replace(config, windows=(5,))
    reference("qwen2", tmp_path)
    with pytest.raises(CheckpointError, match="proj.bias"):
        Checkpointer(tmp_path, family=replace(QWEN2, hf_keys=LLAMA.hf_keys)).load()
    document = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(CheckpointError, match="want Qwen3ForCausalLM.*which family=Qwen3 stands for"):
        read_hf_config(document, named=next(family for family in FAMILIES if family.name == "Qwen3"))


def test_norms_round_as_transformers_do() -> None:
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gain = torch.randn(32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for name in ("mistral", "olmo2"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(name))
        norm = norm_of(read_hf_config(model.config.to_dict()), 32).bfloat16()
        for each in (norm, model.model.norm.bfloat16()):
            each.weight.data = gain
        assert torch.equal(norm(hidden), model.model.norm(hidden))


def test_fresh_weights() -> None:
    """As transformers starts: biases 0, gains 1."""
    tiny = {name: replace(read_hf_config(config_of(name).to_dict()), num_layers=1) for name in ("qwen2", "qwen3")}
    biases = [weight for name, weight in Transformer(tiny["qwen2"]).named_parameters() if name.endswith(".bias")]
    assert [tuple(bias.shape) for bias in biases] == [(32,), (16,), (16,)] and not any(bias.any() for bias in biases)
    assert torch.equal(Transformer(tiny["qwen3"]).layers[0].attn.q_norm.weight, torch.ones(24))
