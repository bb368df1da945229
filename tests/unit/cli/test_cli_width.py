"""Listings and what a run tells fit into a narrow terminal; in a file they are as wide as they like, but for COLUMNS."""

from pathlib import Path

import pytest
from terminal import output_in_terminal

from kdtune._assets import configs, find_recipe, recipes
from kdtune._cli.ls import components_text, describe, table
from kdtune.log import terminal_width, wrap

ROOT = Path(__file__).parents[3]


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("recipe", [recipe.name for recipe in recipes()])
def test_a_recipe_fits(recipe, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = describe(find_recipe(recipe))
    monkeypatch.setenv("COLUMNS", "60")
    narrow = describe(find_recipe(recipe))
    too_wide = [line for line in narrow.splitlines() if len(line) > 60]
    assert all(line.startswith("file:") or " " not in line.strip() for line in too_wide), too_wide
    assert words(narrow) == words(wide) and widest(wide) > 60


@pytest.mark.parametrize(
    "name", ["losses", "optimizers", "datasets", "kdtune.training.Muon", "kdtune.data.chat_dataset"]
)
def test_components_fit(name, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = components_text(name)
    monkeypatch.setenv("COLUMNS", "60")
    narrow = components_text(name)
    assert widest(narrow) <= 60 < widest(wide)
    assert words(narrow) == words(wide)


def test_the_table_of_recipes_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert widest(table(configs())) <= 60
    monkeypatch.setenv("COLUMNS", "80")
    assert "\nprune                   mistral/prune\n" in table(configs())


def test_lines_are_cut_at_blanks_alone():
    text = "  a: some words and /a/path/that/is-longer/than/the-width `kdtune plan`\n\nshort"
    assert wrap(text, 20, hang=2) == (
        "  a: some words and\n    /a/path/that/is-longer/than/the-width\n    `kdtune plan`\n\nshort"
    )
    assert wrap(text, None) == text


def test_what_is_no_terminal_has_any_width(monkeypatch, tmp_path):
    for given in (None, "0", "wide"):
        monkeypatch.setenv("COLUMNS", given) if given else monkeypatch.delenv("COLUMNS", raising=False)
        with (tmp_path / "log").open("w") as stream:
            assert terminal_width(stream) is None
    monkeypatch.setenv("COLUMNS", "33")
    assert terminal_width() == 33


RUN = """
from kdtune.log import get_logger
from kdtune.runs import Progress
from kdtune._cli.main import main
with Progress() as progress:
    progress.write("validation, step 10: cross entropy 3.675 (-0.393, best), KL 0.541 (+0.254), agreement 0.0 % (+0.0)")
get_logger().warning("a setting that says what it has to say in more than sixty columns, as some do")
main(["ls", "prune"])
"""


def test_a_terminal_of_60_columns():
    seen = output_in_terminal(RUN, columns=60, NO_COLOR="1")
    assert "\x1b" not in "".join(seen)
    assert seen[0].startswith("validation, step 10: cross entropy 3.675") and seen[1].startswith("  ")
    assert [line for line in seen if len(line) > 60] == [
        line for line in seen if line.startswith("file:") and len(line) > 60
    ]
