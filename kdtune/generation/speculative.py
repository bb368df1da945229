"""Text that the student drafts and the teacher corrects (speculative knowledge distillation, arXiv 2410.11325).

Shape suffixes: N texts that are written, G drafted tokens, D embedding, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.generation.generate import check_max_new_tokens, eval_mode, new_token_limits
from kdtune.generation.rollout import Completion, check_slots, rows_of
from kdtune.generation.sampling import Sampling, sample_tokens
from kdtune.generation.slots import Served, Text, Together, has_slots, log_softmax, refill, served_by, uncompiled
from kdtune.models import Transformer

_TEACHER_SEED = 0x5D
_UNKNOWN = 2**31 - 1  # rank of an id that the teacher does not have


@dataclass(frozen=True)
class Speculation:
    """How the teacher corrects what the student drafts, by default as in the paper.

    Raises:
        ConfigError: a number is out of range.
    """

    num_drafted: int = 5
    """Tokens that the student drafts at a time."""
    top_k: int = 25
    """A drafted token stays while it is among so many most likely ones of the teacher; 1: the teacher's most likely token alone."""
    teacher_temperature: float = 0.2
    """Of the token that the teacher writes in place of the first that does not stay."""
    teacher_top_p: float | None = 0.5
    """That token is among the fewest most likely ones that hold this probability; None: any."""

    def __post_init__(self) -> None:
        if self.num_drafted < 1 or self.top_k < 1:
            raise ConfigError(f"num_drafted={self.num_drafted}, top_k={self.top_k}: must be 1 or more")
        Sampling(self.teacher_temperature, None, self.teacher_top_p)


_AS_PUBLISHED = Speculation()


@torch.no_grad()
def complete_speculatively(
    student: Transformer,
    teacher: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    seeds: Sequence[int],
    speculation: Speculation = _AS_PUBLISHED,
    slots: int = 32,
    progress: Callable[[int], object] | None = None,
    num_ids: int | None = None,
) -> list[Completion]:
    """Return a completion of each prompt, in order, with what the teacher (the partner) says of it.

    For all texts together the student drafts some tokens, the teacher reads them in one forward, and the first that is not among its top
    k is replaced by one of its own. With all ids in the top k these are the student's samples with equal seeds, see `complete`.

    Args:
        student: drafts.
        teacher: corrects; with the student's token ids.
        prompts: ids, at least one each.
        max_new_tokens: at least one.
        stop_ids: ids that end a text.
        sampling: how the student's ids are chosen; .5 and top-p .5 in the paper.
        seeds: of each prompt's own random numbers.
        speculation: how the teacher corrects.
        slots: number of texts that are written at a time.
        progress: called with the number of prompts that have just been completed.
        num_ids: draft the first so many ids alone; None: all.

    Raises:
        ConfigError: a number is out of range, or a model cannot write texts of different lengths side by side.
        DataError: a prompt is empty or leaves no room in a model's context.
    """
    check_max_new_tokens(max_new_tokens)
    check_speculative(student, teacher)
    check_slots(slots, seeds, prompts)
    if not prompts:
        return []
    limits = new_token_limits(prompts, max_new_tokens, min(one.config.max_seq_len for one in (student, teacher)))
    completions: list[Completion | None] = [None] * len(prompts)
    waiting = deque(
        Text(number, list(prompt), torch.Generator().manual_seed(seed))
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    )
    of_teacher = [torch.Generator().manual_seed(seed ^ _TEACHER_SEED) for seed in seeds]
    num_drafted = speculation.num_drafted
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) + num_drafted
    rows = rows_of(student, slots)
    with eval_mode(student, teacher), uncompiled([student, teacher]):
        drafting, reading = (
            served_by(one, min(slots, len(waiting)), rows, longest, num_drafted) for one in (student, teacher)
        )
        both = Together([drafting, reading])
        active = [waiting.popleft() for _ in range(min(both.num_slots, len(waiting)))]
        both.put({slot: text.ids for slot, text in enumerate(active)})
        while active:
            drafts, own_NGV = _drafted(student, drafting, active, num_drafted, sampling, num_ids)
            # The teacher reads what comes before each drafted token.
            for text in active:
                text.ids.pop()
            hidden_NGD = reading.hidden(active, num_drafted)[: len(active)]
            judged = _Judged(teacher.output(hidden_NGD), own_NGV, hidden_NGD, drafts)
            ended = []
            for slot, (text, draft) in enumerate(zip(active, drafts, strict=True)):
                del text.ids[len(text.ids) - num_drafted + 1 :]
                length = len(prompts[text.number])
                room = length + limits[text.number] - len(text.ids)
                written = _corrected(judged, slot, draft[:room], speculation, of_teacher[text.number])
                end = next((at + 1 for at, token in enumerate(written) if token in stop_ids), len(written))
                _note(text, written[:end], judged, slot, draft)
                text.num_rejected += num_drafted - end
                if (is_finished := text.ids[-1] in stop_ids) or end == room:
                    completions[text.number] = _completion(text, length, is_finished)
                    ended.append(slot)
            del judged, own_NGV  # or there would be two for a moment
            refill(active, ended, waiting, both)
            if progress is not None:
                progress(len(ended))
    return [completion for completion in completions if completion is not None]


