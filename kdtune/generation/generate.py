"""Generate text from one prompt or many, token by token, with a key-value cache.

Shape suffixes: B unfinished sequences, S new tokens, T cached and new tokens, D embedding, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdtune.distributed import broadcast_object
from kdtune.errors import ConfigError, DataError
from kdtune.generation.sampling import GREEDY, Sampling, sample_tokens
from kdtune.models import KVCache, Transformer
from kdtune.tensor_types import is_fsdp_module


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    on_token: Callable[[int], object] | None = None,
    sync_tokens: bool = False,
) -> list[int]:
    """Return the new ids after prompt_ids, including a final stop id if the model produced one; see generate_batch."""
    (new_ids,) = generate_batch(
        model,
        [prompt_ids],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        seed=seed,
        on_token=None if on_token is None else lambda _, token: on_token(token),
        sync_tokens=sync_tokens,
    )
    return new_ids


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int | Sequence[int] = 0,
    on_token: Callable[[int, int], object] | None = None,
    should_stop: Callable[[int, list[int]], bool] | None = None,
    sync_tokens: bool = False,
) -> list[list[int]]:
    """Return the new ids of each prompt, without the prompt, including a final stop id if the model produced one.

    A text ends after `max_new_tokens`, at a stop id, when `should_stop` returns true, or when the model's context is full;
    it then leaves the batch. The prompts may differ in length: a prompt's text does not depend on its neighbours (up to
    rounding), though prompts of similar length waste less. Tokens are drawn from separate random generators, so torch's
    global one, which training uses, is unchanged. The model's mode is restored.

    Args:
        model: on any device.
        prompts: ids, at least one each.
        max_new_tokens: at least one.
        stop_ids: ids that end a text.
        sampling: how each token is chosen; the most likely one by default.
        seed: prompt number i, from 0, samples with the seed `seed + i`; or one seed per prompt.
        on_token: called with a prompt's number and its new id, for each new id.
        should_stop: called with a prompt's number and its new ids so far (not to be changed); true ends that text.
        sync_tokens: every process continues with rank 0's tokens. For processes that generate from the same prompts, such
            as those of a sharded model: a rounding error on one could end a text that continues on another.

    Raises:
        ConfigError: a number is out of range.
        DataError: a prompt is empty or leaves no room in the model's context.
    """
    check_max_new_tokens(max_new_tokens)
    if not prompts:
        return []
    limits = new_token_limits(prompts, max_new_tokens, model.config.max_seq_len)
    if is_fsdp_module(model):
        model.unshard()  # only then have its weights the dtype and device that they compute in
    tokens_BS, padding_B = _left_padded(prompts, model.device)
    cache = KVCache(model.config, len(prompts), tokens_BS.shape[1] + max(limits))
    seeds = [seed + index for index in range(len(prompts))] if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    new_ids: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # which prompt each row belongs to
    with eval_mode(model):
        while True:
            hidden_BSD = _forward(model, tokens_BS, padding_B, cache)
            # Only the last position is projected: a long prompt's [S, V] logits would be thrown away.
            logits_BV = model.output(hidden_BSD[:, -1])
            tokens = sample_tokens(logits_BV, sampling, [generators[i] for i in active])
            tokens = broadcast_object(tokens) if sync_tokens else tokens
            rows = []
            for row, (index, token) in enumerate(zip(active, tokens, strict=True)):
                new_ids[index].append(token)
                if on_token is not None:
                    on_token(index, token)
                ends = token in stop_ids or len(new_ids[index]) == limits[index]
                if not ends and not (should_stop is not None and should_stop(index, new_ids[index])):
                    rows.append(row)
            if not rows:
                return new_ids
            if len(rows) < len(active):
                cache.keep_sequences(rows)
                active, tokens = [active[row] for row in rows], [tokens[row] for row in rows]
                padding_B = None if padding_B is None else padding_B[rows]
            tokens_BS = torch.tensor(tokens, device=model.device)[:, None]
            if any(len(prompts[i]) + len(new_ids[i]) - 1 == model.config.rope_switch for i in active):
                # From here on all tokens of that text are rotated otherwise: the keys that are held are of no more use.
                cache.truncate()
                tokens_BS, padding_B = _left_padded([[*prompts[i], *new_ids[i]] for i in active], model.device)


def check_max_new_tokens(max_new_tokens: int) -> None:
    """Raise a ConfigError if no token could be generated."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: must be 1 or more")


def new_token_limits(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> list[int]:
    """Return how many ids may follow each prompt; raise a DataError if none may."""
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            name = "prompt" if len(prompts) == 1 else f"prompts[{index}]"
            raise DataError(
                f"{name}: {len(prompt)} tokens; a prompt must have at least 1 and leave room in the model's {context}; "
                "change it"
            )
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Pad the prompts on the left; return them and the number of padding tokens of each, None if all are 0."""
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    # Any id will do for padding: nothing sees it.
    tokens_BS = torch.tensor(
        [[0] * padded + list(prompt) for padded, prompt in zip(padding, prompts, strict=True)], device=device
    )
    return tokens_BS, torch.tensor(padding, device=device) if any(padding) else None


def _forward(model: Transformer, tokens_BS: Tensor, padding_B: Tensor | None, cache: KVCache) -> Tensor:
    """Return hidden states [B, S, D]; positions count from each sequence's first real token, and padding is masked."""
    if padding_B is None:
        hidden_BSD: Tensor = model(tokens_BS, kv_cache=cache, return_hidden=True)
        return hidden_BSD
    held, num_new = cache.length, tokens_BS.shape[1]
    slots_T = torch.arange(held + num_new, device=tokens_BS.device)
    slots_S = slots_T[held:]
    positions_BS = (slots_S - padding_B[:, None]).clamp(min=0)
    is_real_BT = slots_T >= padding_B[:, None]
    # Padding sees itself: a query that sees nothing would have no defined output.
    is_self_ST = slots_T == slots_S[:, None]
    mask_BST = (slots_T <= slots_S[:, None]) & (is_real_BT[:, None] | is_self_ST)
    hidden_BSD = model(tokens_BS, input_pos=positions_BS, mask=mask_BST, kv_cache=cache, return_hidden=True)
    return hidden_BSD


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """A context in eval mode under no_grad; afterwards every module is back in its previous mode."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
