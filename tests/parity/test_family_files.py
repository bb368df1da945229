"""The files of every family: GGUF by the gguf package, published sizes, settings that are refused; numbers: test_families.py."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from family_models import MIXED, TOKENS, assert_same, config_of, reference
from safetensors.torch import save_file

from kdtune.checkpoint import Checkpointer, load_model, save_model
from kdtune.errors import CheckpointError, ConfigError
from kdtune.models import (
    FAMILIES,
    LLAMA,
    MISTRAL,
    QWEN2,
    apply_lora,
    on_meta_device,
    read_hf_config,
    weight_shapes,
    write_hf_config,
)


def write_gguf(file: Path, theirs: Any, architecture: str, *, is_q8: bool = False, **lengths: float) -> None:
    """The model by the gguf package, as llama.cpp's converter names its tensors and settings; it keeps what 8 bits round to."""
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
    if architecture in ("gemma2", "gemma3", "phi3"):
        lengths["sliding_window"] = config.sliding_window or 0
    if architecture == "gemma2":
        lengths |= {key: getattr(config, key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        lengths["rope_scaling_factor"] = rope["factor"]
    if rope["rope_type"] == "longrope":
        lengths["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
        lengths["rope_scaling_attn_factors"] = theirs.model.rotary_emb.attention_scaling
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], dtype=np.float32))
    for key, value in lengths.items():
        getattr(writer, f"add_{key}")(value)
    for name, parameter in theirs.named_parameters():
        values = parameter.detach().float() + (architecture in ("gemma2", "gemma3") and "norm" in name)
        if architecture in ("llama", "smollm3", "granite") and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        stored, dtype = values.numpy(), None
        if is_q8 and values.ndim == 2:
            dtype = gguf.GGMLQuantizationType.Q8_0
            stored = gguf.quantize(stored, dtype)
            parameter.data = torch.from_numpy(gguf.dequantize(stored, dtype))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), stored, raw_dtype=dtype)
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
        ("gemma3, linear", "gemma3"),
        ("gemma2", "gemma2"),
        ("phi3", "phi3"),
        ("phi3, long", "phi3"),
        ("phi3, short", "phi3"),
    ],
)
@pytest.mark.parametrize("is_q8", [False, True])
@torch.no_grad()
def test_a_gguf_file(name: str, architecture: str, is_q8: bool, tmp_path: Path) -> None:
    """llama.cpp reorders the q and k of its architecture llama, and of those that it derives from it."""
    if is_q8 and architecture not in ("gemma2", "gemma3", "phi3"):
        pytest.skip("8 bits are read alike whatever the family")
    # The files do not say which of Gemma's layers have a window, the base of those, nor another scale than the head's.
    changes: dict[str, Any] = {}
    if architecture.startswith("gemma"):
        rope, size = (config_of(name).to_dict()[key] for key in ("rope_parameters", "head_dim"))
        size = 8 if is_q8 else size  # blocks of 32 values
        changes = {"head_dim": size, "query_pre_attn_scalar": size, "layer_types": None}
    if architecture == "gemma3":
        base = {"rope_type": "default", "rope_theta": 10_000.0}
        changes |= {"rope_parameters": rope | {"sliding_attention": base}, "num_hidden_layers": 6}
    theirs = reference(name, tmp_path / "base", **changes)
    config = load_model(tmp_path / "base").config
    lengths = {
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.num_rotated,
    }
    write_gguf(tmp_path / "m.gguf", theirs, architecture, is_q8=is_q8, **lengths)
    model = Checkpointer(tmp_path / "m.gguf").load()
    assert_same(model(TOKENS), theirs(TOKENS).logits, 1e-5)
    # Mistral's files say llama, so that they are read as Llama's, which computes the same.
    assert model.config.family.gguf_architecture == architecture
    save_model(model, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(again(TOKENS).logits, theirs(TOKENS).logits, 1e-5)


@pytest.mark.parametrize("begins", ["transformers 4", "transformers 5"])
@torch.no_grad()
def test_the_text_part_of_a_model_with_images(begins: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = config_of("gemma3, linear").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=96, eos_token_id=[1, 6]
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "base")
    expected = theirs(TOKENS).logits
    weights = {name: weight.contiguous() for name, weight in theirs.state_dict().items() if name != "lm_head.weight"}
    if begins == "transformers 4":
        weights = {name.replace("model.language_model.", "language_model.model."): one for name, one in weights.items()}
        weights = {name.removeprefix("model."): one for name, one in weights.items()}
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})

    with caplog.at_level("INFO", "kdtune"):
        model = load_model(tmp_path / "base")
    (line,) = [record.getMessage() for record in caplog.records]
    of_vision = sum("vision_tower" in name for name in weights)
    assert f"; 2 tensors of multi_modal_projector and {of_vision} tensors of vision_tower are skipped" in line
    assert_same(model(TOKENS), expected, 1e-5)
    save_model(model, tmp_path / "saved", base=tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is transformers.Gemma3ForCausalLM and again.config.eos_token_id == [1, 6]
    assert torch.equal(again(TOKENS).logits, theirs(TOKENS).logits)
    document = json.loads((tmp_path / "saved/config.json").read_text())
    assert document["model_type"] == "gemma3_text" and not [
        key for key in document if "vision" in key or "image" in key
    ]

    apply_lora(model, lora_rank=2, lora_attn_modules=["q_proj"], apply_lora_to_output=True)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            parameter.normal_()
    save_model(model, tmp_path / "adapter", base=tmp_path / "base", save_weights="adapter")
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    assert_same(adapted(TOKENS).logits, model(TOKENS), 1e-5)
    assert not [name for name, _ in adapted.named_parameters() if "lora" in name and "vision_tower" in name]
    merged = Checkpointer(tmp_path / "base", adapter_dir=tmp_path / "adapter").load()
    assert_same(merged(TOKENS), model(TOKENS), 1e-5)


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
        "general.architecture='gemma'; want 'llama' or 'qwen2' or 'qwen3' or 'olmo2' or 'smollm3' or 'granite' or 'phi3' or "
        "'gemma2' or 'gemma3'" in problem
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
    "olmo3_7b": 7_298_011_136, "olmo3_32b": 32_233_522_176,
    "smollm3_3b": 3_075_098_624, "granite3_3_2b": 2_533_539_840, "granite3_3_8b": 8_170_864_640,
    "phi3_mini_4k": 3_821_079_552, "phi3_mini_128k": 3_821_079_552, "phi3_medium_4k": 13_960_238_080,
    "phi3_5_mini": 3_821_079_552, "phi4": 14_659_507_200, "phi4_mini": 3_836_021_760,
    "gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984, "gemma2_27b": 27_227_128_320,
    "gemma3_4b": 3_880_263_168, "gemma3_12b": 11_766_034_176, "gemma3_27b": 27_009_346_304,
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
        keys, shapes = family.hf_keys, weight_shapes(config)
        for key, value in theirs.state_dict().items():
            parts = [shapes.pop(keys.to_kdtune(part)) for part in keys.parts_of(key)]
            assert tuple(value.shape) == (sum(rows for rows, *_ in parts), *parts[0][1:]), name
        assert not shapes
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
    ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic' is not supported"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "unknown rope settings .'mscale'."),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1}}, "beta_fast=1.0 and beta_slow=1.0"),
    ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "sliding_attention=.*is not supported"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": None, "max_window_layers": "2"},
     "max_window_layers='2'"),
    ("qwen2", {"layer_types": MIXED}, "layer_types with 'sliding_attention', and use_sliding_window is not true"),
    ("olmo2", {"attention_bias": True}, "attention_bias=True is not supported; want False"),
    ("smollm3", {"no_rope_layers": [1, 2, 1]}, r"no_rope_layers=\[1, 2, 1\]; want 3 values of 0 and 1"),
    ("smollm3", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported; want None"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 8.0}}}, "rope_type='dynamic'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
    ("gemma2", {"attn_logit_softcapping": -50.0}, "attn_logit_softcapping=-50.0; want a positive number"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
    ("phi3", {"embd_pdrop": 0.1}, "embd_pdrop=0.1 is not supported; want 0.0"),
    ("phi3", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25 and 0.5; want one of them"),
    ("phi3, long", {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0]}}, "long_factor=None; want a list"),
    ("phi3, long", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "short_factor=None; want a list"),
    ("phi3, long", {"num_attention_heads": 2, "num_key_value_heads": 2}, "3 short_factors; must be 6 above 0"),
    ("phi3, long", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, -1.0, 2.0]}},
     "short_factor=-1.0; want a positive number"),
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
