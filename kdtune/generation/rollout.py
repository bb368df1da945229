"""Samples of many prompts, for training on them: fast, and none depends on another."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.generation.generate import check_max_new_tokens, new_token_limits
from kdtune.generation.sampling import Sampling
from kdtune.generation.slots import Partner, Text, grow
from kdtune.models import Transformer

# Rows that the linear layers compute on a CPU in each forward, with so many slots or fewer: the number of rows decides how a kernel
# rounds.
_ROWS = 32


def check_slots(slots: int, seeds: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
    """Raise a ConfigError if there is no slot, or not one seed for each prompt."""
    if slots < 1:
        raise ConfigError(f"slots={slots}: must be 1 or more")
    if len(seeds) != len(prompts):
        raise ConfigError(f"seeds: {len(seeds)} for {len(prompts)} prompts; give one for each")


def rows_of(model: Transformer, slots: int) -> int:
    """Return the rows that the linear layers of a model compute in each forward for so many slots, see `grow`."""
    return max(_ROWS, slots) if model.device.type == "cpu" else 1


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    ids: list[int]
    """The new ids, including the final stop id if the model produced one."""
    is_finished: bool
    """It ended with a stop id; False: it was cut at a limit, and no stop id is invented."""
    log_probs: list[float] | None
    """Natural logarithm of the model's own probability of each new id (temperature 1, whole vocabulary), computed in fp32, of a
    float64 model in float64; None if not asked for."""
    partner_log_probs: list[float] | None = None
    """Those by the partner; None without one."""
    partner_hidden: Tensor | None = None
    """The partner's last hidden states [A, D], after its final norm, that predict each new id, on the CPU; None without one."""
    num_rejected: int = 0
    """Tokens that were drafted and are not among the new ids: a model has computed them too."""

    @property
    def num_computed(self) -> int:
        """Tokens whose logits the model has computed for it, one place before each."""
        return len(self.ids) + self.num_rejected


def complete(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    seeds: Sequence[int],
    slots: int = 32,
    with_log_probs: bool = False,
    sync_tokens: bool = False,
    progress: Callable[[int], object] | None = None,
    partner: Transformer | None = None,
    partner_share: float = 0.5,
    num_ids: int | None = None,
    compile: bool = False,
) -> list[Completion]:
    """Return a completion of each prompt, in order.

    A text ends at a stop id, after ``max_new_tokens``, or where the model's context is full; its slot is then given the next prompt,
    whose tokens go through the model alone in fp32 on a CPU, elsewhere with those of other new prompts. Equal ones share that forward.

    In fp32 on a CPU a completion does not depend, to the bit, on the other prompts, on their order, on ``slots`` up to 32, or on which
    process computes it, if all have as many threads. The model computes as it is, in eval mode and with its adapters; its mode is
    restored, and torch's global generator is not used.

    Args:
        model: on any device.
        prompts: ids, at least one each; any number of them.
        max_new_tokens: at least one.
        stop_ids: ids that end a text.
        sampling: how each id is chosen.
        seeds: of each prompt's own random numbers.
        slots: number of texts that grow at a time; memory for their keys and values grows with it. Fewer than 32 save no time on a CPU.
        with_log_probs: return ``Completion.log_probs``.
        sync_tokens: every process continues with rank 0's ids. For processes that complete the same prompts, such as those of a
            sharded model: a rounding error on one could end a text that continues on another.
        progress: called with the number of prompts that have just been completed.
        partner: a second model, such as a teacher, that writes with it: each id is drawn from the mixture of their distributions, and
            ``sampling`` applies to that.
        partner_share: its part of the mixture.
        num_ids: draw from the first so many ids alone, such as those that a teacher's head has too; None: from all.
        compile: compile the forward of the next tokens, once for a process (`kdtune.generation.compiled`), unless the model is sharded or
            quantized, or one that transformers computes. Its kernels may round otherwise.

    Raises:
        ConfigError: a number is out of range, or there is not one seed for each prompt.
        DataError: a prompt is empty or leaves no room in the model's context.
        CheckpointError: the model's logits are not finite.
    """
    check_max_new_tokens(max_new_tokens)
    check_slots(slots, seeds, prompts)
    if not prompts:
        return []
    contexts = [one.config.max_seq_len for one in (model, partner) if one is not None]
    limits = new_token_limits(prompts, max_new_tokens, min(contexts))
    completions: list[Completion | None] = [None] * len(prompts)

    def has_ended(text: Text) -> bool:
        num_prompt, is_finished = len(prompts[text.number]), text.ids[-1] in stop_ids
        if not is_finished and len(text.ids) < num_prompt + limits[text.number]:
            return False
        completions[text.number] = Completion(
            text.ids[num_prompt:],
            is_finished,
            text.log_probs if with_log_probs else None,
            None if partner is None else text.partner_log_probs,
            None if partner is None else text.hidden_of_partner(),
        )
        if progress is not None:
            progress(1)
        return True

    grow(
        model,
        [
            Text(number, list(prompt), torch.Generator().manual_seed(seed))
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ],
        has_ended,
        sampling=sampling,
        slots=slots,
        rows=rows_of(model, slots),
        longest=max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)),
        with_log_probs=with_log_probs or partner is not None,
        sync_tokens=sync_tokens,
        partner=None if partner is None else Partner(partner, partner_share),
        num_ids=num_ids,
        compile=compile,
    )
    return [completion for completion in completions if completion is not None]
