"""Architecture of a decoder, and the model family that it belongs to: what its files call its settings and tensors."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from torch import Tensor

from kdtune.errors import CheckpointError, ConfigError
from kdtune.models.rope import AnyScaling, LongRope, YarnRope

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")

MOST_LAYERS = 10_000
_MOST = {"num_layers": MOST_LAYERS, "head_dim": 2**16, "max_seq_len": 2**48, "norm_eps": 1e6, "rope_base": 1e30}
_MOST_OF_THE_REST = 2**28
_NOT_SIZES = (
    "rope_scaling",
    "tie_embeddings",
    "qkv_bias",
    "qk_norm",
    "norm_placement",
    "norm_rounds_last",
    "activation",
    "windows",
    "rotates",
    "family",
)
_CHOICES = {
    "qk_norm": (None, "head", "projection"),
    "norm_placement": ("before", "after", "both"),
    "activation": ("silu", "gelu_tanh"),
}
_MOST_PARAMETERS = 10**16


@dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a decoder.

    ``max_seq_len`` is the context the weights were trained for; forward does not enforce it. ``family`` says how the model's
    files are named and described; None: as Llama's, for a model whose switches have their defaults.

    The switches: ``qkv_bias`` adds a bias to queries, keys and values; ``qk_norm`` normalizes them before the rotation, each
    "head" by itself or the whole "projection". ``norm_placement`` says whether attention and feed-forward have a norm "before"
    them, "after" them or "both"; with ``norm_rounds_last`` a norm multiplies by its gain before it rounds from fp32, not after;
    the gain is the norm's weight plus ``norm_offset``. ``activation`` is the feed-forward's, "gelu_tanh" the approximation of
    GELU by tanh.
    ``logit_softcap`` bounds the logits, see ``OutputHead``, and ``score_softcap`` in the same way the scaled scores, before the
    mask. Embeddings are multiplied by ``embedding_scale``, what attention and feed-forward add to the residual stream by
    ``residual_scale``, and scores by ``attention_scale`` (None: head_dim**-0.5); logits are divided by ``logit_divisor``.
    Two have a value for each layer. ``windows``: the number of tokens that a token attends to, itself and the last ones before
    it, or None for all; () is None for every layer. ``rotates``: whether queries and keys are rotated; () is True for every
    layer. Of each head the first ``rotary_dim`` values are rotated; None: all. Layers with a window are rotated by
    ``window_rope_base``, without ``rope_scaling``; None: as the others.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_dim: int
    max_seq_len: int
    norm_eps: float
    rope_base: float
    rope_scaling: AnyScaling | None
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    norm_placement: Literal["before", "after", "both"] = "before"
    norm_rounds_last: bool = False
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    logit_softcap: float | None = None
    score_softcap: float | None = None
    attention_scale: float | None = None
    residual_scale: float = 1.0
    embedding_scale: float = 1.0
    logit_divisor: float = 1.0
    windows: tuple[int | None, ...] = ()
    rotates: tuple[bool, ...] = ()
    rotary_dim: int | None = None
    window_rope_base: float | None = None
    family: "Family | None" = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _NOT_SIZES or value is each.default:
                continue
            # No model is near these sizes: such a value is a mistake that would fill the memory before it is noticed.
            most = _MOST.get(each.name, _MOST_OF_THE_REST)
            if not 0 < value <= most:
                raise ConfigError(f"{each.name}={value}: must be above 0 and at most {most}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: must be even, rotary embeddings turn pairs")
        self._check_rope()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, choices))}")
        for name in ("windows", "rotates"):
            if getattr(self, name) and len(getattr(self, name)) != self.num_layers:
                raise ConfigError(
                    f"{name}: {len(getattr(self, name))} values; must be one for each of {self.num_layers} layers"
                )
        if any(window is not None and not 0 < window <= _MOST["max_seq_len"] for window in self.windows):
            raise ConfigError(f"windows={self.windows}: must be numbers of tokens above 0, or None")
        if self.num_parameters > _MOST_PARAMETERS:
            names = ("embed_dim", "num_layers", "num_heads", "head_dim", "intermediate_dim", "vocab_size")
            raise ConfigError(
                f"{', '.join(f'{name}={getattr(self, name)}' for name in names)}: {self.num_parameters:.2g} parameters; must be "
                f"at most {_MOST_PARAMETERS:.0e}; check the sizes"
            )

    def _check_rope(self) -> None:
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ConfigError(f"rotary_dim={self.rotary_dim}: must be even and at most head_dim={self.head_dim}")
        if not isinstance(self.rope_scaling, LongRope | YarnRope):
            return
        if isinstance(self.rope_scaling, YarnRope) and self.rope_base <= 1:
            raise ConfigError(f"rope_base={self.rope_base}: must be above 1 for YarnRope")
        if not 0 < self.rope_scaling.original_max_seq_len <= _MOST["max_seq_len"]:
            raise ConfigError(
                f"rope_scaling: original_max_seq_len={self.rope_scaling.original_max_seq_len}: must be above 0"
            )
        if isinstance(self.rope_scaling, YarnRope):
            return
        for name in ("short_factors", "long_factors"):
            factors = getattr(self.rope_scaling, name)
            if len(factors) != self.num_rotated // 2 or not all(0 < factor < 2**20 for factor in factors):
                raise ConfigError(
                    f"rope_scaling: {len(factors)} {name}; must be {self.num_rotated // 2} above 0, one for each rotated pair"
                )

    @property
    def attention_dim(self) -> int:
        """Return the width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def num_rotated(self) -> int:
        """Return how many values of each query and key head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def rope_switch(self) -> int | None:
        """Return the number of tokens beyond which all tokens of a text are rotated otherwise; None: texts of any length alike."""
        return self.rope_scaling.original_max_seq_len if isinstance(self.rope_scaling, LongRope) else None

    @property
    def is_plain(self) -> bool:
        """Return whether every switch has its default: the model computes what the models without switches compute."""
        switches = [each for each in fields(self) if each.default is not MISSING and each.name != "family"]
        return all(getattr(self, each.name) == each.default for each in switches)

    @property
    def qk_norm_dims(self) -> tuple[int, int] | None:
        """Return the sizes of the norms on queries and keys; None without them."""
        if self.qk_norm is None:
            return None
        return (
            (self.head_dim, self.head_dim)
            if self.qk_norm == "head"
            else (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim)
        )

    def window(self, layer: int) -> int | None:
        """Return the number of tokens that a token attends to in this layer; None: all before it, and itself."""
        return self.windows[layer] if self.windows else None

    def is_rotated(self, layer: int) -> bool:
        """Return whether this layer rotates queries and keys."""
        return not self.rotates or self.rotates[layer]

    def with_layers(self, layers: Sequence[int]) -> Self:
        """Return the architecture of a model of these layers alone."""
        windows = tuple(self.window(index) for index in layers)
        rotates = tuple(self.is_rotated(index) for index in layers)
        return replace(
            self,
            num_layers=len(layers),
            windows=windows if any(windows) else (),
            rotates=() if all(rotates) else rotates,
        )

    def described(self) -> dict[str, Any]:
        """Return the architecture as plain values, without the fields that say nothing: a new one changes no description."""
        return {
            each.name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for each in fields(self)
            if each.name != "family" and (value := getattr(self, each.name)) != each.default
        }

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters of a model of these sizes, a tied head counted once."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        biases = self.qkv_bias * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        norms = sum(self.qk_norm_dims or ())
        num_norms = 4 if self.norm_placement == "both" else 2
        layer = self.embed_dim * (attention + 3 * self.intermediate_dim + num_norms) + biases + norms
        return self.embed_dim * ((1 if self.tie_embeddings else 2) * self.vocab_size + 1) + self.num_layers * layer


@dataclass(frozen=True)
class KeyMap:
    """Another format's tensor names, mapped to ours and back. ``{}`` in a pattern is the layer's number."""

    format: str
    ours_by_theirs: Mapping[str, str]
    derived: frozenset[str] = frozenset()
    """Names of tables that old checkpoints contain and the model computes itself."""
    is_interleaved: bool = False
    """The rows of q and k are in interleaved order: see :func:`unpermute`."""
    norm_offset: float = 0.0
    """What a stored gain is more than ours: the gain itself, where ``TransformerConfig.norm_offset`` is added to ours."""
    prefix: str = "model."
    """What begins all names but the head's, and is missing in the files of a model that was saved without its head."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of matrices that hold several of ours, one below the other: for each the names, in the same format, of its parts."""

    def plus(self, ours_by_theirs: Mapping[str, str]) -> Self:
        """Return a map with more names, for models with more weights."""
        return replace(self, ours_by_theirs={**self.ours_by_theirs, **ours_by_theirs})

    def without(self, *ours: str) -> Self:
        """Return a map without these names of ours, for models that lack the weights or call them otherwise."""
        return replace(
            self, ours_by_theirs={theirs: name for theirs, name in self.ours_by_theirs.items() if name not in ours}
        )

    @cached_property
    def _theirs_by_ours(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.ours_by_theirs.items()}

    def knows(self, name: str) -> bool:
        """Return whether the name is a weight of these models in this format."""
        return _pattern(name)[0] in self.ours_by_theirs

    def parts_of(self, name: str) -> tuple[str, ...]:
        """Return the names, in this format, of the matrices that the one of this name holds; its own alone if it is no fused one."""
        pattern, layer = _pattern(name)
        return tuple(part.replace("{}", layer) for part in self.fused.get(pattern, (pattern,)))

    def whole_of(self, name: str) -> str:
        """Return the name, in this format, of the matrix that holds the one of this name; its own if that is stored by itself."""
        pattern, layer = _pattern(name)
        return next((whole for whole, parts in self.fused.items() if pattern in parts), pattern).replace("{}", layer)

    def is_derived(self, name: str) -> bool:
        """Return whether the tensor may be skipped because the model computes it from its config."""
        return _pattern(name)[0] in self.derived

    def to_kdtune(self, name: str) -> str:
        """Return our name for theirs. Raises CheckpointError for a name that none of these models has."""
        return self._translate(name, self.ours_by_theirs)

    def from_kdtune(self, name: str) -> str:
        """Return their name for ours. Raises CheckpointError for a name that none of these models has."""
        return self._translate(name, self._theirs_by_ours)

    def _translate(self, name: str, table: Mapping[str, str]) -> str:
        pattern, layer = _pattern(name)
        if pattern not in table:
            raise CheckpointError(
                f"unexpected tensor name: {name!r}; no weight of this model has it as its {self.format} name"
            )
        return table[pattern].replace("{}", layer)


