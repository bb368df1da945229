"""The Phi-3 (arXiv 2404.14219) and Phi-4 families: as Llama, with fused matrices in the files, windows and LongRoPE.

Their files hold queries, keys and values as one matrix, and gate and up as another. Phi-4-mini rotates three quarters of each
head. Sources of the sizes: the ``config.json`` files released with the weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kdtune.errors import CheckpointError
from kdtune.models.architecture import Family, TransformerConfig
from kdtune.models.file_configs import (
    LONG_ROPE_FACTORS,
    SHORT_ROPE_FACTORS,
    WINDOW_ATTENTION,
    Settings,
    config_from_gguf,
    config_from_hf,
    config_to_hf,
    windows_from_hf,
    windows_to_hf,
)
from kdtune.models.llama import GGUF_KEYS, LLAMA
from kdtune.models.rope import LongRope

_SHARE = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
# Older files' names of LongRoPE.
_LONG_ROPE = ("longrope", "su", "yarn")


def _config_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    found = Settings({**family.hf_defaults, **document}, "config.json")
    flat, shares = dict(document), {found.number(_SHARE, kind=float)}
    flat.pop(_SHARE, None)
    for key in ("rope_scaling", "rope_parameters"):
        rope = dict(found.section(key))
        shares.add(Settings(rope, f"config.json: {key}").number(_SHARE, kind=float))
        rope.pop(_SHARE, None)
        for name in ("type", "rope_type"):
            if rope.get(name) in _LONG_ROPE:
                rope[name] = _LONG_ROPE[0]
        flat[key] = rope or None
    shares -= {None}
    if len(shares) > 1:
        raise CheckpointError(f"config.json: {_SHARE} is {' and '.join(map(str, sorted(shares)))}; want one of them")
    head_dim = found.number("head_dim", found.size("hidden_size") // found.size("num_attention_heads"))
    rotary_dim = int(head_dim * shares.pop()) if shares else head_dim
    return config_from_hf(
        family,
        flat,
        windows=windows_from_hf(family, document, [WINDOW_ATTENTION] * found.num_layers()),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
    )


def _config_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    written, share = config_to_hf(family, config), config.num_rotated / config.head_dim
    rope, scaling = written["rope_parameters"], config.rope_scaling
    written |= {"sliding_window": windows_to_hf(config)["sliding_window"], _SHARE: share}
    written["rope_parameters"] = {**rope, _SHARE: share}
    if isinstance(scaling, LongRope):
        # transformers 4 wants no more settings here, and the name "type".
        old = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type", _ORIGINAL)}
        written |= {_ORIGINAL: scaling.original_max_seq_len, "rope_scaling": {"type": rope["rope_type"], **old}}
    return written


def _config_from_gguf(
    family: Family,
    metadata: Mapping[str, Any],
    *,
    rope_short_factors: Tensor | None = None,
    rope_long_factors: Tensor | None = None,
    **about: Any,
) -> TransformerConfig:
    prefix = f"{family.gguf_architecture}."
    found = Settings(metadata, "GGUF")
    window, layers = f"{prefix}attention.sliding_window", found.num_layers(f"{prefix}block_count")
    size = found.number(window) if metadata.get(window) else None  # 0 is none
    head_dim = found.number(f"{prefix}attention.key_length") or (
        found.size(f"{prefix}embedding_length") // found.size(f"{prefix}attention.head_count")
    )
    rotary_dim = found.number(f"{prefix}rope.dimension_count", head_dim)
    scaling = None
    if rope_short_factors is not None and rope_long_factors is not None:
        scaling = LongRope(
            # Stored as 32-bit floats, as are those in the config.json files.
            tuple(rope_short_factors.tolist()),
            tuple(rope_long_factors.tolist()),
            found.size(f"{prefix}rope.scaling.original_context_length"),
            found.number(f"{prefix}rope.scaling.attn_factor", 1.0, kind=float),
        )
    return config_from_gguf(
        family,
        {key: value for key, value in metadata.items() if key != window},
        windows=() if size is None else (size,) * layers,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        rope_scaling=scaling,
        **about,
    )


def _long_rope(short: tuple[float, ...], long: tuple[float, ...]) -> LongRope:
    return LongRope(short, long, 4096, _FACTOR_OF_128K)


# sqrt(1 + ln(131,072 / 4,096) / ln(4,096))
_FACTOR_OF_128K = 1.1902380714238083
_3_MINI_LONG = (
    1.0700000524520874, 1.1200000047683716, 1.149999976158142, 1.4199999570846558, 1.5699999332427979, 1.7999999523162842,
    2.129999876022339, 2.129999876022339, 3.009999990463257, 5.910000324249268, 6.950000286102295, 9.070000648498535,
    9.930000305175781, 10.710000038146973, 11.130000114440918, 14.609999656677246, 15.409998893737793, 19.809999465942383,
    37.279998779296875, 38.279998779296875, 38.599998474121094, 40.12000274658203, 46.20000457763672, 50.940006256103516,
    53.66000747680664, 54.9373893737793, 56.89738845825195, 57.28738784790039, 59.98738479614258, 60.86738586425781,
    60.887386322021484, 61.71739196777344, 62.91739273071289, 62.957393646240234, 63.41739273071289, 63.8173942565918,
    63.83739471435547, 63.897396087646484, 63.93739700317383, 64.06739807128906, 64.11434936523438, 64.12435150146484,
    64.15435028076172, 64.19435119628906, 64.24435424804688, 64.57435607910156, 64.69000244140625, 64.76000213623047,
)  # fmt: skip
_3_MINI_SHORT = (
    *(1.1,) * 3, 1.3000000000000003, *(1.3500000000000003,) * 2, 1.4000000000000004, 1.5500000000000005,
    *(2.000000000000001,) * 17, *(2.0500000000000007,) * 6, *(2.1000000000000005,) * 2, 2.1500000000000004, *(2.25,) * 5,
    2.3999999999999995, 2.4499999999999993, 2.499999999999999, *(2.6999999999999984,) * 2, 2.7499999999999982,
    2.799999999999998, 2.8999999999999977, 3.049999999999997,
)  # fmt: skip
_3_5_MINI_LONG = (
    1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115, 1.600000023841858,
    1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863, 4.789999961853027, 7.400000095367432,
    7.700000286102295, 9.09000015258789, 12.199999809265137, 17.670000076293945, 24.46000099182129, 28.57000160217285,
    30.420001983642578, 30.840002059936523, 32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992,
    50.340003967285156, 50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
    62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457, 63.77000427246094,
    63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688, 64.06999969482422, 64.08000183105469,
    64.12000274658203, 64.41000366210938, 64.4800033569336, 64.51000213623047, 64.52999877929688, 64.83999633789062,
)  # fmt: skip
_3_5_MINI_SHORT = (
    1.0, 1.0199999809265137, *(1.0299999713897705,) * 2, *(1.0499999523162842,) * 5, 1.0699999332427979, 1.0999999046325684,
    1.1099998950958252, *(1.1599998474121094,) * 2, 1.1699998378753662, 1.2899998426437378, 1.339999794960022,
    1.679999828338623, 1.7899998426437378, 1.8199998140335083, 1.8499997854232788, 1.8799997568130493, 1.9099997282028198,
    1.9399996995925903, 1.9899996519088745, *(2.0199997425079346,) * 6, *(2.0299997329711914,) * 9, 2.0799996852874756,
    2.0899996757507324, 2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328, 2.749999523162842,
    2.8399994373321533,
)  # fmt: skip
_4_MINI_LONG = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898, 2.735880826,
    3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894,
    8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807,
    22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97,
    33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip

_MINI = TransformerConfig(
    vocab_size=32_064,
    embed_dim=3072,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=96,
    intermediate_dim=8192,
    max_seq_len=4096,
    norm_eps=1e-5,
    rope_base=10_000.0,
    rope_scaling=None,
    tie_embeddings=False,
    windows=(2047,) * 32,
)
_MINI_128K = replace(_MINI, max_seq_len=131_072, windows=(262_144,) * 32)
_MEDIUM = replace(
    _MINI,
    embed_dim=5120,
    num_layers=40,
    num_heads=40,
    num_kv_heads=10,
    head_dim=128,
    intermediate_dim=17_920,
    windows=(),
)

PHI3 = replace(
    LLAMA,
    name="Phi-3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    hf_constants={"hidden_act": "silu", "attention_bias": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    hf_defaults={"max_position_embeddings": 4096, _ORIGINAL: 4096, "rms_norm_eps": 1e-5},
    hf_keys=replace(
        LLAMA.hf_keys,
        fused={
            "model.layers.{}.self_attn.qkv_proj.weight": tuple(
                f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkv"
            ),
            "model.layers.{}.mlp.gate_up_proj.weight": tuple(
                f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up")
            ),
        },
    ),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    gguf_architecture="phi3",
    gguf_keys=replace(
        GGUF_KEYS,
        derived=GGUF_KEYS.derived | {SHORT_ROPE_FACTORS, LONG_ROPE_FACTORS},
        is_interleaved=False,
        fused={
            "blk.{}.attn_qkv.weight": tuple(f"blk.{{}}.attn_{name}.weight" for name in "qkv"),
            "blk.{}.ffn_up.weight": ("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"),
        },
    ),
    config_from_gguf=_config_from_gguf,
    meta_keys=None,
    config_from_meta=None,
    sizes={
        "phi3_mini_4k": ("Phi-3 mini 4k", _MINI),
        "phi3_mini_128k": (
            "Phi-3 mini 128k (June 2024)",
            replace(_MINI_128K, rope_scaling=_long_rope(_3_MINI_SHORT, _3_MINI_LONG)),
        ),
        "phi3_medium_4k": ("Phi-3 medium 4k", replace(_MEDIUM, windows=(2047,) * 40)),
        "phi3_5_mini": (
            "Phi-3.5 mini",
            replace(_MINI_128K, rope_scaling=_long_rope(_3_5_MINI_SHORT, _3_5_MINI_LONG)),
        ),
        "phi4": (
            "Phi-4 14B",
            replace(_MEDIUM, vocab_size=100_352, max_seq_len=16_384, rope_base=250_000.0),
        ),
        "phi4_mini": (
            "Phi-4 mini",
            replace(
                _MINI_128K,
                vocab_size=200_064,
                num_heads=24,
                num_kv_heads=8,
                head_dim=128,
                rotary_dim=96,
                tie_embeddings=True,
                rope_scaling=_long_rope((1.0,) * 48, _4_MINI_LONG),
            ),
        ),
    },
)