def _drafted(
    student: Transformer,
    drafting: Served,
    texts: Sequence[Text],
    num_drafted: int,
    sampling: Sampling,
    num_ids: int | None,
) -> tuple[list[list[int]], Tensor]:
    """Append drafted tokens to each text; return them, and the logits [N, G, V] that they were drawn from."""
    logits = []
    for _ in range(num_drafted):
        logits.append(student.output(drafting.hidden(texts)[:, -1])[: len(texts)])
        tokens = sample_tokens(logits[-1][:, :num_ids], sampling, [text.generator for text in texts])
        for text, token in zip(texts, tokens, strict=True):
            text.ids.append(token)
    return [text.ids[-num_drafted:] for text in texts], torch.stack(logits, dim=1)


class _Judged:
    """What both models say of the drafted tokens' places."""

    def __init__(
        self, teacher_NGV: Tensor, student_NGV: Tensor, hidden_NGD: Tensor, drafts: Sequence[Sequence[int]]
    ) -> None:
        vocab_size = min(teacher_NGV.shape[-1], student_NGV.shape[-1])
        self.teacher_NGV, self.hidden_NGD = teacher_NGV[..., :vocab_size], hidden_NGD
        self._logp = [log_softmax(student_NGV), log_softmax(self.teacher_NGV)]
        drafts_NG1 = torch.tensor(drafts, device=hidden_NGD.device)[..., None]
        is_known_NG1, known_NG1 = drafts_NG1 < vocab_size, drafts_NG1.clamp(max=vocab_size - 1)
        # A sum makes a copy of its terms, which are of all ids, in its dtype.
        above_NG = (self.teacher_NGV > self.teacher_NGV.gather(-1, known_NG1)).sum(-1, dtype=torch.int32)
        # Of all drafts in one transfer each.
        self.ranks: list[list[int]] = torch.where(is_known_NG1[..., 0], above_NG, _UNKNOWN).tolist()
        self._of_drafts = [logp_NGV.gather(-1, known_NG1)[..., 0].tolist() for logp_NGV in self._logp]

    def log_probs(self, slot: int, written: Sequence[int], draft: Sequence[int]) -> list[list[float]]:
        """Return the log-probabilities of a text's new tokens by the student, and by the teacher."""
        found = []
        for logp_NGV, of_drafts in zip(self._logp, self._of_drafts, strict=True):
            own = of_drafts[slot][: len(written)]
            if written[-1] != draft[len(written) - 1]:  # only the last may be another
                own[-1] = float(logp_NGV[slot, len(written) - 1, written[-1]])
            found.append(own)
        return found


def _corrected(
    judged: _Judged, slot: int, draft: Sequence[int], speculation: Speculation, generator: torch.Generator
) -> list[int]:
    """Return the drafted tokens that stay, and the teacher's own in place of the first that does not."""
    ranks = judged.ranks[slot][: len(draft)]
    kept = next((at for at, rank in enumerate(ranks) if rank >= speculation.top_k), len(draft))
    if kept == len(draft):
        return list(draft)
    sampling = Sampling(speculation.teacher_temperature, None, speculation.teacher_top_p)
    if speculation.top_k == 1:
        sampling = Sampling(0.0)
    return [*draft[:kept], *sample_tokens(judged.teacher_NGV[slot, kept : kept + 1], sampling, [generator])]


def _completion(text: Text, num_prompt: int, is_finished: bool) -> Completion:
    hidden_AD = text.hidden_of_partner()
    return Completion(
        text.ids[num_prompt:], is_finished, text.log_probs, text.partner_log_probs, hidden_AD, text.num_rejected
    )


def _note(text: Text, written: Sequence[int], judged: _Judged, slot: int, draft: Sequence[int]) -> None:
    """Append tokens to a text, with both models' log-probabilities and the teacher's hidden states."""
    text.ids.extend(written)
    by_student, by_teacher = judged.log_probs(slot, written, draft)
    text.log_probs += by_student
    text.partner_log_probs += by_teacher
    # Copies: what is not kept of the drafts may be freed.
    text.partner_hidden += list(judged.hidden_NGD[slot, : len(written)].clone())


def check_speculative(*models: Transformer | None) -> None:
    """Raise a ConfigError if one of the models cannot write speculative text; None: it is no model in this process."""
    for model in models:
        if model is None:
            raise ConfigError("speculative text: the teacher is no model in this process; choose another regime")
        if not has_slots(model) or model.config.rope_switch is not None:
            raise ConfigError(
                f"a model of the family {model.config.family} cannot take back tokens that it has read: its attention has a window of "
                "transformers, or its rotation depends on a text's length; choose another regime"
            )
