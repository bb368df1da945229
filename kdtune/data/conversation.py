"""Tokenize conversations: mark what is trained on, and truncate those that are too long."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, Unpack

from kdtune.data.columns import Row, Suggest
from kdtune.data.dataset import Dataset
from kdtune.data.messages import Conversation, Message
from kdtune.data.packing import PackingOptions, pack_examples
from kdtune.data.rows import FilterFn, build_dataset
from kdtune.data.sources import Source, SourceOptions
from kdtune.data.transforms import EncodedRow, fits, pair_of, truncated
from kdtune.errors import ConfigError
from kdtune.tokenizers.base import TrainOn

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer

Truncation: TypeAlias = Literal["turns", "right", "drop"]


class TrainingOptions(TypedDict, total=False):
    """Arguments of the conversation builders other than the source.

    train_on: the last answer, all of the assistant's answers, or everything; a masked turn is never trained on.
    train_on_input: torchtune's name for it: true means train_on=all, false train_on=answers.
    truncation: treatment of an example longer than the tokenizer's max_seq_len. "turns": drop the oldest exchanges (a
    user's turn and what follows it), keep the system message; an example whose last exchange alone does not fit is
    dropped. "right": keep the first max_seq_len tokens, possibly with a partial answer. "drop": drop the example.
    null: turns, or right if train_on is all.
    """

    train_on: TrainOn | None
    train_on_input: bool | None
    truncation: Truncation | None


class ConversationOptions(SourceOptions, TrainingOptions, PackingOptions, total=False):
    """Arguments that all conversation builders take beside `source`; for packed and split_across_pack see pack_examples.

    filter_fn: a function, or its dotted path, that returns whether to keep a row.
    """

    filter_fn: FilterFn | str | None


class _Beside(TypedDict):
    tools: Sequence[Any] | None
    template_variables: Mapping[str, Any] | None


def chosen_train_on(train_on: TrainOn | None, train_on_input: bool | None, default: TrainOn) -> TrainOn:
    """Resolve which turns are trained on from the two keys that can set it.

    Raises:
        ConfigError: the two contradict each other, or train_on is unknown.
    """
    if train_on not in (None, "last", "answers", "all"):
        raise ConfigError(f"train_on={train_on}: unknown; allowed: last, answers, all")
    if train_on_input is None:
        return train_on or default
    if train_on is None:
        return "all" if train_on_input else "answers"
    if train_on_input != (train_on == "all"):
        raise ConfigError(
            f"train_on={train_on}, train_on_input={str(train_on_input).lower()}: contradict each other (true is "
            "train_on=all, false is train_on=answers); remove one of the two, such as ~dataset.train_on"
        )
    return train_on


def conversation_dataset(
    tokenizer: "Tokenizer",
    to_conversation: Callable[[Row], Conversation],
    source: str,
    *,
    default: TrainOn,
    columns: Collection[str],
    suggest: Suggest,
    train_on: TrainOn | None = None,
    train_on_input: bool | None = None,
    truncation: Truncation | None = None,
    filter_fn: FilterFn | str | None = None,
    packed: bool = False,
    split_across_pack: bool = False,
    **where: Unpack[SourceOptions],
) -> Dataset:
    """Build the dataset of a source whose rows are conversations.

    to_conversation: turns a row into a conversation. columns, suggest: see RowEncoder. packed,
    split_across_pack: see pack_examples. The other arguments are those of ConversationEncoder and ConversationOptions.

    Raises:
        ConfigError: settings contradict each other, or source or filter_fn cannot be used.
        DataError: the source cannot be read, a row cannot be used, or nothing can be trained on.
    """
    encoder = ConversationEncoder(
        tokenizer, default=default, train_on=train_on, train_on_input=train_on_input, truncation=truncation
    )
    dataset = build_dataset(
        lambda row: encoder(to_conversation(row)),
        Source(source, **where),
        filter_fn,
        columns=columns,
        suggest=suggest,
        is_chat=True,
        is_paired=pair_of(tokenizer) is not None,
    )
    return pack_examples(dataset, tokenizer, packed=packed, split_across_pack=split_across_pack)


class ConversationEncoder:
    """Tokenizes conversations by the chat template: token ids and training flags, truncated to fit.

    Its arguments are those of TrainingOptions; `default` is train_on if neither key sets it.

    Raises:
        ConfigError: train_on and train_on_input contradict each other, or a value is unknown.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        *,
        default: TrainOn,
        train_on: TrainOn | None = None,
        train_on_input: bool | None = None,
        truncation: Truncation | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._train_on = chosen_train_on(train_on, train_on_input, default)
        if truncation not in (None, "turns", "right", "drop"):
            raise ConfigError(f"truncation={truncation}: unknown; allowed: turns, right, drop")
        self._truncation = truncation or ("right" if self._train_on == "all" else "turns")

    def __call__(self, conversation: Conversation) -> EncodedRow | None:
        """Return the tokens of a conversation; None if it does not fit."""
        tokenizer, messages, pair = self._tokenizer, conversation.messages, pair_of(self._tokenizer)
        beside: _Beside = {"tools": conversation.tools, "template_variables": conversation.template_variables}

        def tokens_of(messages: Sequence[Message]) -> EncodedRow:
            ids, trained = tokenizer.tokenize_messages(messages, train_on=self._train_on, **beside)
            teacher = None if pair is None else pair.pair_messages(ids, trained, messages, **beside)
            return EncodedRow(ids, trained, teacher=teacher)

        row = tokens_of(messages)
        remarks = [
            *(f"the chat template leaves out {name}" for name in tokenizer.left_out(messages, **beside)),
            *_unheeded_marks(messages, self._train_on),
        ]
        if fits(row, tokenizer):
            return replace(row, remarks=remarks)
        if self._truncation == "right":
            return replace(truncated(row, tokenizer), remarks=remarks)
        shortest = None
        if self._truncation == "turns":
            shortest = _fitting(tokens_of, messages, lambda shorter: fits(shorter, tokenizer))
        return None if shortest is None else replace(shortest, truncated=True, remarks=remarks)


def _unheeded_marks(messages: Sequence[Message], train_on: TrainOn) -> list[str]:
    """Describe a mark that asks to train on a turn which train_on excludes; such a mark has no effect. Masks always hold."""
    if train_on == "all" or all(message.masked is not False or message.role == "assistant" for message in messages):
        return []
    return [f"train_on={train_on} leaves out turns of others than the assistant that are marked as trained on"]


def _fitting(
    tokens_of: Callable[[Sequence[Message]], EncodedRow],
    messages: Sequence[Message],
    is_short_enough: Callable[[EncodedRow], bool],
) -> EncodedRow | None:
    """Drop the turns after the last answer and as few of the oldest exchanges as needed to fit."""
    shorter = list(_shorter(messages))
    # Every one is shorter than the one before it: the first that fits is found without tokenizing all of them.
    index = bisect_left(shorter, True, key=lambda some: is_short_enough(tokens_of(some)))
    return tokens_of(shorter[index]) if index < len(shorter) else None


def _shorter(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=len(messages) - 1)
    kept = messages[: last + 1]
    start = next((i for i, message in enumerate(kept) if message.role != "system"), len(kept))
    if len(kept) < len(messages):
        yield kept
    for i, message in enumerate(kept):
        if i > start and message.role == "user":
            yield [*kept[:start], *kept[i:]]
