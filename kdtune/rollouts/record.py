"""A rollout: a text that a model has written after a prompt of the data, as it is trained on.

Shapes: S tokens of prompt and answer, A those of the answer, D width of the teacher's hidden states.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kdtune.data import Batch, Dataset, Example, make_example
from kdtune.errors import DataError

_NUM_CHECKED = 64  # examples, of a dataset that may be read from its source for it


@dataclass(frozen=True)
class Prompt:
    """The beginning of an example, up to its first trained token."""

    ids: tuple[int, ...]
    key: int
    """Index of the example in its dataset; in a stream a hash of the ids."""
    route: str | None = None
    """Value of the column that chooses the example's teacher."""


@dataclass(frozen=True)
class Rollout:
    """A text that a model has written, and what is known of it."""

    tokens: npt.NDArray[np.int64]
    """Prompt and answer [S], as they were generated: never decoded and encoded again."""
    prompt_length: int
    is_finished: bool
    """The model has ended it by a stop id, which is its last token; False: it was cut, and no end is learned from it."""
    source: str
    """Who has written it: "student", "teacher", "mixed" or "speculative"."""
    step: int
    """Number of optimizer steps that the student had made."""
    key: int
    """Of its prompt."""
    route: str | None = None
    """Of its prompt."""
    log_probs: npt.NDArray[np.float64] | None = None
    """Natural log-probabilities [A] of the answer's tokens at temperature 1 by the student, or of the teacher's own text by the teacher."""
    teacher_log_probs: npt.NDArray[np.float64] | None = None
    """The teacher's; None where they are not needed."""
    target: Tensor | None = None
    """The teacher's last hidden states [A, D] where these tokens are predicted, on the CPU; None: not kept."""

    @property
    def answer_length(self) -> int:
        """A."""
        return len(self.tokens) - self.prompt_length

    def example(self) -> Example:
        """Return it as a training example: each token of the answer is a target, its end included if the model wrote it."""
        return make_example(self.tokens, np.arange(len(self.tokens)) >= self.prompt_length, route=self.route)


def prompts_of(batch: Batch) -> Iterator[Prompt]:
    """Yield the prompts of a batch's rows, on the CPU; none for the batch of a process that has no example left."""
    if batch.prompt_lengths is None:
        return
    tokens, keys = batch.tokens.flatten(), batch.example_ids
    for row, (start, length) in enumerate(zip(batch.row_starts, batch.prompt_lengths, strict=True)):
        ids = tuple(tokens[start : start + length].tolist())
        key = random_seed(*ids) if keys is None else keys[row]
        yield Prompt(ids, key, None if batch.routes is None else batch.routes[row])


def prompts_of_dataset(dataset: Dataset, max_prompts: int | None = None) -> Iterator[Prompt]:
    """Yield the prompts of a dataset's examples, each document of a pack by itself, in its own order; `max_prompts`: the first ones."""
    examples = dataset.examples(seed=0, epoch=0, shuffle=False)
    documents = (one for example in examples for one in example.documents or (example,))
    for number, one in enumerate(islice(documents, max_prompts)):
        yield Prompt(tuple(one.tokens[: one.prompt_length].tolist()), number, one.route)


def check_prompts(dataset: Dataset, key: str = "dataset") -> None:
    """Raise a DataError if a dataset's first examples have no prompts, as they are trained on from their second token on.

    `key` is the dataset's in the config.
    """
    if all(len(prompt.ids) <= 1 for prompt in prompts_of_dataset(dataset, _NUM_CHECKED)):
        raise DataError(
            f"{key}: has no prompts to answer: its examples are trained on from their second token on, as with train_on=all, the default "
            f"of Alpaca's builders; set {key}.train_on=answers, or give another dataset"
        )


def random_seed(*numbers: int) -> int:
    """Return a seed, 0 to 2**63 - 1, that depends on all of the numbers: equal ones, and hardly any others, give an equal one."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1
