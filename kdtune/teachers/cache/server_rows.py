"""Fill a teacher cache of kind topk from what a server said: the `prompt_logprobs` of vLLM's OpenAI-compatible API, as JSON lines.

Shapes: N positions that are kept of an example, K ids of each.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtune import parallel
from kdtune.config import factory
from kdtune.data import Example, MapDataset
from kdtune.errors import ConfigError, DataError
from kdtune.losses.sparse import log1mexp
from kdtune.teachers.cache.capture import headers_of, kept_positions, number
from kdtune.teachers.cache.format import begin, finish, lock_folder, write_shard
from kdtune.teachers.cache.header import Header
from kdtune.teachers.cache.kinds import KINDS, Kind, columns
from kdtune.teachers.cache.shard import Row
from kdtune.tokenizers import Tokenizer

# Probabilities that servers round may add up to this much above 1.
_ABOVE_ONE = 1e-3


def server_header(
    cfg: Any, tokenizer: Tokenizer, dataset: MapDataset, *, name: str, answers: Path, vocab_size: int | None = None
) -> Header:
    """Return the header of kind topk for a teacher that a server computes.

    Args:
        cfg: of cache_teacher.
        tokenizer: of the run.
        dataset: whose examples were asked for.
        name: of the served model.
        answers: file of what it said, whose hash the header has.
        vocab_size: rows of its head; None: of the config's teacher_model, else the number of the tokenizer's ids.

    Raises:
        ConfigError: a value is out of range, or not that of a server's log-probabilities.
        DataError: as of `headers_of`; or the answers cannot be read.
    """
    if cfg.temperature != 1:
        raise ConfigError(
            f"temperature={cfg.temperature}: a server's prompt_logprobs are of temperature 1, whatever it samples at; ~temperature"
        )
    if vocab_size is None:
        builder = factory(cfg.teacher_model)
        vocab_size = parallel.model_config(builder, None).vocab_size if builder else tokenizer.vocab_size
    kind: tuple[Kind, str] = ("topk", cfg.stored_dtype or KINDS["topk"][0])
    try:
        with answers.open("rb") as file:
            said = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{answers}: cannot be read: {error.strerror or error}") from error
    teacher = {"served": name, "answers": said}
    return headers_of(cfg, tokenizer, dataset, [kind], teacher=teacher, vocab_size=vocab_size)[0]


def import_rows(file: Path, folder: str | Path, header: Header, dataset: MapDataset) -> dict[str, Any]:
    """Write the cache of a header of kind topk from a file of answers, and return its index; shards that are there are kept.

    A line is a JSON object with ``example_id`` (or ``custom_id``, as in batch files), ``prompt_token_ids`` and ``prompt_logprobs``, at
    its top or in ``choices[0]`` of the answer, which may stand under ``response`` or ``response.body``. Lines may stand in any order;
    of several of one example the last counts, for an answer that was asked for again. Of ids that stand in several places of a line the
    innermost count, and each entry of ``prompt_logprobs`` has the text's own token: an answer to another prompt is found.

    Args:
        file: the answers.
        folder: of the cache.
        header: of it.
        dataset: whose examples were asked for; their tokens are compared.

    Raises:
        DataError: an example of the range is missing, or an answer is of other tokens, of fewer ids than k, or no log-probabilities;
            the message has file, line and example.
        ConfigError, CheckpointError: as of `begin`.
    """
    starts = _line_starts(file)
    if missing := [one for one in header.example_ids if one not in starts]:
        raise DataError(
            f"{file}: has no answer for {len(missing):,} of {header.num_examples:,} examples, such as {missing[0]}; ask for them too, or "
            "choose a range that is whole by first_example and max_examples"
        )
    for shard in begin(lock_folder(folder), header):
        rows = []
        for index in header.examples_of(shard):
            line, start = starts[index]
            example = dataset.numbered(index)
            try:
                rows.append(server_row(header, example, _answer(_line_at(file, start))))
            except DataError as error:
                raise DataError(f"{file}: line {line}, example {index}: {error}") from error
        write_shard(folder, header, shard, rows)
    return finish(folder)


def server_row(header: Header, example: Example, answer: Mapping[str, Any]) -> Row:
    """Return the row of an example from an answer with `prompt_token_ids` and `prompt_logprobs`; errors as of `import_rows`."""
    tokens, per_token = answer["prompt_token_ids"], answer["prompt_logprobs"]
    if tokens != example.tokens.tolist():
        raise DataError(_difference(tokens, example.tokens.tolist()))
    if len(per_token) != len(tokens):
        raise DataError(
            f"prompt_logprobs has {len(per_token)} entries for {len(tokens)} tokens; one for each, the first null"
        )
    kept = kept_positions(example, header.positions)
    # What the server says of a token is its distribution given the tokens before it: that of the position before.
    pairs = [_most_likely(header, int(at) + 1, per_token[at + 1]) for at in kept]
    # The ids may be those that were sent, not those that were answered: a server lists the text's own token whatever its rank.
    for at, (token, entry) in enumerate(zip(tokens, per_token, strict=True)):
        if at and not (isinstance(entry, dict) and str(token) in entry):
            raise DataError(
                f"token {at}: prompt_logprobs has no log-probability of the text's own token {token}: the answer to another prompt, or "
                "a server that leaves it out; put answers and examples together by example_id"
            )
    ids_NK = torch.tensor([[one for one, _ in pair] for pair in pairs]).view(len(kept), -1)
    logp_NK = torch.tensor([[value for _, value in pair] for pair in pairs], dtype=torch.float64).view(len(kept), -1)
    mass_N = logp_NK.logsumexp(-1)
    if len(kept) and float(mass_N.max()) > math.log1p(_ABOVE_ONE):
        at = int(kept[int(mass_N.argmax())]) + 1
        raise DataError(f"token {at}: the probabilities of its {header.num_ids} ids add up to {float(mass_N.max().exp()):.4f}; "
                        "log-probabilities are natural logarithms, of at most 1 together")  # fmt: skip
    values: dict[str, Tensor] = {"ids": ids_NK, "logp": logp_NK, "log_tail": log1mexp(mass_N)}
    expected = columns(header)
    return Row(
        number(example),
        example.tokens,
        torch.from_numpy(kept.astype(np.int32)),
        {name: values[name].to(column.dtype).view(len(kept), *column.shape) for name, column in expected.items()},
    )


def _most_likely(header: Header, at: int, entry: Any) -> list[tuple[int, float]]:
    """Return the k most likely ids of a token's entry with their log-probabilities, the most likely first.

    An entry has the text's own token too, which is not among the k most likely wherever its rank is above k.
    """
    k = header.num_ids or 0
    try:
        found = [(int(token), float(one["logprob"])) for token, one in entry.items() if int(one.get("rank") or 1) <= k]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"token {at}: prompt_logprobs must have an object id -> {{logprob, rank}} here, found {str(entry)[:60]}"
        ) from error
    found.sort(key=lambda pair: (-pair[1], pair[0]))
    if len(found) < k:
        raise DataError(
            f"token {at}: has {len(found)} ids, and k={k}; ask for prompt_logprobs={k} (vLLM: --max-logprobs {k}), or import with a "
            "smaller k"
        )
    for token, value in found[:k]:
        if not 0 <= token < header.vocab_size or not math.isfinite(value):
            raise DataError(
                f"token {at}: id {token} with log-probability {value}; ids are below {header.vocab_size} (a head with more rows: "
                "--vocab-size), log-probabilities are finite"
            )
    return found[:k]


def _difference(found: Sequence[int], expected: Sequence[int]) -> str:
    """Say where the tokens of an answer differ from an example's."""
    if len(found) != len(expected):
        return (
            f"has {len(found)} tokens, and the data set's example has {len(expected)}: another tokenizer, chat template or max_seq_len, "
            "or ids in another order; send the example's own ids as the prompt"
        )
    at = next(index for index, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
    return (
        f"token {at} is {found[at]}, and {expected[at]} in the data set's example: another tokenizer, chat template or text; send the "
        "example's own ids as the prompt"
    )


def _answer(line: str) -> dict[str, Any]:
    """Return `prompt_token_ids` and `prompt_logprobs` of a line: of several, the innermost, which are the answer's own."""
    outer = json.loads(line)
    places = [outer]
    for inner in ("response", "body", "choices"):
        one = places[-1].get(inner)
        places.append((one[0] if isinstance(one, list) and one else one) or places[-1])
        if not isinstance(places[-1], dict):
            raise DataError(f"{inner} holds {str(one)[:60]!r}; an object expected")
    found = {}
    for key in ("prompt_token_ids", "prompt_logprobs"):
        values = [one[key] for one in places if isinstance(one.get(key), list)]
        if not values:
            error = f"; the server said: {str(outer['error'])[:200]}" if outer.get("error") else ""
            raise DataError(f"has no list {key}; keep the ids that were sent, and ask for prompt_logprobs{error}")
        found[key] = values[-1]
    return found


def _line_starts(file: Path) -> dict[int, tuple[int, int]]:
    """Return line number, from 1, and place in the file of each example's last line."""
    found = {}
    for line, start, text in _lines(file):
        try:
            outer = json.loads(text)
            example_id = int(outer["example_id"] if "example_id" in outer else outer["custom_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}: line {line}: must be a JSON object with a number as its example_id, found {text[:60]!r}"
            ) from error
        found[example_id] = line, start
    return found


def _lines(file: Path) -> Iterator[tuple[int, int, str]]:
    try:
        with file.open("rb") as opened:
            start = 0
            for line, text in enumerate(opened, start=1):
                if text.strip():
                    yield line, start, text.decode("utf-8", "replace")
                start += len(text)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _line_at(file: Path, start: int) -> str:
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.readline().decode("utf-8", "replace")
