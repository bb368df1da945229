"""Alpaca: instruction, optional input, output."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Literal, Unpack

from kdtune.data.columns import Row, any_column, check_column_map, suggest_question_columns, text_column
from kdtune.data.conversation import ConversationEncoder, ConversationOptions, TrainingOptions, conversation_dataset
from kdtune.data.dataset import Dataset
from kdtune.data.messages import Conversation, Message
from kdtune.data.packing import pack_examples
from kdtune.data.rows import RowEncoder, tokenize_rows
from kdtune.data.sources import read_json, split_parts
from kdtune.errors import ConfigError

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer

_COLUMNS = ("instruction", "input", "output")

# The wording of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca), which results are compared under.
_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return the Alpaca prompt of an instruction, with or without an input."""
    template = _PROMPT_WITH_INPUT if input else _PROMPT_WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def plain_prompt(instruction: str, input: str = "") -> str:
    """Return the instruction unchanged, with its input below it."""
    return f"{instruction}\n\n{input}" if input else instruction


PROMPTS = {"alpaca": alpaca_prompt, "plain": plain_prompt}


def alpaca_conversation(
    row: Row, columns: Mapping[str, str], prompt: Callable[[str, str], str] = alpaca_prompt
) -> Conversation:
    """Return the two messages of a row: the prompt from the user, the output from the assistant.

    columns: from instruction, input, output to the row's columns. The input may be null; its column may be missing unless
    it is mapped.
    prompt: a function of an instruction and its input ("" for none).
    """
    instruction, context, output = (columns.get(name, name) for name in _COLUMNS)
    if "input" in columns:
        any_column(row, context)
    question = prompt(text_column(row, instruction), "" if row.get(context) is None else text_column(row, context))
    return Conversation([Message("user", question), Message("assistant", text_column(row, output))])


class AlpacaOptions(ConversationOptions, total=False):
    """Arguments of alpaca_dataset other than `source`."""

    column_map: Mapping[str, str] | None


def alpaca_dataset(
    tokenizer: "Tokenizer",
    *,
    source: str = "tatsu-lab/alpaca",
    column_map: Mapping[str, str] | None = None,
    **options: Unpack[ConversationOptions],
) -> Dataset:
    """Build a dataset of Alpaca rows, in the Alpaca prompt.

    train_on: "answers", or "all" to train on the prompt too, the default here as in torchtune. train_on_input: torchtune's
    name for it (true means all, false answers). truncation: treatment of rows longer than the tokenizer's max_seq_len,
    see TrainingOptions. packed, split_across_pack: lay several rows into one example of up to max_seq_len tokens, see
    pack_examples.
    column_map: from instruction, input and output to the dataset's columns.
    filter_fn: a function, or its dotted path, that returns whether to keep a row.
    source and the rest (split, data_files, data_dir, name, streaming, shuffle_buffer, route_column): see Source.

    Raises:
        ConfigError: settings contradict each other.
        DataError: the source cannot be read, a row cannot be used, or nothing can be trained on.
    """
    columns = check_column_map(column_map, _COLUMNS)
    return conversation_dataset(
        tokenizer,
        partial(alpaca_conversation, columns=columns),
        source,
        default="all",
        columns=[columns.get(name, name) for name in _COLUMNS],
        suggest=suggest_question_columns(_COLUMNS),
        **options,
    )


def alpaca_cleaned_dataset(
    tokenizer: "Tokenizer", *, source: str = "yahma/alpaca-cleaned", **options: Unpack[AlpacaOptions]
) -> Dataset:
    """Like alpaca_dataset, over a corrected version of the Alpaca rows."""
    return alpaca_dataset(tokenizer, source=source, **options)


def quickstart_dataset(
    tokenizer: "Tokenizer",
    *,
    split: str = "train",
    prompt: Literal["alpaca", "plain"] = "alpaca",
    packed: bool = False,
    split_across_pack: bool = False,
    **options: Unpack[TrainingOptions],
) -> Dataset:
    """Build the dataset of the small instruction set that ships with kdtune.

    split: train, or test (every eighth row); expressions such as "train[:50%]" work. prompt: "alpaca" for Alpaca's
    wording, or "plain" for the instruction unchanged with its input below it. train_on, train_on_input, truncation,
    packed, split_across_pack: as for alpaca_dataset.

    Raises:
        ConfigError: settings contradict each other.
        DataError: the split is unknown, or nothing can be trained on within tokenizer.max_seq_len.
    """
    label = f"quickstart ({split})"
    with as_file(files("kdtune.data") / "quickstart.jsonl") as path:
        rows = list(read_json([str(path)]))
    splits = {
        "train": [row for number, row in enumerate(rows, start=1) if number % 8],
        "test": [row for number, row in enumerate(rows, start=1) if number % 8 == 0],
    }
    parts = split_parts(split, splits, label, {name: len(part) for name, part in splits.items()})
    chosen = [row for name, start, stop in parts for row in splits[name][start:stop]]
    if prompt not in PROMPTS:
        raise ConfigError(f"quickstart_dataset: prompt={prompt!r}; allowed are {', '.join(PROMPTS)}")
    encoder = ConversationEncoder(tokenizer, default="all", **options)
    to_row = RowEncoder(
        lambda row: encoder(alpaca_conversation(row, {}, PROMPTS[prompt])), columns=_COLUMNS, is_chat=True
    )
    dataset = tokenize_rows(chosen, to_row, label)
    return pack_examples(dataset, tokenizer, packed=packed, split_across_pack=split_across_pack)
