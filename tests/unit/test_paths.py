"""`~` is the home folder in every path, and a byte order mark at a file's start is no part of its text."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from kdtune import _assets
from kdtune.errors import ConfigError
from kdtune.paths import user_path

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kdtune").rglob("*.py"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_user_path_is_what_the_standard_library_says(home: Path) -> None:
    for text in ("~", "~/a/b.yaml", "a/~/b", "~root/x", "/x", "", "a~b"):
        assert user_path(text) == Path(text).expanduser()
        assert user_path(Path(text)) == Path(text).expanduser()
    assert user_path("~/a") == home / "a"


def test_a_home_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"~nobody-here/x: no home folder of '~nobody-here'; .* full path"):
        user_path("~nobody-here/x")


def test_functions_that_take_a_path_as_text_expand_it() -> None:
    """`Path(argument)` of an argument that may be text would make a folder named ~."""
    found = []
    for source in SOURCES:
        for function in ast.walk(ast.parse(source.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            arguments = [*function.args.args, *function.args.kwonlyargs]
            kinds = {argument.arg: ast.unparse(argument.annotation) for argument in arguments if argument.annotation}
            texts = {name for name, kind in kinds.items() if re.search(r"\bstr\b", kind)}
            for call in ast.walk(function):
                is_path = isinstance(call, ast.Call) and ast.unparse(call.func) == "Path" and call.args
                if is_path and ast.unparse(call.args[0]) in texts:
                    found.append(f"{source.name}: {function.name}: {ast.unparse(call)}")
    assert found == []
    assert [p.name for p in SOURCES if ".expanduser()" in p.read_text()] == []


def test_text_files_are_read_without_their_byte_order_mark() -> None:
    users = [p.name for p in SOURCES if re.search(r'read_text\((encoding="utf-8"[,)]|\))', p.read_text())]
    assert users == ["page.py", "runner.py"]  # which read what kdtune itself has written


def test_config_and_recipe_with_a_byte_order_mark(home: Path) -> None:
    config, recipe = Path("a.yaml"), Path("a.py")
    config.write_text("\ufeffrecipe: finetune\n", encoding="utf-8")
    recipe.write_text('\ufeff"""Adds."""\nALIASES = ("plus",)\n', encoding="utf-8")
    assert _assets.find_config("a.yaml").recipe == "finetune"
    assert _assets.find_recipe("a.py").summary == "Adds."


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("recipe: finetune", "finetune"),
        ("recipe:   finetune   # what it is for", "finetune"),
        ("recipe: 'my recipe.py'", "my recipe.py"),
        ('recipe: "../ü/a.py"\r', "../ü/a.py"),
        ("recipe: my recipe.py", "my recipe.py"),
        ("recipe: a#b.py", "a#b.py"),
        ("recipe:", None),
        ("recipe: # none", None),
        ("  recipe: nested", None),
    ],
)
def test_recipe_line_is_read_as_yaml_reads_it(line: str, name: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(f"# First.\n{line}\noutput_dir: x\n".encode())
    assert _assets.read_config_header(tmp_path / "a.yaml").recipe == name
    if not line.startswith(" "):
        assert yaml.safe_load(line).get("recipe") == name


def test_config_and_recipe_below_home(home: Path) -> None:
    (home / "a.yaml").write_text("recipe: ~/a.py\n")
    (home / "a.py").write_text('"""Adds."""\n')
    found = _assets.find_config("~/a.yaml")
    assert found.path == home / "a.yaml"
    assert found.recipe == "~/a.py"
    assert _assets.is_recipe("~/a.py")
    assert _assets.find_recipe("~/a.py").path == home / "a.py"
