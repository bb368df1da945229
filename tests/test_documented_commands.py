"""Every `kdtune ...` line of the README, the docs and the configs' headers: it parses, and its config passes the gates."""

import re
import shlex
from pathlib import Path

import pytest

from kdtune._cli.main import parse
from kdtune._cli.names import find_asset, load_config
from kdtune._cli.run import split_arguments
from kdtune.config import load
from kdtune.config.recipe import check_partner, import_recipe, parse_arguments

ROOT = Path(__file__).parent.parent
# The commands of docs/extending.md need the files that stand there; tests/test_extending.py runs them.
PAGES = sorted(page for page in ROOT.glob("docs/*.md") if page.name != "extending.md")
TEXTS = [ROOT / "README.md", *PAGES, *sorted(ROOT.glob("configs/**/*.yaml"))]
# What a reader fills in, and a file that an earlier line of the README makes.
STANDS_FOR = {"RECIPE": "prune", "NAME": "quickstart", "mine.yaml": "quickstart", "my_recipe.py": "prune"}


def documented_commands() -> list[str]:
    """The command lines, each once: indented lines of their own, in Markdown or in a comment."""
    lines = [line for path in TEXTS for line in path.read_text().splitlines()]
    found = [match[1] for line in lines if (match := re.match(r"(?:#  |   ) +(kdtune .*)", line))]
    return list(dict.fromkeys(found))


def test_there_are_commands_of_every_kind() -> None:
    verbs = {command.split()[1] for command in documented_commands()}
    assert verbs >= {"ls", "cat", "cp", "validate", "data", "plan", "run", "download"}


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    accept(command)


def accept(command: str) -> None:
    """Parses a command and passes its config, if it has one, through the validation stages."""
    words = [STANDS_FOR.get(word, word) for word in shlex.split(command, comments=True)[1:]]
    arguments = parse(words)
    if words[0] == "run":
        _, recipe, rest = split_arguments(arguments.arguments)
        main = import_recipe(recipe)
        options, overrides = parse_arguments(rest, recipe.summary, recipe.name, main.default_config)
        check_partner(recipe.path, options.config)
        load(options.config, overrides, main.schema)
    elif words[0] == "validate":
        arguments.func(arguments)
    elif words[0] in ("plan", "data"):
        load_config(arguments.config, arguments.overrides)
    elif words[0] in ("ls", "cat", "cp"):
        name = words[1] if len(words) > 1 else "prune"
        assert find_asset(name).path.is_file()
