"""The decoder: plain modules that know nothing of files, configs, devices, adapters or parallelism.

Shape suffixes: B batch, S sequence, T tokens attended to, D embedding, H heads, K kv heads, E head dim, V vocabulary,
F feed-forward.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kdtune.errors import ConfigError
from kdtune.models.architecture import TransformerConfig
from kdtune.models.attention import Attention, norm_of, with_block_masks
from kdtune.models.documents import Documents
from kdtune.models.kv_cache import KVCache, LayerCache, SlotCache, SlotLayer
from kdtune.models.rope import LongRope, YarnRope, inverse_frequencies, long_rope_frequencies, rope_tables
from kdtune.tensor_types import is_plain

TensorParallelStyle = Literal["by_outputs", "by_inputs", "by_heads", "over_heads", "shared"]
"""Each process has some of a linear layer's outputs, or of its inputs; applies a norm to its own heads, or over those of all
processes; or does not divide a block's input, but the modules in it."""

USUAL_ATTN_MODULES = ("q_proj", "v_proj", "output_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")

# Standard deviation of a fresh model's weights, as in GPT-2 and its successors.
INIT_STD = 0.02


def new_model(config: TransformerConfig) -> "Transformer":
    """Return a model of an architecture, which another library may compute (`kdtune.models.hf_model`), as `Transformer` makes it."""
    return Transformer(config) if isinstance(config, TransformerConfig) else config.new_model()


def rotary_heads(name: str, config: TransformerConfig) -> int | None:
    """Return the number of heads of a weight whose rows are in rotary order, as q and k; None for the others."""
    return {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])


class FeedForward(nn.Module):
    """SwiGLU or GeGLU (arXiv 2002.05202): ``down(activation(gate(x)) * up(x))``, without biases."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        embed_dim, intermediate_dim = config.embed_dim, config.intermediate_dim
        self.activation = config.activation
        self.gate_proj = nn.Linear(embed_dim, intermediate_dim, bias=False)
        self.up_proj = nn.Linear(embed_dim, intermediate_dim, bias=False)
        self.down_proj = nn.Linear(intermediate_dim, embed_dim, bias=False)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        gate_BSF, up_BSF = self.gate_proj(hidden_BSD), self.up_proj(hidden_BSD)
        if not torch.is_grad_enabled():  # the same, and a call less for each token that is generated
            return self.down_proj(_activated(gate_BSF, self.activation).mul_(up_BSF))
        return self.down_proj(_GatedActivation.apply(gate_BSF, up_BSF, self.activation))


class _GatedActivation(torch.autograd.Function):
    """``activation(gate) * up``, whose backward computes the activation again: autograd would keep it, a seventh of a layer's memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activated(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_up = _activated(gate, ctx.activation).mul_(grad)
        grad_activated = grad * up
        if ctx.activation == "silu":
            return torch.ops.aten.silu_backward(grad_activated, gate), grad_up, None
        return torch.ops.aten.gelu_backward(grad_activated, gate, approximate="tanh"), grad_up, None


