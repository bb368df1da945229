"""A causal language model of the transformers library with the interface of kdtune's decoder. Only `hf.py` imports this file.

Shape suffixes: B batch, S sequence, T tokens of all documents, D embedding, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kdtune.errors import CheckpointError, ConfigError, first_line
from kdtune.log import get_logger
from kdtune.models.documents import Documents
from kdtune.models.hf import HFConfig
from kdtune.models.hf_attention import INSTEAD, INTERFACE, Allowed, allowing
from kdtune.models.hf_form import parts_of
from kdtune.models.kv_cache import KVCache, LayerCache, SlotCache, SlotLayer
from kdtune.models.lora import LoRALinear
from kdtune.models.transformer import OutputHead, Transformer, attention_mask

log = get_logger(__name__)


class HFModel(Transformer):
    """A causal language model of transformers, called as kdtune's decoder is.

    Embeddings, layers and head have the names that they have there; ``base`` is the rest. Dropout is off, but for adapters'.
    """

    config: HFConfig  # type: ignore[assignment]

    def __init__(self, config: HFConfig, causal: PreTrainedModel) -> None:
        nn.Module.__init__(self)
        self.config, parts = config, parts_of(causal)
        head: Any = causal.get_submodule(parts["output"])
        self.tok_embeddings = _take(causal, parts["tok_embeddings"])  # type: ignore[assignment]
        self.layers = _take(causal, parts["layers"])  # type: ignore[assignment]
        self.output = OutputHead.of(head.weight, softcap=config.logit_softcap)
        self.base: Any = causal.get_submodule(parts["base"])
        self.train()

    def train(self, mode: bool = True) -> "HFModel":
        """Set the mode of the adapters; everything else stays in eval mode."""
        for module in self.modules():
            module.training = mode and (module is self or isinstance(module, LoRALinear))
        return self

    def linear_names(
        self, modules: Sequence[str] | None, attn_modules: Sequence[str] | None, with_mlp: bool | None
    ) -> list[str]:
        """Return the names of the layers' linears whose last part is one of `modules`, all for None.

        Raises:
            ConfigError: no layer has such a linear; or kdtune's own names are given, which the model may not have.
        """
        found = [f"layers.{name}" for name, module in self.layers.named_modules() if isinstance(module, nn.Linear)]
        last = sorted({name.rpartition(".")[2] for name in found})
        named = {"lora_attn_modules": attn_modules, "apply_lora_to_mlp": with_mlp}
        if given := [name for name, value in named.items() if value is not None]:
            raise ConfigError(
                f"{', '.join(given)}: names modules of kdtune's own decoder; {self.config.family} has lora_modules, of {last}"
            )
        if unknown := sorted({*(modules or ())} - {*last}):
            raise ConfigError(
                f"lora_modules={unknown}: no linear of {self.config.family}'s layers has such a name; allowed are {last}"
            )
        return [name for name in found if modules is None or name.rpartition(".")[2] in modules]

    def _apply(self, fn: Any, recurse: bool = True) -> "HFModel":
        # Buffers follow to a device and keep their numbers: to_empty would lose them, .to(bfloat16) round them.
        buffers = [
            (module, name, one) for module in self.modules() for name, one in module._buffers.items() if one is not None
        ]
        for module, name, _ in buffers:
            module._buffers[name] = None
        super()._apply(fn, recurse)
        for module, name, buffer in buffers:
            module._buffers[name] = buffer if self.device.type == "meta" else buffer.to(self.device)
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        input_pos: Tensor | None = None,
        mask: Tensor | None = None,
        documents: Documents | None = None,
        kv_cache: KVCache | SlotCache | None = None,
        return_hidden: bool = False,
        return_layers: Sequence[int] = (),
    ) -> Any:
        """Return logits or hidden states, by the arguments of `Transformer.forward`; ``return_layers`` must be empty."""
        if return_layers:
            raise ConfigError(
                "hidden_loss: the layers' hidden states of a model of transformers are not given; ~hidden_loss"
            )
        num_held = 0
        if kv_cache is not None:
            kv_cache.check_room(tokens)
            num_held = kv_cache.length
        if documents is not None:
            documents.check_alone(tokens, input_pos, mask, kv_cache)
            hidden_BSD = self._documents(tokens, documents)
        else:
            allowed: Tensor | SlotCache | None = attention_mask(mask, num_held, tokens.shape[1], tokens.device)
            if isinstance(kv_cache, SlotCache):
                allowed = kv_cache if self.takes_any_mask else kv_cache.mask(None, kv_cache.places(None)[2])
            cache = None if kv_cache is None else Cache([_CacheLayer(layer, num_held) for layer in kv_cache.layers])
            positions = None if input_pos is None else input_pos.expand(tokens.shape)
            hidden_BSD = self._base(tokens, positions, allowed, cache)
        if kv_cache is not None:
            kv_cache.advance(tokens.shape[1])
        if self.config.logit_scale != 1.0:
            hidden_BSD = hidden_BSD * self.config.logit_scale
        return hidden_BSD if return_hidden else self.output(hidden_BSD)

    @property
    def takes_any_mask(self) -> bool:
        """Whether attention is kdtune's, for which documents need no padding."""
        return bool(self.base.config._attn_implementation == INTERFACE)

    @property
    def has_foreign_windows(self) -> bool:
        """Whether attention has a window and is not kdtune's: it takes no mask then."""
        return not self.takes_any_mask and bool(getattr(self.base.config, "sliding_window", None))

    def _documents(self, tokens: Tensor, documents: Documents) -> Tensor:
        if self.takes_any_mask:
            return self._base(tokens, documents.positions_T[None], documents)
        numbers_T = torch.arange(len(documents.lengths)).repeat_interleave(torch.tensor(documents.lengths))
        numbers_T = numbers_T.to(tokens.device)
        rows = tokens.new_zeros(len(documents.lengths), documents.longest)
        rows[numbers_T, documents.positions_T] = tokens[0]
        return self._base(rows)[numbers_T, documents.positions_T][None]

    def _base(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        allowed: Tensor | Documents | SlotCache | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        others: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        if isinstance(allowed, Tensor) and not self.takes_any_mask:
            mask = allowed if allowed.ndim == 4 else allowed[None, None]
            if self.has_foreign_windows:
                raise ConfigError(
                    f"{self.config.family}: its attention has a window, and takes no mask beside it; use batches of one"
                )
            is_added = self.base.config._attn_implementation == "eager"
            lowest = torch.finfo(self.dtype).min
            others["attention_mask"] = (~mask).to(self.dtype) * lowest if is_added else mask
        with allowing(allowed):
            outputs = self.base(input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **others)
        hidden_BSD: Tensor = outputs.last_hidden_state
        return hidden_BSD


def check_attention(model: HFModel) -> None:
    """Raise CheckpointError if a layer asks of kdtune's attention what it does not compute, in a forward on the meta device."""
    if not model.takes_any_mask:
        return
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        model(tokens, kv_cache=KVCache(model.config, 1, 2), return_hidden=True)  # type: ignore[arg-type]
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from error
    except Exception as error:
        if Allowed.__name__ in str(error):
            raise CheckpointError(
                f"config.json: {model.config.family} makes a mask of its own of the one that it is given, which kdtune does not compute; "
                f"{INSTEAD}"
            ) from error
        # What the meta device lacks a forward with values may have.
        log.debug("%s: on the meta device: %s", model.config.family, first_line(error))


class _CacheLayer(DynamicLayer):
    """A layer of kdtune's cache as transformers asks for it."""

    def __init__(self, layer: LayerCache | SlotLayer, num_held: int) -> None:
        super().__init__()
        self.layer, self.num_held = layer, num_held

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, S, E]; return all."""
        return self.layer.store(self.num_held, key_states, value_states)

    def get_seq_length(self) -> int:
        """Return the number of tokens before this forward."""
        return self.num_held


def _take(module: nn.Module, path: str) -> nn.Module:
    """Make a submodule a plain attribute of its parent, whose parameters are no longer the parent's, and return it."""
    parent, _, leaf = path.rpartition(".")
    holder = module.get_submodule(parent)
    found = holder._modules.pop(leaf)
    assert found is not None
    vars(holder)[leaf] = found
    return found
