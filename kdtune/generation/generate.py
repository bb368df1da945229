"""Text from one prompt, token by token, with a key-value cache."""

from collections.abc import Collection, Sequence

import torch

from kdtune.errors import ConfigError, DataError
from kdtune.generation.eval_mode import eval_mode
from kdtune.generation.sampling import sample_token
from kdtune.models import KVCache, Transformer


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """The new ids, ending with a stop id if the model gave one; without the prompt.

    Ends after `max_new_tokens`, at a stop id, or where the model's context is full. The draws come from a generator of
    their own, so that torch's global one, which training uses, stays as it was. The model's mode is restored.

    Args:
        model: on any device.
        prompt_ids: at least one id.
        max_new_tokens: at least one.
        stop_ids: ids that end the text.
        temperature: 0 takes the most likely token each time.
        top_k: draw among this many most likely tokens; None: among all.
        seed: of the draws.

    Raises:
        ConfigError: if a number is out of range.
        DataError: if the prompt is empty or leaves no room in the model's context.
    """
    _check_arguments(max_new_tokens, temperature, top_k)
    context = model.config.max_seq_len
    if not 0 < len(prompt_ids) < context:
        raise DataError(
            f"prompt: {len(prompt_ids)} tokens; a prompt must have at least 1 and leave room in the model's {context}; "
            "change it"
        )
    num_tokens = min(len(prompt_ids) + max_new_tokens, context)
    weight = model.tok_embeddings.weight
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model.config, 1, num_tokens, weight.dtype, weight.device)
    new_ids: list[int] = []
    next_ids = list(prompt_ids)
    with eval_mode(model):
        while len(prompt_ids) + len(new_ids) < num_tokens:
            tokens_BS = torch.tensor([next_ids], device=weight.device)
            hidden_BSD = model(tokens_BS, kv_cache=cache, return_hidden=True)
            # Only the last position is projected: a long prompt's [S, V] logits would be thrown away.
            logits_V = model.output(hidden_BSD[0, -1])
            next_id = sample_token(logits_V, temperature=temperature, top_k=top_k, generator=generator)
            new_ids.append(next_id)
            if next_id in stop_ids:
                break
            next_ids = [next_id]
    return new_ids


def _check_arguments(max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: must be 1 or more")
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature}: must be 0 (the most likely token) or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}: must be 1 or more, or null for the whole vocabulary")
