"""The instruction examples shipped for the quickstart: their form, and every claim in them that can be recomputed."""

import contextlib
import io
import json
import re
import unicodedata
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest

import kdtune

FILE = Path(kdtune.__file__).parent / "data" / "quickstart.jsonl"
RECORDS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
SUM = rf"{NUMBER}(?: [×÷+-] {NUMBER})+"
PYTHON = re.compile(r"```python\n(.*?)```(?:\n\nOutput:\n\n```\n(.*?)```)?", re.DOTALL)


def words(text: str) -> list[str]:
    return re.findall(r"[\w'°]+", text.casefold())


def value(expression: str) -> Fraction:
    """An expression such as `3 × 6 + 7`, exactly, with the usual precedence."""
    python = re.sub(NUMBER, lambda found: f"Fraction('{found[0].replace(',', '')}')", expression)
    return eval(python.replace("×", "*").replace("÷", "/"), {"Fraction": Fraction})


def equations(text: str) -> list[tuple[str, str]]:
    """(left, right) of every written-out calculation, in either order."""
    return re.findall(rf"({SUM}) = ({NUMBER})", text) + re.findall(
        rf"(?<![\d.,])(?<![×÷+-] )({NUMBER}) = ({SUM})", text
    )


def test_the_file_is_plain_json_lines() -> None:
    raw = FILE.read_bytes()
    assert len(raw) < 200_000 and raw.endswith(b"}\n") and b"\r" not in raw and not raw.startswith(b"\xef\xbb\xbf")
    assert len(RECORDS) >= 200
    for record in RECORDS:
        assert list(record) == ["instruction", "input", "output"]
        assert all(isinstance(text, str) and text == text.strip() for text in record.values())
        assert record["instruction"] and record["output"]


def test_characters_are_those_a_keyboard_has() -> None:
    text = "".join(text for record in RECORDS for text in record.values())
    assert text == unicodedata.normalize("NFC", text)
    beyond = {char for char in text if not (" " <= char <= "~") and char != "\n"}
    strange = {char for char in beyond if not char.isalpha() and char not in "×÷°"}
    assert not strange, strange


def test_no_two_examples_are_alike() -> None:
    assert len({record["output"].casefold() for record in RECORDS}) == len(RECORDS)
    asked = [(frozenset(words(record["instruction"])), record["instruction"]) for record in RECORDS]
    for (left, left_text), (right, right_text) in combinations(asked, 2):
        assert len(left & right) / len(left | right) < 0.75, (left_text, right_text)


def test_lengths_suit_a_small_model() -> None:
    lengths = [len(record["output"].split()) for record in RECORDS]
    assert max(lengths) <= 130
    assert 40 <= sum(lengths) / len(lengths) <= 80
    assert sum(length >= 40 for length in lengths) > len(lengths) / 2
    assert sum(length <= 15 for length in lengths) >= 10
    assert all(len(record["instruction"].split()) <= 40 for record in RECORDS)
    assert all(len(record["input"].split()) <= 100 for record in RECORDS)


def test_what_works_on_a_text_has_one() -> None:
    needs_text = re.compile(r"^(Summarize|Extract|Fix|Correct|Replace|Combine|Rewrite|Sort these|Classify|Identify)\b")
    for record in RECORDS:
        if needs_text.match(record["instruction"]):
            assert record["input"], record["instruction"]
    assert 25 <= sum(bool(record["input"]) for record in RECORDS) <= 0.5 * len(RECORDS)


def test_the_arithmetic_is_right() -> None:
    found = [pair for record in RECORDS for pair in equations(record["output"])]
    assert len(found) >= 35
    for left, right in found:
        assert value(left) == value(right), f"{left} = {right}"


def test_a_wrong_sum_would_be_seen() -> None:
    assert equations("So 7 × 8 = 54, and 2 × 1,000 - 1 = 1,999.") == [("7 × 8", "54"), ("2 × 1,000 - 1", "1,999")]
    assert equations("15 = 3 × 5") == [("15", "3 × 5")]
    assert value("7 × 8") != value("54") and value("2 × 1,000 - 1") == value("1,999")


def test_temperatures_are_converted_right() -> None:
    pairs = [
        pair for record in RECORDS for pair in re.findall(r"(\d+) °C(?: is|, which is) (\d+) °F", record["output"])
    ]
    assert len(pairs) >= 2
    for celsius, fahrenheit in pairs:
        assert Fraction(celsius) * 9 / 5 + 32 == Fraction(fahrenheit)


def test_the_python_runs_and_prints_what_it_says() -> None:
    snippets = [found for record in RECORDS for found in PYTHON.findall(record["output"])]
    assert len(snippets) >= 8
    assert len(snippets) == sum(record["output"].count("```python") for record in RECORDS)
    for source, claimed in snippets:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "<example>", "exec"), {"__name__": "__main__"})
        assert printed.getvalue() == claimed, source


def answer(instruction: str) -> dict[str, str]:
    (record,) = [record for record in RECORDS if record["instruction"].startswith(instruction)]
    return record


def test_answers_keep_to_what_was_asked() -> None:
    record = answer("Put the words in alphabetical order")
    assert record["output"].split(", ") == sorted(record["input"].split(", "))
    assert len(answer("Summarize the text in no more than twenty words")["output"].split()) <= 20
    assert len(answer("Write a four-line poem")["output"].splitlines()) == 4
    assert len(answer("Write a limerick")["output"].splitlines()) == 5
    for instruction, count in (
        ("Summarize the passage in one sentence", 1),
        ("Summarize the passage in two short sentences", 2),
        ("Summarize the article in three sentences", 3),
        ("Describe the smell and sound of a forest", 3),
    ):
        assert len(re.findall(r"[.!?](?:\s|$)", answer(instruction)["output"])) == count


@pytest.mark.parametrize("numbers", [[9, 11, 15, 17, 21, 23]])
def test_the_primes_are_primes(numbers: list[int]) -> None:
    record = answer("Which of these numbers are prime")
    assert [int(number) for number in re.findall(r"\d+", record["instruction"])] == numbers
    primes = [n for n in numbers if all(n % d for d in range(2, n))]
    assert [int(number) for number in re.findall(r"\d+", record["output"].split(".")[0])] == primes