def _activated(gate: Tensor, activation: str) -> Tensor:
    return functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with norms before or after it, added to the residual stream; ``index`` counts from 0."""

    TENSOR_PARALLEL: ClassVar[Mapping[str, TensorParallelStyle]] = {
        **dict.fromkeys(("attn", "mlp"), "shared"),
        **dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), "by_outputs"),
        **dict.fromkeys(("attn.output_proj", "mlp.down_proj"), "by_inputs"),
    }
    """How tensor parallelism divides each module among processes, see ``kdtune.parallel.tensor_parallel``; the norms of
    queries and keys besides, by ``qk_norm``."""

    QK_NORM_PARALLEL: ClassVar[Mapping[str, TensorParallelStyle]] = {"head": "by_heads", "projection": "over_heads"}

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()

        def norm(placement: str) -> nn.Module:
            is_there = config.norm_placement in (placement, "both")
            return norm_of(config, config.embed_dim) if is_there else nn.Identity()

        self.residual_scale = config.residual_scale
        self.attn_norm, self.attn, self.attn_post_norm = norm("before"), Attention(config, index), norm("after")
        self.mlp_norm, self.mlp, self.mlp_post_norm = norm("before"), FeedForward(config), norm("after")

    def forward(
        self,
        hidden_BSD: Tensor,
        rope: tuple[Tensor, ...],
        mask: Tensor | Documents | None = None,
        cache: LayerCache | SlotLayer | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """Map [B, S, D] to [B, S, D]; the arguments are those of ``Attention.forward``."""
        added_BSD = self.attn(self.attn_norm(hidden_BSD), rope, mask, cache, cache_length)
        hidden_BSD = hidden_BSD + self._scaled(self.attn_post_norm(added_BSD))
        added_BSD = self.mlp(self.mlp_norm(hidden_BSD))
        return hidden_BSD + self._scaled(self.mlp_post_norm(added_BSD))

    def _scaled(self, added_BSD: Tensor) -> Tensor:
        return added_BSD if self.residual_scale == 1.0 else added_BSD * self.residual_scale


class OutputHead(nn.Linear):
    """Linear map from hidden states to logits, without bias, and an optional soft-cap on the logits.

    It maps ``embed_dim`` to ``vocab_size`` values, with its weight on ``device``. Call it for logits. A loss that computes them
    chunk by chunk asks for ``projection`` and ``softcap``, see
    ``kdtune.losses.Head``.

    Args:
        embed_dim: Width of the hidden states.
        vocab_size: Number of logits.
        softcap: Bound on the logits; None: none.
        device: Device of the weight; None: torch's default.
    """

    def __init__(
        self, embed_dim: int, vocab_size: int, *, softcap: float | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__(embed_dim, vocab_size, bias=False, device=device)
        self.softcap = softcap

    @classmethod
    def of(cls, weight_VD: Tensor, *, softcap: float | None = None) -> "OutputHead":
        """Return a head that has this weight, not a copy of it; one that is no parameter is frozen."""
        head = cls(weight_VD.shape[1], weight_VD.shape[0], softcap=softcap, device="meta")
        is_parameter = isinstance(weight_VD, nn.Parameter)
        head.weight = weight_VD if is_parameter else nn.Parameter(weight_VD, requires_grad=False)
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] for hidden states [..., D]."""
        return soft_capped(super().forward(hidden), self.softcap)

    def projection(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return [T, K] and [V, K], whose product ``first @ second.T`` is the logits before the soft-cap; here K is D."""
        return hidden_TD, self.weight

    def projection_problem(self) -> str | None:
        """Return what keeps ``projection`` from being two plain matrices, such as a quantized weight; None if nothing does."""
        return None if is_plain(self.weight) else f"has a weight that is a {type(self.weight).__name__}"


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118); the logits themselves for None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class Transformer(nn.Module):
    """Decoder-only language model, built on the current default device and dtype."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(TransformerLayer(config, index) for index in range(config.num_layers))
        # The logits are linear in the hidden states: divided here, no head, loss or teacher needs to know of it.
        self.norm = norm_of(config, config.embed_dim, divisor=config.logit_divisor)
        # A tied head needs no memory of its own, not even for a moment.
        head_device = "meta" if config.tie_embeddings else None
        self.output = OutputHead(config.embed_dim, config.vocab_size, softcap=config.logit_softcap, device=head_device)
        # A plain attribute, not a buffer: to_empty, .to(bfloat16) and checkpoints must not touch it.
        self._inverse_frequencies = [inverse_frequencies(config.num_rotated, config.rope_base, config.rope_scaling)]
        if config.window_rope_base is not None:
            self._inverse_frequencies.append(inverse_frequencies(config.num_rotated, config.window_rope_base, None))
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """Make the head share the embeddings' Parameter if the config ties them.

        Call it again after ``to_empty`` or ``load_state_dict(assign=True)``, which untie them.
        """
        if self.config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights from N(0, 0.02²), set the norms' gains to 1, without their offset, and biases to 0."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:  # where a value is none, drawing it only takes time
                continue
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.constant_(parameter, 1.0 - self.config.norm_offset)
            else:
                nn.init.normal_(parameter, std=INIT_STD)

    @property
    def device(self) -> torch.device:
        """Device of the weights, on which tokens are expected."""
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings, and so of the hidden states."""
        return self.tok_embeddings.weight.dtype

    def linear_names(
        self, modules: Sequence[str] | None, attn_modules: Sequence[str] | None, with_mlp: bool | None
    ) -> list[str]:
        """Return the names of the layers' linears that adapters go on: the arguments of `kdtune.models.apply_lora`.

        Raises:
            ConfigError: `modules` is given, which names those of a model that transformers computes.
        """
        if modules is not None:
            raise ConfigError(
                f"lora_modules={list(modules)}: is for a model that transformers computes; here lora_attn_modules and apply_lora_to_mlp "
                "say what is adapted"
            )
        if attn_modules is None:
            # Only the feed-forward is listed; or nothing is, or all but the feed-forward.
            attn_modules, with_mlp = ((), True) if with_mlp else (USUAL_ATTN_MODULES, with_mlp is None)
        inner = [f"attn.{name}" for name in attn_modules] + [f"mlp.{name}" for name in MLP_MODULES if with_mlp]
        return [f"layers.{index}.{name}" for index in range(len(self.layers)) for name in inner]

    def embed(
        self, tokens: Tensor, input_pos: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the first layer's input [B, S, D], and the rotary tables that all layers take beside theirs.

        ``input_pos`` is the position of each token, [S] or [B, S]; None starts from 0. ``documents`` are as in `rope`.
        """
        if input_pos is None:
            input_pos = torch.arange(tokens.shape[1], device=tokens.device)
        hidden_BSD = self.tok_embeddings(tokens)
        if self.config.embedding_scale != 1.0:
            # Rounded to the weights' dtype first, as where such models are trained.
            hidden_BSD = hidden_BSD * torch.tensor(self.config.embedding_scale, dtype=hidden_BSD.dtype, device="cpu")
        return hidden_BSD, self.rope(input_pos, hidden_BSD.dtype, documents)

    def rope(self, positions: Tensor, dtype: torch.dtype, documents: Documents | None = None) -> tuple[Tensor, ...]:
        """Return the rotary tables that all layers of one forward share, for positions [S] or [B, S]: a cosine and a sine, and
        another pair for the layers with a window if they have a base of their own.

        With `LongRope` the last position of each row tells the length of its text; that of ``documents`` is each document's.
        """
        if not positions.is_meta and positions.device != self._inverse_frequencies[0].device:
            # Kept there: a copy in every forward would make a GPU wait for each new token.
            self._inverse_frequencies = [each.to(positions.device) for each in self._inverse_frequencies]
        (scaled, *others), scaling = self._inverse_frequencies, self.config.rope_scaling
        factor = scaling.attention_factor if isinstance(scaling, LongRope | YarnRope) else 1.0
        if isinstance(scaling, LongRope):
            lengths = positions.amax(-1, keepdim=True) + 1 if documents is None else documents.lengths_of_tokens[None]
            scaled = long_rope_frequencies(scaled, lengths, scaling.original_max_seq_len)
        tables = [rope_tables(positions, scaled, dtype, factor=factor)]
        tables += [rope_tables(positions, each, dtype) for each in others]
        return tuple(table for pair in tables for table in pair)

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
        """Return logits [B, S, V], or with ``return_hidden`` the hidden states [B, S, D] after the final norm.

        Args:
            tokens: Token ids. Right-padded batches need no mask: attention is causal.
            input_pos: Position of each token, [S] or [B, S]; None continues after the cached tokens, or starts from 0.
            mask: Bool, [B, S, T] or broadcastable to it, True where a token may attend; None is causal. T is S plus
                the number of cached tokens.
            documents: Those that the tokens [1, S] are, end to end: each is attended to by itself, and its positions start
                from 0. Not together with input_pos, mask or kv_cache.
            kv_cache: Cache of the preceding tokens; the new ones are appended to it. Where a text grows beyond
                ``config.rope_switch``, the keys that it holds are of no more use: empty it, and pass the whole text.
            return_hidden: For losses that project chunk by chunk, so that [B, S, V] never exists.
            return_layers: With ``return_hidden``, return a pair: these hidden states, and a list of those after so many
                layers, 1 to all; after all of them they are the first of the pair, so after the norm. No other is held.

        Raises:
            ValueError: documents come with one of the arguments that they replace, or are not of these tokens; a text grows
                beyond ``config.rope_switch`` (only noticed without input_pos).
        """
        num_held = 0
        if kv_cache is not None:
            kv_cache.check_room(tokens)
            num_held = kv_cache.length
            if input_pos is None:
                _check_rotation(self.config, num_held, tokens.shape[1])
        num_new = tokens.shape[1]
        allowed: Tensor | Documents | None
        if documents is not None:
            documents.check_alone(tokens, input_pos, mask, kv_cache)
            allowed, input_pos = with_block_masks(documents, self.config), documents.positions_T[None]
        else:
            allowed = attention_mask(mask, num_held, num_new, tokens.device)
        if input_pos is None:
            input_pos = torch.arange(num_held, num_held + num_new, device=tokens.device)
        hidden_BSD, rope = self.embed(tokens, input_pos, documents)
        states: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            cache = None if kv_cache is None else kv_cache.layers[index]
            hidden_BSD = layer(hidden_BSD, rope, allowed, cache, num_held)
            if index + 1 in return_layers:
                states[index + 1] = hidden_BSD
        if kv_cache is not None:
            kv_cache.advance(num_new)
        hidden_BSD = self.norm(hidden_BSD)
        if return_layers:
            states[len(self.layers)] = hidden_BSD
            return hidden_BSD, [states[number] for number in return_layers]
        return hidden_BSD if return_hidden else self.output(hidden_BSD)


def _check_rotation(config: TransformerConfig, num_held: int, num_new: int) -> None:
    if config.rope_switch is not None and 0 < num_held <= config.rope_switch < num_held + num_new:
        raise ValueError(
            f"kv_cache: {num_held} tokens held and {num_new} new ones; beyond {config.rope_switch} tokens all of a text are rotated "
            "otherwise (LongRoPE): kv_cache.truncate(), and pass the whole text"
        )


def attention_mask(mask: Tensor | None, num_held: int, num_new: int, device: torch.device) -> Tensor | None:
    """Return the mask [B, S, T] with a heads dimension, [B, 1, S, T]; None if the causal fast path is correct."""
    if mask is not None:
        return mask[..., None, :, :]
    if num_held == 0 or num_new == 1:
        return None
    # Several new tokens after held ones: the fast path would align the causal triangle with the first key.
    return torch.ones(num_new, num_held + num_new, dtype=torch.bool, device=device).tril(num_held)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """A context in which modules are made on the meta device; `torch.nn.init` does nothing, for there is nothing to fill."""
    with _WithoutInit(), torch.device("meta"):
        yield


class _WithoutInit(TorchFunctionMode):
    """Skips torch.nn.init, whose normal_ on the meta device would be traced by torch's compiler: a second of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
