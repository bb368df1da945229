"""ROUGE-L of a model's answers to instructions (Lin 2004, https://aclanthology.org/W04-1013).

The score is that of `rouge_score` (in the [eval] extra) as the distillation papers use it: F1 of the longest common
subsequence of words, where words are runs of a-z and 0-9 of the lower-cased text and those longer than three characters
are reduced by the Porter stemmer. Scores are multiplied by 100, as published.
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from kdtune import generation
from kdtune.config import instantiate
from kdtune.data import Message, Source, open_rows, read_problems
from kdtune.data.alpaca import PROMPTS
from kdtune.data.columns import MissingColumnError, any_column, check_column_map, suggest_question_columns, text_column
from kdtune.data.files import DataFiles
from kdtune.distributed import SINGLE_PROCESS, World, parallel_map_batched
from kdtune.errors import ConfigError, DataError
from kdtune.models import Transformer
from kdtune.tokenizers import Tokenizer

_COLUMNS = ("instruction", "input", "output")
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]*")
# Between the seeds of neighbouring instructions; larger than any seed that a config is likely to name.
_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class Instruction:
    """A prompt's text and its reference answers; the best match counts."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """A set of instructions with reference answers, and the settings for a model's own answers.

    name: its name in the results: letters, digits, '.', '_' and '-'.
    source, split, data_files, data_dir: where the rows come from, see kdtune.data.Source; column_map: from instruction,
    input and output to its columns; output is a text or a list of them.
    num_examples: number of rows to use, from the first; None: all.
    prompt: "alpaca" is the wording of Stanford Alpaca, MiniLLM and DSKD; "plain" the instruction, a blank line and the
    input. apply_chat_template: the prompt is a user's message in the tokenizer's chat template, as in kdtune's
    datasets; False: the plain prompt, as in the papers.
    max_new_tokens: longest answer. temperature, top_k, top_p: how tokens are sampled (temperature 0: the most likely).
    seeds: each seed gives one answer to each instruction; the papers sample at temperature 1 with seeds 10, 20, 30, 40, 50.
    """

    name: str
    source: str
    split: str = "train"
    data_files: DataFiles | None = None
    data_dir: str | None = None
    column_map: dict[str, str] | None = None
    num_examples: int | None = None
    prompt: Literal["alpaca", "plain"] = "alpaca"
    apply_chat_template: bool = False
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.endswith("_stderr"):
            raise ConfigError(
                f"rouge.name={self.name!r}: letters, digits, '.', '_' and '-' only, with a letter or digit first, and not "
                "ending in _stderr, since results and files are named by it; choose another name"
            )
        check_column_map(self.column_map, _COLUMNS)
        if self.num_examples is not None and self.num_examples < 1:
            raise ConfigError(f"rouge.{self.name}.num_examples={self.num_examples}: must be at least 1")
        try:
            generation.check_max_new_tokens(self.max_new_tokens)
            _ = self.sampling
        except ConfigError as error:
            raise ConfigError(f"rouge.{self.name}.{error}") from error
        if not self.seeds or (len(self.seeds) > 1 and self.temperature == 0.0):
            raise ConfigError(
                f"rouge.{self.name}.seeds={self.seeds}: one seed, or several with a temperature above 0 "
                "(at 0 every answer is the same)"
            )

    @property
    def sampling(self) -> generation.Sampling:
        """How tokens are chosen."""
        return generation.Sampling(self.temperature, self.top_k, self.top_p)

    def read(self) -> list[Instruction]:
        """Read the instructions; DataError if the source cannot be read, has no row, or a row lacks a column."""
        source = Source(self.source, self.split, self.data_files, self.data_dir)
        instructions = []
        for number, row in enumerate(islice(open_rows(source), self.num_examples), start=1):
            try:
                instructions.append(self._instruction(row))
            except MissingColumnError as error:
                settings = suggest_question_columns(_COLUMNS)(row)
                settings = {} if "_component_" in settings else settings  # that of a dataset
                place = f"rouge.{self.name}: {source.label}: row {number}"
                raise MissingColumnError(f"{place}: {error.problem}", settings) from error
            except DataError as error:
                raise DataError(f"rouge.{self.name}: {source.label}: row {number}: {error}") from error
        if not instructions:
            raise DataError(f"rouge.{self.name}: {source.label}: the set is empty (0 rows); check source and split")
        return instructions

    def _instruction(self, row: Mapping[str, Any]) -> Instruction:
        columns = {name: (self.column_map or {}).get(name, name) for name in _COLUMNS}
        instruction = text_column(row, columns["instruction"])
        context = "" if row.get(columns["input"]) is None else text_column(row, columns["input"])
        found = any_column(row, columns["output"])
        references = tuple(found) if isinstance(found, list) and found else (text_column(row, columns["output"]),)
        return Instruction(PROMPTS[self.prompt](instruction, context), references)

    def prompt_ids(self, tokenizer: Tokenizer, instruction: Instruction) -> list[int]:
        """Return the token ids of an instruction's prompt."""
        if self.apply_chat_template:
            messages = [Message("user", instruction.prompt)]
            return tokenizer.tokenize_messages(messages, add_generation_prompt=True)[0]
        return tokenizer.encode(instruction.prompt, add_bos=tokenizer.begins_with_bos, add_eos=False)


