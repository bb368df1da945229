"""Columns of rows: the names that a builder reads, and the settings to suggest if a dataset names them differently."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from kdtune.data.messages import conversation_style_of, type_name
from kdtune.errors import ConfigError, DataError

Row: TypeAlias = Mapping[str, Any]
Suggest: TypeAlias = Callable[[Row], "Suggestion"]
Suggestion: TypeAlias = Mapping[str, str]
"""Settings of a dataset builder that would fit a row, as the user would type them; empty: none is known."""

# Common column names of a question, its context, and its answer; the more specific names first.
_QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "user", "human", "input", "source", "text")
_CONTEXTS = ("input", "context")
_ANSWERS = (
    "output", "response", "answer", "completion", "assistant", "solution", "target", "chosen", "reply", "summary",
)  # fmt: skip


class MissingColumnError(DataError):
    """A row without a column that the builder reads; `settings` are those that would fit the row."""

    def __init__(self, problem: str, settings: Suggestion | None = None) -> None:
        self.problem = problem
        self.settings = dict(settings or {})
        super().__init__(self.under(""))

    def under(self, key: str) -> str:
        """Return the message, with the settings as the user types them for the dataset's config key ("": their own names)."""
        typed = [f"{key}.{name}={value}" if key else f"{name}={value}" for name, value in self.settings.items()]
        if not typed:
            return f"{self.problem}; name the columns in the dataset's config"
        return f"{self.problem}; set {' '.join(map(_quoted, typed))}"


def _quoted(typed: str) -> str:
    return f"'{typed}'" if set(typed) & set(" {}'\"$*?~") else typed


def check_column_map(column_map: Mapping[str, str] | None, allowed: Sequence[str]) -> dict[str, str]:
    """Return the map from our column names to the dataset's, as a dict.

    Raises:
        ConfigError: a key is not one of the columns that the dataset builder reads.
    """
    unknown = [name for name in column_map or {} if name not in allowed]
    if unknown:
        raise ConfigError(
            f"column_map: unknown column {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)} "
            "(keys are the builder's columns, values the dataset's)"
        )
    return dict(column_map or {})


def text_column(row: Row, column: str) -> str:
    """Return the text in a column of a row.

    Raises:
        DataError: the column is missing (the message lists the columns found) or does not hold text.
    """
    value = any_column(row, column)
    if not isinstance(value, str):
        raise DataError(f"column '{column}' must hold text: found {type_name(value)} ({value!r:.60})")
    return value


def any_column(row: Row, column: str) -> Any:
    """Return the value in a column of a row.

    Raises:
        MissingColumnError: the column is missing; the message lists the columns found.
    """
    if column not in row:
        raise MissingColumnError(f"column '{column}' is missing; found: {', '.join(map(str, row))}")
    return row[column]


def suggest_question_columns(columns: Sequence[str]) -> Suggest:
    """Suggest settings for a builder that reads these columns: the question's first, the answer's last."""
    question, *context, answer = columns

    def suggest(row: Row) -> Suggestion:
        found = _question_and_answer(row)
        if found is None:
            conversation = suggest_conversation_column(row)
            return {"_component_": "kdtune.data.chat_dataset", **conversation} if conversation else {}
        named = {question: found[0], answer: found[1]}
        beside = _named(row, _CONTEXTS, without=found)
        if context and beside:
            named[context[0]] = beside
        different = {ours: theirs for ours, theirs in named.items() if ours != theirs}
        text = ", ".join(f"{ours}: {_yaml(theirs)}" for ours, theirs in different.items())
        return {"column_map": "{" + text + "}"} if different else {"column_map": "null"}

    return suggest


def suggest_conversation_column(row: Row) -> Suggestion:
    """Suggest settings for chat_dataset: the column that holds a conversation, and its style."""
    for column, value in row.items():
        if (style := conversation_style_of(value)) is not None:
            return {"conversation_column": _yaml(column), "conversation_style": style}
    return {}


def suggest_chat_columns(row: Row) -> Suggestion:
    """Suggest settings for chat_dataset, or the builder to use for a row with a question and an answer."""
    if conversation := suggest_conversation_column(row):
        return conversation
    settings = suggest_question_columns(("input", "output"))(row)
    return {"_component_": "kdtune.data.instruct_dataset", **settings} if settings else {}


def suggest_prompt_column(row: Row) -> Suggestion:
    """Suggest settings for a builder of prompts: the column of the question, and that of what belongs to it."""
    question = _named(row, _QUESTIONS)
    beside = _named(row, _CONTEXTS, without=(question,))
    found = {"column": question, "input_column": beside}
    return {name: _yaml(column) for name, column in found.items() if column is not None}


def suggest_text_column(row: Row) -> Suggestion:
    """Suggest settings for a builder of plain text: the column of the longest text."""
    texts = {column: value for column, value in row.items() if isinstance(value, str)}
    return {"column": _yaml(max(texts, key=lambda column: len(texts[column])))} if texts else {}


def _question_and_answer(row: Row) -> tuple[str, str] | None:
    """Return the columns of question and answer: by their usual names, else the only two that hold text."""
    answer = _named(row, _ANSWERS)
    question = _named(row, _QUESTIONS, without=(answer,))
    if question is not None and answer is not None:
        return question, answer
    texts = [column for column, value in row.items() if isinstance(value, str)]
    if len(texts) != 2:
        return None
    first = question or next(column for column in texts if column != answer)
    return first, next(column for column in texts if column != first)


def _named(row: Row, names: Sequence[str], without: Sequence[str | None] = ()) -> str | None:
    """Return the text column whose name is the first of the names, in any case."""
    texts = {str(column).lower(): column for column, value in row.items() if isinstance(value, str)}
    return next((texts[name] for name in names if name in texts and texts[name] not in without), None)


def _yaml(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else json.dumps(name, ensure_ascii=False)
