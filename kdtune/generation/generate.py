"""Generate text from one prompt or many, token by token."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kdtune.errors import ConfigError, DataError
from kdtune.generation.sampling import GREEDY, Sampling
from kdtune.models import Transformer


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
    it then leaves the batch. The prompts may differ in length: a prompt's text does not depend on its neighbours, up to
    rounding. `complete` is for more prompts than a batch, and for samples that do not depend on them at all. Tokens are drawn from
    separate random generators, so torch's global one, which training uses, is unchanged. The model's mode is restored.

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
    # Imported with the first text: a training run may have none.
    from kdtune.generation.slots import Text, grow

    limits = new_token_limits(prompts, max_new_tokens, model.config.max_seq_len)
    seeds = [seed + number for number in range(len(prompts))] if isinstance(seed, int) else seed
    texts = [
        Text(number, list(prompt), torch.Generator().manual_seed(own))
        for number, (prompt, own) in enumerate(zip(prompts, seeds, strict=True))
    ]

    def has_ended(text: Text) -> bool:
        number, token, num_prompt = text.number, text.ids[-1], len(prompts[text.number])
        if on_token is not None:
            on_token(number, token)
        if token in stop_ids or len(text.ids) == num_prompt + limits[number]:
            return True
        return should_stop is not None and should_stop(number, text.ids[num_prompt:])

    grow(
        model,
        texts,
        has_ended,
        sampling=sampling,
        slots=len(texts),
        longest=max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)),
        sync_tokens=sync_tokens,
    )
    return [text.ids[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


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
