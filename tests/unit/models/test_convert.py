"""Other formats' names, row orders and settings."""

import math
from dataclasses import replace

import pytest
import torch

from kdtune import models
from kdtune.errors import CheckpointError
from kdtune.models import LLAMA, RopeScaling, family_of_gguf, read_hf_config, write_hf_config
from kdtune.models.architecture import unpermute
from kdtune.models.file_configs import config_from_gguf
from kdtune.models.llama import config_from_meta
from kdtune.models.rope import inverse_frequencies, rotate
from kdtune.models.transformer import rotary_heads

HF, META, GGUF = LLAMA.hf_keys, LLAMA.meta_keys, LLAMA.gguf_keys
SIZES = {name: replace(config, family=LLAMA) for name, (_, config) in LLAMA.sizes.items()}


def read_gguf(metadata, **about):
    return config_from_gguf(family_of_gguf(metadata)[0], metadata, **about)


def names() -> list[str]:
    with torch.device("meta"):
        model = models.llama(vocab_size=8, embed_dim=8, num_layers=12, num_heads=2, intermediate_dim=8)
    return list(model.state_dict())


@pytest.mark.parametrize("key_map", [HF, META, GGUF], ids=lambda key_map: key_map.format)
def test_names_round_trip(key_map):
    theirs = [key_map.from_kdtune(name) for name in names()]
    assert len(set(theirs)) == len(names())
    assert all(map(key_map.knows, theirs))
    assert [key_map.to_kdtune(name) for name in theirs] == names()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.layers.11.self_attn.o_proj.weight", "layers.11.attn.output_proj.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "layers.0.mlp_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ],
)
def test_hugging_face_names(theirs, ours):
    assert HF.to_kdtune(theirs) == ours
    assert HF.from_kdtune(ours) == theirs


def test_gguf_names_are_the_gguf_packages():
    gguf = pytest.importorskip("gguf")
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    for ours in names():
        theirs = GGUF.from_kdtune(ours)
        assert name_map.get_name(HF.from_kdtune(ours), try_suffixes=(".weight",)) == theirs
        assert GGUF.to_kdtune(theirs) == ours
        assert name_map.get_name(META.from_kdtune(ours), try_suffixes=(".weight",)) == theirs


def test_unknown_names_are_errors_and_derived_tables_are_told_apart():
    for name in ("lm_head.bias", "model.layers.1.self_attn.q_proj.bias", "model.layers.x.mlp.up_proj.weight"):
        assert not HF.knows(name)
        with pytest.raises(CheckpointError, match=name):
            HF.to_kdtune(name)
    assert HF.is_derived("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert META.is_derived("rope.freqs")
    assert GGUF.is_derived("rope_freqs.weight")
    assert not HF.is_derived("lm_head.weight")


def test_unpermuted_rows_rotate_as_interleaved_pairs_do():
    """The reference is the original formulation: neighbouring rows are a complex number that is turned."""
    torch.manual_seed(0)
    num_heads, head_dim, dim = 3, 8, 5
    interleaved = torch.randn(num_heads * head_dim, dim, dtype=torch.float64)
    x, angles = torch.randn(dim, dtype=torch.float64), torch.rand(head_dim // 2, dtype=torch.float64)
    pairs = (interleaved @ x).view(num_heads, head_dim // 2, 2)
    turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)
    weight = unpermute(interleaved, num_heads)
    heads = rotate((weight @ x).view(1, 1, num_heads, head_dim), (angles.cos(), angles.sin()))[0, 0]
    torch.testing.assert_close(heads, torch.cat((turned.real, turned.imag), dim=-1))


def test_only_q_and_k_are_permuted():
    config = replace(SIZES["llama3_2_1b"], num_layers=2)
    heads = {name: rotary_heads(name, config) for name in names()}
    assert {name for name, count in heads.items() if count} == {
        f"layers.{i}.attn.{proj}_proj.weight" for i in range(12) for proj in "qk"
    }
    assert heads["layers.1.attn.q_proj.weight"] == 32
    assert heads["layers.1.attn.k_proj.weight"] == 8


HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "pretraining_tp": 1,
}


def test_published_hugging_face_config_is_the_published_size():
    assert read_hf_config(HF_CONFIG) == SIZES["llama3_2_1b"]


@pytest.mark.parametrize("name", SIZES)
def test_hf_config_round_trip(name):
    written = write_hf_config(SIZES[name])
    assert read_hf_config(written) == SIZES[name]
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


def test_base_settings_are_kept_but_not_its_quantization():
    base = HF_CONFIG | {"eos_token_id": [7, 8], "quantization_config": {"bits": 4}, "transformers_version": "4.45.0"}
    written = write_hf_config(replace(SIZES["llama3_2_1b"], num_layers=4), base=base, dtype="float32")
    assert written["eos_token_id"] == [7, 8]
    assert written["num_hidden_layers"] == 4
    assert written["dtype"] == "float32"
    assert not {"quantization_config", "transformers_version"} & written.keys()
    assert base["num_hidden_layers"] == 16


def test_absent_settings_have_transformers_defaults():
    sizes = (
        "architectures",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    config = read_hf_config({key: HF_CONFIG[key] for key in sizes})
    assert (config.num_kv_heads, config.head_dim, config.max_seq_len) == (32, 64, 2048)
    assert (config.norm_eps, config.rope_base, config.rope_scaling, config.tie_embeddings) == (1e-6, 1e4, None, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["CohereForCausalLM"], "model_type": "cohere"}, "CohereForCausalLM"),
        ({"architectures": None, "model_type": "cohere"}, "model_type='cohere'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": HF_CONFIG["rope_scaling"] | {"beta_fast": 32}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling.factor=32.0 and rope_parameters"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 5}, "num_kv_heads=5: must divide num_heads=32"),
    ],
)
def test_unsupported_hf_settings_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(HF_CONFIG | changes)


