"""Adapter from a kdtune model to lm-eval's model class. Imports lm_eval: import this module inside functions only."""

from collections.abc import Sequence
from typing import Any, TypeVar

from lm_eval.api.model import LM
from tqdm import tqdm

from kdtune import generation
from kdtune.distributed import SINGLE_PROCESS, World, parallel_map_batched
from kdtune.evaluation.encoding import encode_pair, encode_text
from kdtune.evaluation.generation_settings import (
    GenerationSettings,
    StopStrings,
    cut_at_stops,
    read_generation_settings,
)
from kdtune.evaluation.rolling import score_texts
from kdtune.evaluation.scoring import ROW_TOKENS, score
from kdtune.log import bar_settings
from kdtune.models import Transformer
from kdtune.tokenizers import Tokenizer

T = TypeVar("T")


class KDTuneLM(LM):
    """Answer lm-eval's requests with a kdtune model.

    Args:
        model: on any device, in fp32 or bf16.
        tokenizer: the model's own.
        batch_size: sequences generated side by side, and rows of 1,024 tokens a forward pass when scoring.
        max_length: longest input in tokens; None: the model's context.
        seed: seed of sampled tokens, in tasks that sample.
        show_progress: show a bar on stderr.
        world: the processes that share the work. lm-eval runs on each of them as if it were the only one; the requests are
            rank 0's, and only its results count.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 0,
        show_progress: bool = True,
        world: World = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        self.model = model
        self.max_length = max_length or model.config.max_seq_len
        self.batch_size = batch_size
        self.seed = seed
        self._show_progress = show_progress
        self._world = world
        self._text_tokenizer = tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches this tokenizer's requests."""
        return f"{type(self._text_tokenizer).__name__}-{self._text_tokenizer.vocab_size}"

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-text token."""
        return self._text_tokenizer.eos_id

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's template."""
        return self._text_tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render the messages as text; without a generation prompt it ends with the last message's words, to be continued."""
        text = self._text_tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, whether it is the greedy one) for each request's (context, continuation)."""
        pairs = self._agreed([encode_pair(self._text_tokenizer, *request.args) for request in requests])
        with self._bar(len(pairs), "scoring", disable_tqdm) as bar:
            scores = score(
                self.model,
                pairs,
                max_length=self.max_length,
                batch_tokens=self.batch_size * ROW_TOKENS,
                on_scored=bar.update,
                world=self._world,
            )
        return [(one.logprob, one.is_greedy) for one in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability in nats of each request's full text."""
        texts = self._agreed([encode_text(self._text_tokenizer, request.args[0]) for request in requests])
        return score_texts(
            self.model,
            self._text_tokenizer,
            texts,
            max_length=self.max_length,
            batch_tokens=self.batch_size * ROW_TOKENS,
            show_progress=self._show_progress and not disable_tqdm,
            world=self._world,
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each request's context, up to its stop strings."""
        prompts, settings = self._agreed(
            (
                [encode_text(self._text_tokenizer, request.args[0]) for request in requests],
                [read_generation_settings(request.args[1]) for request in requests],
            )
        )
        lengths = [len(prompt) for prompt in prompts]

        def answer(batch: list[int]) -> list[str]:
            seeds = [self.seed + index for index in batch]
            return self._generate([prompts[index] for index in batch], settings[batch[0]], seeds)

        with self._bar(len(requests), "generating", disable_tqdm) as bar:
            return parallel_map_batched(
                answer, lengths, self.batch_size, self.model, self._world, groups=settings, on_done=bar.update
            )

    def _agreed(self, value: T) -> T:
        """Broadcast rank 0's value: a task file's code may order its documents at random, differently on each process."""
        return self._world.broadcast(value)

    def _generate(self, prompts: list[list[int]], settings: GenerationSettings, seeds: list[int]) -> list[str]:
        room = settings.prompt_room(self.max_length)
        stops = StopStrings(self._text_tokenizer, settings.until)
        answers = generation.generate_batch(
            self.model,
            [prompt[-room:] for prompt in prompts],
            max_new_tokens=settings.max_new_tokens,
            stop_ids=self._text_tokenizer.stop_ids,
            sampling=settings.sampling,
            seed=seeds,
            should_stop=stops,
        )
        return [cut_at_stops(self._text_tokenizer.decode(ids, skip_special=True), settings.until) for ids in answers]

    def _bar(self, total: int, what: str, disable: bool) -> "tqdm[Any]":
        return tqdm(
            total=total, desc=what, unit="request", disable=disable or not self._show_progress, **bar_settings()
        )
