"""Architecture of a decoder, and the model family that it belongs to: what its files call its settings and tensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

from torch import Tensor

from kdtune.errors import CheckpointError, ConfigError
from kdtune.models.rope import RopeScaling

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")

_MOST = {"num_layers": 10_000, "head_dim": 2**16, "max_seq_len": 2**48, "norm_eps": 1e6, "rope_base": 1e30}
_MOST_OF_THE_REST = 2**28
_MOST_PARAMETERS = 10**16


@dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a decoder.

    ``max_seq_len`` is the context the weights were trained for; forward does not enforce it. ``family`` says how the model's
    files are named and described; None: as Llama's, for a model without the switches below. ``qkv_bias`` and ``qk_norm``
    are ``Attention``'s; ``logit_softcap`` bounds the logits, see ``OutputHead``.
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
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    logit_softcap: float | None = None
    family: "Family | None" = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in ("rope_scaling", "tie_embeddings", "family") or value is each.default:
                continue
            # No model is near these sizes: such a value is a mistake that would fill the memory before it is noticed.
            most = _MOST.get(each.name, _MOST_OF_THE_REST)
            if not 0 < value <= most:
                raise ConfigError(f"{each.name}={value}: must be above 0 and at most {most}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: must be even, rotary embeddings turn pairs")
        if self.num_parameters > _MOST_PARAMETERS:
            names = ("embed_dim", "num_layers", "num_heads", "head_dim", "intermediate_dim", "vocab_size")
            raise ConfigError(
                f"{', '.join(f'{name}={getattr(self, name)}' for name in names)}: {self.num_parameters:.2g} parameters; must be "
                f"at most {_MOST_PARAMETERS:.0e}; check the sizes"
            )

    def described(self) -> dict[str, Any]:
        """Return the architecture as plain values, without the fields that say nothing: a new one changes no description."""
        return {
            each.name: asdict(value) if isinstance(value, RopeScaling) else value
            for each in fields(self)
            if each.name != "family" and (value := getattr(self, each.name)) != each.default
        }

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters of a model of these sizes, a tied head counted once."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        biases = self.qkv_bias * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = self.embed_dim * (attention + 3 * self.intermediate_dim + 2) + biases + 2 * self.qk_norm * self.head_dim
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

    def plus(self, ours_by_theirs: Mapping[str, str]) -> Self:
        """Return a map with more names, for models with more weights."""
        return replace(self, ours_by_theirs={**self.ours_by_theirs, **ours_by_theirs})

    @cached_property
    def _theirs_by_ours(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.ours_by_theirs.items()}

    def knows(self, name: str) -> bool:
        """Return whether the name is a weight of these models in this format."""
        return _pattern(name)[0] in self.ours_by_theirs

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
    config_from_hf: Callable[["Family", Mapping[str, Any]], TransformerConfig]
    """Read a config.json; see ``kdtune.models.file_configs.config_from_hf``."""
    config_to_hf: Callable[["Family", TransformerConfig], dict[str, Any]]
    """Write one; see ``kdtune.models.file_configs.config_to_hf``."""
    gguf_architecture: str | None = None
    """``general.architecture`` in a GGUF file; None: the family's GGUF files are not read."""
    gguf_keys: KeyMap | None = None
    meta_keys: KeyMap | None = None
    """Names in Meta's consolidated.NN.pth; None: the family has none."""
    config_from_meta: Callable[..., TransformerConfig] | None = None
    """Read a params.json; see ``kdtune.models.llama``."""
    sizes: Mapping[str, tuple[str, TransformerConfig]] = field(default_factory=dict)
    """Published sizes by the name of their builder: title and config."""

    def __repr__(self) -> str:
        return self.name

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
