"""Perplexity of full texts, window by window."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from kdtune.distributed import SINGLE_PROCESS, World
from kdtune.errors import ConfigError, DataError
from kdtune.evaluation.divergence import perplexity
from kdtune.evaluation.encoding import encode_text, prefix_id
from kdtune.evaluation.scoring import ROW_TOKENS, Pair, score
from kdtune.log import bar_settings
from kdtune.models import Transformer
from kdtune.paths import user_path
from kdtune.tokenizers import Tokenizer


def rolling_windows(ids: Sequence[int], prefix: int, max_length: int, stride: int | None = None) -> Iterator[Pair]:
    """Return the (context, continuation) windows that predict each id once.

    The first window predicts up to `max_length` ids after the prefix token; every further one predicts the next `stride`
    ids with as much context as the model can hold. stride None: a full window, so that only the last window overlaps
    (lm-eval's rolling log-likelihood); a smaller stride costs more and gives every id more context.

    Raises:
        ConfigError: stride is not in 1 ... max_length.
    """
    stride = max_length if stride is None else stride
    if not 1 <= stride <= max_length:
        raise ConfigError(f"perplexity_stride={stride}: must lie between 1 and max_seq_length={max_length}")
    end = min(max_length, len(ids))
    if end:
        yield [prefix], ids[:end]
    while end < len(ids):
        start, end = end, min(end + stride, len(ids))
        yield ids[max(0, end - max_length - 1) : start], ids[start:end]


def score_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[int]],
    *,
    max_length: int,
    batch_tokens: int,
    stride: int | None = None,
    show_progress: bool = False,
    world: World = SINGLE_PROCESS,
) -> list[float]:
    """Return the log-probability in nats of each text's ids; 0 for an empty text. Progress is shown window by window.

    `world`: the processes that share the work, see `score`.
    """
    windows = [list(rolling_windows(ids, prefix_id(tokenizer), max_length, stride)) for ids in texts]
    pairs = [pair for of_text in windows for pair in of_text]
    with tqdm(
        total=len(pairs), desc="scoring texts", unit="window", disable=not show_progress, **bar_settings()
    ) as bar:
        scores = iter(
            score(model, pairs, max_length=max_length, batch_tokens=batch_tokens, on_scored=bar.update, world=world)
        )
    return [math.fsum(next(scores).logprob for _ in of_text) for of_text in windows]


@dataclass(frozen=True)
class TextPerplexity:
    """Log-probability of a text under a model, in nats, and the text's sizes."""

    logprob: float
    tokens: int
    words: int
    bytes: int

    @property
    def metrics(self) -> dict[str, float]:
        """`token_perplexity`, `word_perplexity`, `byte_perplexity` and `bits_per_byte`."""
        return {
            "token_perplexity": perplexity(-self.logprob / self.tokens),
            "word_perplexity": perplexity(-self.logprob / self.words),
            "byte_perplexity": perplexity(-self.logprob / self.bytes),
            "bits_per_byte": -self.logprob / self.bytes / math.log(2),
        }


def read_text(path: str | Path) -> str:
    """Read the text of a file; DataError if it cannot be read, is not UTF-8, or is empty."""
    try:
        text = user_path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"perplexity_files={path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"perplexity_files={path}: holds no text; give a file with some")
    return text


def text_perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_length: int,
    stride: int | None = None,
    batch_size: int = 8,
    show_progress: bool = False,
    world: World = SINGLE_PROCESS,
) -> TextPerplexity:
    """Measure how well the model predicts a full text; words are separated by whitespace, as lm-eval counts them.

    A bos at the start of the text is its context and is not predicted (lm-eval's rolling tasks do predict it).
    `tokenizer` is the model's. `max_length` is the length of a window in tokens, `stride` the tokens by which it
    advances (None: a full window). `show_progress` shows a bar on a terminal; `batch_size` and `world` are as in
    `score`.
    """
    ids = encode_text(tokenizer, text)
    if tokenizer.begins_with_bos and len(ids) > 1 and ids[0] == prefix_id(tokenizer):
        ids = ids[1:]
    batch_tokens = batch_size * ROW_TOKENS
    (logprob,) = score_texts(
        model, tokenizer, [ids], max_length=max_length, batch_tokens=batch_tokens, stride=stride,
        show_progress=show_progress, world=world,
    )  # fmt: skip
    return TextPerplexity(logprob, len(ids), len(re.split(r"\s+", text)), len(text.encode("utf-8")))
