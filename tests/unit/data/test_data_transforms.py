import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdtune.constants import IGNORE_INDEX
from kdtune.data import Message, make_example, parse_conversation, truncate
from kdtune.data.transforms import is_trainable
from kdtune.errors import DataError

I = IGNORE_INDEX  # noqa: E741


def test_labels_are_the_next_trained_tokens():
    example = make_example([1, 5, 6, 7, 3], [True, False, True, False, True])
    assert example.tokens.tolist() == [1, 5, 6, 7, 3]
    assert example.labels.tolist() == [I, 6, I, 3, I]
    assert example.tokens.dtype == example.labels.dtype == np.int64


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=20))
def test_labels_equal_a_plain_loop(pairs):
    ids, trained = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    expected = [ids[t + 1] if t + 1 < len(ids) and trained[t + 1] else I for t in range(len(ids))]
    labels = make_example(ids, trained).labels.tolist()
    assert labels == expected
    assert is_trainable(trained) == any(label != I for label in labels)


def test_short_sequences_are_not_cut():
    ids, trained = [1, 5, 3], [False, True, True]
    assert truncate(ids, trained, 3, {3}) == (ids, trained)
    assert truncate(ids, trained, None, {3}) == (ids, trained)


def test_a_cut_answer_keeps_its_end_token_as_a_target():
    ids, trained = [1, 5, 6, 7, 8, 3], [False, False, True, True, True, True]
    assert truncate(ids, trained, 4, {2, 3}) == ([1, 5, 6, 3], [False, False, True, True])


def test_the_end_token_is_the_last_stop_id_even_if_text_follows_it():
    # As in templates that write a line break after the end of a turn (id 9 here).
    ids, trained = [1, 5, 2, 6, 7, 8, 3, 9], [False] * 3 + [True] * 4 + [False]
    assert truncate(ids, trained, 5, {2, 3}) == ([1, 5, 2, 6, 3], [False, False, False, True, True])


def test_a_cut_prompt_gives_no_target():
    ids, trained = [1, 5, 6, 7, 8, 3], [False, False, False, False, True, True]
    cut_ids, cut_trained = truncate(ids, trained, 3, {3})
    assert cut_ids == [1, 5, 3]
    assert not is_trainable(cut_trained)


def test_without_an_end_token_the_cut_is_plain():
    assert truncate([1, 5, 6], [True] * 3, 2, {3}) == ([1, 5], [True, True])


@pytest.mark.parametrize(
    ("style", "turns"),
    [
        ("openai", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "masked": True}]),
        ("sharegpt", [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "masked": True}]),
    ],
)
def test_conversation_styles(style, turns):
    assert parse_conversation(turns, style) == [Message("user", "a"), Message("assistant", "b", masked=True)]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("text", "is text that is not JSON: 'text'"),
        (3, "must be a list of at least one turn: found int"),
        ([], "found an empty list"),
        ([{"role": "user"}], "turn 1 has no 'content'.*found keys role"),
        (
            [{"role": "user", "content": "a"}, {"role": "boss", "content": "b"}],
            "turn 2 has an unknown role: 'boss'; allow",
        ),
        ([{"role": "user", "content": None}], "turn 1: 'content' must be text: found null"),
        ([{"role": "user", "content": "a", "masked": "yes"}], "turn 1: 'masked' must be true or false: found 'yes'"),
        ([{"role": "user", "content": "a", "train": 1}], "turn 1: 'train' must be true or false: found 1"),
        ([{"role": "user", "content": "a", "weight": 0.5}], "turn 1: 'weight' must be 0 or 1 .*: found 0.5"),
        ([{"role": "user", "content": "a", "weight": 1, "train": False}], "train=False and weight=1 contradict"),
        ([{"role": "user", "content": "a", "from": "human"}, {"content": "b"}], "turn 2 must have the keys"),
        ([{"role": "assistant", "tool_calls": []}], "turn 1 has no 'content'"),
        ([{"role": "assistant", "tool_calls": "f(x)"}], "turn 1: tool_calls is text that is not JSON"),
        ([{"role": "assistant", "tool_calls": {"name": "f"}}], "'tool_calls' must be a list of objects"),
        ({"role": ["user"], "content": ["a", "b"]}, "as many entries in each: role has 1, content has 2"),
        ("[" * 100_000, "is text that is not JSON"),
    ],
)
def test_bad_conversations(turns, message):
    with pytest.raises(DataError, match=message):
        parse_conversation(turns, "openai")