def _pattern(name: str) -> tuple[str, str]:
    """Return the name with its layer number replaced by {}, and that number ('' if there is none)."""
    found = _LAYER.search(name)
    return (_LAYER.sub("{}", name, count=1), found.group()) if found else (name, "")


def without_layer(name: str) -> str:
    """Return a tensor's name with its layer's number replaced by {}."""
    return _pattern(name)[0]


@dataclass(frozen=True, repr=False)
class Family:
    """Models that share an architecture: how their files name and describe what ``Transformer`` computes.

    A family of your own is made from another one by ``dataclasses.replace``, see docs/extending.md.
    """

    name: str
    """For messages, such as "Llama"."""
    model_type: str
    """``model_type`` in config.json."""
    architecture: str
    """The model's class in transformers, ``architectures`` in config.json, such as "LlamaForCausalLM"."""
    switches: Mapping[str, Any]
    """Fields of ``TransformerConfig`` that have one value in all models of the family."""
    hf_constants: Mapping[str, Any]
    """Settings of config.json that have one value in all models of the family."""
    hf_keys: KeyMap
    hf_defaults: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """Values that transformers takes where config.json lacks the setting, if they are not its LlamaConfig's."""
    with_images: tuple[str, str] | None = field(default=None, kw_only=True)
    """``model_type`` and class of models that consist of one of these, whose settings are in ``text_config``, and of parts for images."""
    config_from_hf: Callable[["Family", Mapping[str, Any]], TransformerConfig]
    """Read a config.json; see ``kdtune.models.file_configs.config_from_hf``."""
    config_to_hf: Callable[["Family", TransformerConfig], dict[str, Any]]
    """Write one; see ``kdtune.models.file_configs.config_to_hf``."""
    gguf_architecture: str | None = None
    """``general.architecture`` in a GGUF file; None: the family's GGUF files are not read."""
    gguf_keys: KeyMap | None = None
    config_from_gguf: Callable[..., TransformerConfig] | None = None
    """Read a GGUF file's metadata; see ``kdtune.models.file_configs.config_from_gguf``, which None stands for."""
    meta_keys: KeyMap | None = None
    """Names in Meta's consolidated.NN.pth; None: the family has none."""
    config_from_meta: Callable[..., TransformerConfig] | None = None
    """Read a params.json; see ``kdtune.models.llama``."""
    sizes: Mapping[str, tuple[str, TransformerConfig]] = field(default_factory=dict)
    """Published sizes by the name of their builder: title and config."""

    def __repr__(self) -> str:
        return self.name

    def describes(self, document: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` is of a model of the family, saved with its head or without it."""
        # The head is missed where the embedding does not take its place.
        named = document.get("architectures")
        is_named = named in ([self.architecture], [self.headless])
        return is_named or (not named and document.get("model_type") == self.model_type)

    @property
    def headless(self) -> str:
        """Class of the same model without its head in transformers, such as "LlamaModel"."""
        return self.architecture.replace("ForCausalLM", "Model")


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder each head's rows of a q or k weight from interleaved (Meta, GGUF) to half-split (ours, Hugging Face's).

    The first dimension is the rows; the others may be anything, including quantized blocks.
    """
    rows = weight.unflatten(0, (num_heads, -1, 2))
    return rows.transpose(1, 2).flatten(0, 2).contiguous()


def weight_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's weights, as in its `state_dict()`, without building it."""
    if not isinstance(config, TransformerConfig):
        return dict(config.shapes)
    dim, inner = config.embed_dim, config.intermediate_dim
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    attn_extras: dict[str, tuple[int, ...]] = {}
    if config.qkv_bias:
        attn_extras |= {f"attn.{name}_proj.bias": (count * config.head_dim,) for name, count in heads.items()}
    if config.qk_norm_dims:
        attn_extras |= {
            f"attn.{name}_norm.weight": (size,) for name, size in zip("qk", config.qk_norm_dims, strict=True)
        }
    norms = [
        name
        for name, placement in {"norm": "before", "post_norm": "after"}.items()
        if config.norm_placement in (placement, "both")
    ]
    of_layer = {
        **{f"attn_{name}.weight": (dim,) for name in norms},
        "attn.q_proj.weight": (config.num_heads * config.head_dim, dim),
        "attn.k_proj.weight": (config.num_kv_heads * config.head_dim, dim),
        "attn.v_proj.weight": (config.num_kv_heads * config.head_dim, dim),
        "attn.output_proj.weight": (dim, config.num_heads * config.head_dim),
        **attn_extras,
        **{f"mlp_{name}.weight": (dim,) for name in norms},
        "mlp.gate_proj.weight": (inner, dim),
        "mlp.up_proj.weight": (inner, dim),
        "mlp.down_proj.weight": (dim, inner),
    }
    return {
        "tok_embeddings.weight": (config.vocab_size, dim),
        **{f"layers.{index}.{name}": shape for index in range(config.num_layers) for name, shape in of_layer.items()},
        "norm.weight": (dim,),
        "output.weight": (config.vocab_size, dim),
    }