def repeated(names: Sequence[str]) -> list[str]:
    """Return the names that occur more than once."""
    return sorted({name for name in names if names.count(name) > 1})


def rouge_problems(nodes: Any) -> list[str]:
    """Return problems with the `rouge` nodes of a config: their arguments, and the first row of sources on this machine."""
    if not isinstance(nodes, list):
        return [
            "rouge: must be a list of sets; write rouge=[{_component_: kdtune.evaluation.InstructionSet, name: ..., source: ...}]"
        ]
    names = [node.get("name", "") for node in nodes]
    found = [f"rouge: the name {name!r} occurs twice; sets need different names" for name in repeated(names)]
    sets = {f"rouge.{number}": node for number, node in enumerate(nodes)}
    return found + read_problems(sets, lambda node: instantiate(node).read())


@dataclass(frozen=True)
class RougeResult:
    """ROUGE-L of a set, 0 to 100: the mean, its standard error over the instructions, and the details."""

    mean: float
    stderr: float
    truncated: int
    """Number of prompts truncated on the left to leave room for the answer."""
    records: list[dict[str, Any]]
    """One entry per seed and instruction: prompt, references, answer, and its score."""


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return ROUGE-L F1 of an answer, 0 to 100, against the reference that it matches best."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return 100.0 * max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)


def evaluate_rouge(
    model: Transformer,
    tokenizer: Tokenizer,
    instruction_set: InstructionSet,
    instructions: Sequence[Instruction],
    *,
    max_length: int,
    batch_size: int = 8,
    on_answered: Callable[[int], object] | None = None,
    world: World = SINGLE_PROCESS,
) -> RougeResult:
    """Generate an answer to each instruction for each seed, and score the answers.

    Args:
        model: on its device.
        tokenizer: the model's.
        instruction_set: prompt and sampling settings; ConfigError if its max_new_tokens leaves no room for a prompt.
        instructions: as read by the set.
        max_length: longest prompt and answer together, in tokens.
        batch_size: answers generated at a time.
        on_answered: called with the number of new answers as they arrive.
        world: the processes that share the work, all of which call this with the same instructions and get all answers.
    """
    room = max_length - instruction_set.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"rouge.{instruction_set.name}.max_new_tokens={instruction_set.max_new_tokens}: leaves no room for a prompt "
            f"in max_seq_length={max_length}"
        )
    whole = [instruction_set.prompt_ids(tokenizer, instruction) for instruction in instructions]
    prompts = [ids[-room:] for ids in whole]
    records: list[dict[str, Any]] = []
    for seed in instruction_set.seeds:
        answers = _answers(model, tokenizer, instruction_set, prompts, seed, batch_size, on_answered, world)
        for instruction, answer in zip(instructions, answers, strict=True):
            score = rouge_l(answer, instruction.references)
            records.append({"seed": seed, "prompt": instruction.prompt, "references": list(instruction.references),
                            "answer": answer, "rouge_l": score})  # fmt: skip
    count = len(instructions)
    means = [statistics.fmean(record["rouge_l"] for record in records[i::count]) for i in range(count)]
    stderr = statistics.stdev(means) / math.sqrt(count) if count > 1 else math.nan
    truncated = sum(len(ids) > room for ids in whole)
    return RougeResult(statistics.fmean(means), stderr, truncated, records)


def _answers(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: InstructionSet,
    prompts: Sequence[Sequence[int]],
    seed: int,
    batch_size: int,
    on_answered: Callable[[int], object] | None,
    world: World,
) -> list[str]:
    """Generate the answers' texts."""
    lengths = [len(prompt) for prompt in prompts]

    def generate(batch: list[int]) -> list[list[int]]:
        return generation.generate_batch(
            model,
            [prompts[index] for index in batch],
            max_new_tokens=settings.max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            sampling=settings.sampling,
            # Each answer has its own random stream, so that it does not depend on the rest of the batch.
            seed=[seed + _SEED_STEP * index for index in batch],
        )

    answers = parallel_map_batched(generate, lengths, batch_size, model, world, on_done=on_answered)
    return [tokenizer.decode(ids, skip_special=True).strip() for ids in answers]