META_PARAMS = {
    "llama2_7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1},
    "llama2_70b": {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
        "norm_eps": 1e-5, "vocab_size": -1,
    },
    "llama3_8b": {
        "dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_heads": 32, "n_kv_heads": 8, "n_layers": 32,
        "norm_eps": 1e-5, "vocab_size": 128_256, "rope_theta": 500_000.0,
    },
    "llama3_1_405b": {
        "dim": 16_384, "multiple_of": 4096, "ffn_dim_multiplier": 1.2, "n_heads": 128, "n_kv_heads": 8,
        "n_layers": 126, "norm_eps": 1e-5, "vocab_size": 128_256, "rope_theta": 500_000.0, "use_scaled_rope": True,
    },
    "llama3_2_1b": {
        "dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5, "n_heads": 32, "n_kv_heads": 8, "n_layers": 16,
        "norm_eps": 1e-5, "vocab_size": 128_256, "rope_theta": 500_000.0, "use_scaled_rope": True,
    },
    "llama3_2_3b": {
        "dim": 3072, "multiple_of": 256, "ffn_dim_multiplier": 1.0, "n_heads": 24, "n_kv_heads": 8, "n_layers": 28,
        "norm_eps": 1e-5, "vocab_size": 128_256, "rope_theta": 500_000.0, "use_scaled_rope": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", META_PARAMS)
def test_published_meta_params_are_the_published_size(name):
    assert config_from_meta(META_PARAMS[name], vocab_size=32_000) == SIZES[name]


def test_meta_params_of_no_published_size():
    params = META_PARAMS["llama3_8b"] | {"n_layers": 3, "use_scaled_rope": True}
    config = config_from_meta(params, max_seq_len=64, tie_embeddings=True)
    assert config == replace(SIZES["llama3_1_8b"], num_layers=3, max_seq_len=64, tie_embeddings=True)
    assert config_from_meta(params | {"rope_scaling_factor": 16}).rope_scaling.factor == 16.0
    with pytest.raises(CheckpointError, match="vocab_size"):
        config_from_meta(META_PARAMS["llama2_7b"])
    with pytest.raises(CheckpointError, match="quantization_args"):
        config_from_meta(params | {"quantization_args": {}})
    with pytest.raises(CheckpointError, match="n_layers is missing"):
        config_from_meta({key: value for key, value in params.items() if key != "n_layers"})


GGUF_METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100_000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49_152,
    "llama.rope.dimension_count": 64,
}


def test_gguf_metadata():
    assert read_gguf(GGUF_METADATA, tie_embeddings=True) == SIZES["smollm2_135m"]
    without = {key: value for key, value in GGUF_METADATA.items() if key != "llama.vocab_size"}
    config = read_gguf(without | {"tokenizer.ggml.tokens": ["a", "b"]}, tie_embeddings=False)
    assert (config.vocab_size, config.tie_embeddings) == (2, False)


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_gguf_rope_factors(factor):
    """The reference divisors are computed frequency by frequency, as the converter that writes them does."""
    divisors = []
    for index in range(32):
        wavelength = 2 * math.pi * 100_000.0 ** (2 * index / 64)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    config = read_gguf(GGUF_METADATA, tie_embeddings=True, rope_factors=torch.tensor(divisors))
    assert config.rope_scaling == (None if factor == 1.0 else RopeScaling(factor, 1.0, 4.0, 8192))
    scaled = inverse_frequencies(64, 100_000.0, config.rope_scaling)
    torch.testing.assert_close(scaled, inverse_frequencies(64, 100_000.0, None) / torch.tensor(divisors))
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        read_gguf(GGUF_METADATA, tie_embeddings=True, rope_factors=torch.tensor(divisors) + torch.arange(32) % 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "cohere"}, "general.architecture='cohere'"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count=32"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_unsupported_gguf_settings_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_gguf(GGUF_METADATA | changes, tie_embeddings=True)
