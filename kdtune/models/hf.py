"""Models that the transformers library computes, for architectures that kdtune's own decoder does not.

`hf_model` is the family of all of them: it goes where a family goes, in a checkpointer. transformers is imported once a model's
files are looked at, and not by this module. `hf_modules.py` has the model.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from kdtune.errors import CheckpointError
from kdtune.log import get_logger
from kdtune.models.architecture import Family, KeyMap
from kdtune.models.transformer import on_meta_device

if TYPE_CHECKING:
    from kdtune.models.hf_modules import HFModel

log = get_logger(__name__)

# What of a config.json says nothing of what a model computes.
_SILENT = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version",
    "use_cache", "tie_word_embeddings",
}  # fmt: skip
_MISSING = (
    "family=kdtune.models.hf_model: needs transformers, which is not installed; install it: pip install kdtune[hf]"
)


@dataclass(frozen=True)
class HFKeys(KeyMap):
    """The names of one model's tensors; some that its files may have beside them are skipped, as transformers skips them."""

    ignored: tuple[str, ...] = ()
    """Regular expressions, found anywhere in a name."""

    def is_derived(self, name: str) -> bool:
        """Return whether the tensor may be skipped."""
        return not self.knows(name) and any(re.search(pattern, name) for pattern in self.ignored)


@dataclass(frozen=True)
class HFConfig:
    """What the rest of kdtune asks of a model that transformers computes; the counterpart of `TransformerConfig`."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    attention_dim: int
    """Of all query heads together."""
    max_seq_len: int
    tie_embeddings: bool
    logit_scale: float
    """Factor of the logits, before the soft-cap."""
    logit_softcap: float | None
    family: "HFFamily" = field(hash=False)
    windows: tuple[int, ...]
    """Numbers of tokens that layers attend to, where some have a window."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False, compare=False)
    """Names and shapes of the weights, a tied head among them."""

    rope_switch: ClassVar[None] = None
    """No rotation depends on the length of a text: such models are refused."""
    score_softcap: ClassVar[None] = None
    """Only transformers knows."""

    def window(self, _: int) -> None:
        """Return None: the cache of every layer holds all tokens, for which layers have a window only transformers knows."""

    def new_model(self) -> "HFModel":
        """Return the model on the current default device and dtype, with random weights as transformers draws them."""
        from kdtune.models.hf_form import build
        from kdtune.models.hf_modules import HFModel

        return HFModel(self, build(self.family.settings, self.family.folder, self.family.trust_remote_code))

    def described(self) -> dict[str, Any]:
        """Return the architecture as plain values."""
        return {**self.family.settings, "tie_word_embeddings": self.tie_embeddings}


@dataclass(frozen=True, repr=False)
class HFFamily(Family):
    """Every model of transformers' AutoModelForCausalLM that keeps to its interface for attention or is computed padded.

    In a config it is the family of a checkpointer, by its name or, for `trust_remote_code`, as a component:

        checkpointer:
          _component_: kdtune.checkpoint.Checkpointer
          checkpoint_dir: pythia-410m
          family: kdtune.models.hf_model

    What it computes, and what it refuses, is in docs/models.md. No file is fetched.
    """

    trust_remote_code: bool = False
    """Run the code that lies in the model's folder (`auto_map` in its config.json)."""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """config.json of one model; {}: of any."""
    folder: str | None = field(default=None, compare=False)
    """Where that model's own code lies."""

    def __call__(self, *, trust_remote_code: bool = False) -> "HFFamily":
        """Return the family with these settings.

        Args:
            trust_remote_code: run the code that lies in the model's folder (`auto_map` in its config.json), which can do anything
                that you can; a line in the log says so. Without it such a model is refused.
        """
        return replace(self, trust_remote_code=trust_remote_code)

    def describes(self, document: Mapping[str, Any]) -> bool:
        """Return True: what transformers has no causal language model for is refused by its name."""
        return True


def _config_from_hf(family: Family, document: Mapping[str, Any]) -> Any:
    assert isinstance(family, HFFamily)
    kept = {key: value for key, value in document.items() if key not in _SILENT or key == "tie_word_embeddings"}
    folder = document.get("_name_or_path") or family.folder
    named = document.get("architectures")
    # Only a model's own code depends on where it lies.
    own_code = folder if family.trust_remote_code and document.get("auto_map") else None
    config, architecture = _inspected(json.dumps(kept, sort_keys=True), own_code, family.trust_remote_code)
    own = config.family
    if named and named not in ([architecture], [own.headless]):
        raise CheckpointError(
            f"config.json: architectures={named}; transformers' AutoModelForCausalLM makes a {architecture} of it, and that is not "
            "what the weights are of; give the folder of a causal language model"
        )
    return config


def _config_to_hf(family: Family, config: Any) -> dict[str, Any]:
    assert isinstance(family, HFFamily)
    return {
        **family.settings,
        "architectures": [family.architecture],
        "tie_word_embeddings": config.tie_embeddings,
    }


@lru_cache(maxsize=8)
def _inspected(text: str, folder: str | None, trust_remote_code: bool) -> tuple[HFConfig, str]:
    """Return what kdtune needs to know of the model of a config.json, and its class; it is built without weights, once."""
    try:
        from kdtune.models import hf_form, hf_modules
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "transformers":
            raise CheckpointError(_MISSING) from error
        raise
    document = json.loads(text)
    if folder:
        log.warning("trust_remote_code=true: the code in %s is run", folder)
    with on_meta_device():
        causal = hf_form.build(document, folder, trust_remote_code)
    form = hf_form.form_of(causal)
    settings = {key: value for key, value in document.items() if key not in _SILENT}
    architecture = type(causal).__name__
    family = HFFamily(
        name=architecture,
        model_type=str(document["model_type"]),
        architecture=architecture,
        switches={},
        hf_constants={},
        hf_keys=HFKeys("Hugging Face", form.ours_by_theirs, prefix=form.prefix, ignored=form.ignored),
        config_from_hf=_config_from_hf,
        config_to_hf=_config_to_hf,
        trust_remote_code=trust_remote_code,
        settings=settings | {"tie_word_embeddings": form.ties},
        folder=folder,
    )
    config = HFConfig(
        vocab_size=form.vocab_size,
        embed_dim=form.embed_dim,
        num_layers=form.num_layers,
        attention_dim=form.attention_dim,
        max_seq_len=form.max_seq_len,
        tie_embeddings=form.ties,
        logit_scale=form.logit_scale,
        logit_softcap=form.logit_softcap,
        family=family,
        windows=form.windows,
        shapes=form.shapes,
    )
    hf_modules.check_attention(hf_modules.HFModel(config, causal))
    return config, architecture


hf_model = HFFamily(
    name="transformers",
    model_type="",
    architecture="",
    switches={},
    hf_constants={},
    hf_keys=KeyMap("Hugging Face", {}),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
)
"""The models that transformers computes: `HFFamily`."""
