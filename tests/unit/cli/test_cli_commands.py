"""ls, cp, cat, validate, completion: what they print, write and refuse."""

import subprocess
from pathlib import Path

import pytest
from exit_codes import run_command

from kdtune import _assets
from kdtune._cli import cp


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = run_command(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_recipe_file_that_a_config_names_is_imported_only_after_it_is_told(
    assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("payload.py").write_text("import sys\nprint('payload ran', file=sys.stderr)\n")
    Path("a.yaml").write_text("recipe: ./payload.py\n")
    for command in (("validate", "a.yaml"), ("cat", "--resolved", "a.yaml"), ("plan", "a.yaml")):
        code, _, err = run(capsys, *command)
        assert code == 2
        assert err.startswith(
            "a.yaml: its recipe line names payload.py; importing that file, to know its keys\npayload ran\n"
        )
    _, _, err = run(capsys, "validate", "tiny/add")
    assert err == ""


def test_ls_is_an_aligned_table(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "ls")
    assert code == 0
    assert out.splitlines() == [
        "RECIPE    CONFIG",
        "add       quickstart",
        "          tiny/add",
        "subtract  -",
        "-         orphan",
        "",
        "RECIPE    ITS OTHER NAMES",
        "add       add_single_device",
        "          add_distributed",
        "subtract  subtract_single_device",
        "          subtract_distributed",
    ]


def test_ls_recipe_shows_its_keys(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "ls", "add_distributed")
    assert out.startswith("add: Adds two numbers.\n")
    assert "aliases: add_single_device, add_distributed\n" in out
    assert "configs: quickstart, tiny/add\n" in out
    assert "* output_dir: str\n      Folder of the run.\n" in out
    assert "  left: int = 1\n      The first number.\n" in out
    assert "  tokenizer: component = null\n" in out


def test_ls_folder_shows_its_configs(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "RECIPE  CONFIG\nadd     tiny/add\n"
    assert [run(capsys, "ls", name)[1] for name in ("tiny", "tiny/", "tiny/add")] == [expected] * 3
    code, _, err = run(capsys, "ls", "tin")
    assert code == 2 and "unknown recipe 'tin'" in err


def test_cat_prints_the_file(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "cat", "tiny/add")[1] == (assets / "configs/tiny/add.yaml").read_text()
    assert run(capsys, "cat", "add_single_device")[1] == (assets / "recipes/add.py").read_text()


def test_cat_resolved_prints_every_key(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for order in (["--resolved", "right=3"], ["right=3", "--resolved"]):
        code, out, _ = run(capsys, "cat", "tiny/add", *order)
        assert code == 0
        assert out.startswith("recipe: add_single_device\n")
        assert "# The first number.\nleft: 40\n" in out
        assert "right: 3\n" in out
        assert "log: runs/y/log\n" in out
    own = Path("again.yaml")
    own.write_text(out)
    assert run(capsys, "cat", "again.yaml", "--resolved")[1] == out


def test_cat_refuses_what_it_would_ignore(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "cat", "tiny/add", "right=3")[0] == 2
    code, _, err = run(capsys, "cat", "add", "--resolved")
    assert code == 2 and "is a recipe; name a config" in err


def test_cp_adds_the_suffix_and_copies(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "cp", "tiny/add", "mine")
    assert (code, out) == (0, "copied to mine.yaml\n")
    assert Path("mine.yaml").read_text() == (assets / "configs/tiny/add.yaml").read_text()
    run(capsys, "cp", "add_single_device", "mine")
    assert Path("mine.py").read_text() == (assets / "recipes/add.py").read_text()
    run(capsys, "cp", "tiny/add", ".")
    assert Path("add.yaml").is_file()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x", "x.yaml"), ("x.yaml", "x.yaml"), ("x.yml", "x.yml"), ("x.v2", "x.v2.yaml"), ("x.py", "x.py.yaml")],
)
def test_cp_target_path(name: str, expected: str) -> None:
    assert cp.target_path(Path("a.yaml"), Path("nowhere") / name) == Path("nowhere") / expected


def test_cp_never_overwrites_unless_told(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("precious")
    code, _, err = run(capsys, "cp", "tiny/add", "mine")
    assert code == 2 and "mine.yaml: exists; give --force" in err
    assert run(capsys, "cp", "-n", "tiny/add", "mine")[0] == 0
    assert Path("mine.yaml").read_text() == "precious"
    assert run(capsys, "cp", "--force", "tiny/add", "mine")[0] == 0
    assert Path("mine.yaml").read_text() != "precious"


def test_cp_makes_folders_only_when_told(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "cp", "tiny/add", "a/b/mine.yaml")
    assert code == 2 and "a/b: no such folder; give --make-parents" in err
    assert not Path("a").exists()
    assert run(capsys, "cp", "--make-parents", "tiny/add", "a/b/mine.yaml")[0] == 0
    assert Path("a/b/mine.yaml").is_file()


def test_unknown_names_suggest_both_kinds(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["cat", "tiny/ad"], ["cp", "tiny/ad", "x"]):
        code, _, err = run(capsys, *command)
        assert code == 2 and err.startswith("error: ") and "did you mean 'tiny/add'?" in err
    assert "did you mean 'subtract'?" in run(capsys, "cat", "substract")[2]


def test_validate_says_ok(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "OK: tiny/add is a valid config for add (files and device are looked at when it runs)\n"
    assert run(capsys, "validate", "tiny/add", "left=3") == (0, said, "")
    Path("mine.yaml").write_text((assets / "configs/tiny/add.yaml").read_text())
    assert run(capsys, "validate", "mine.yaml")[0] == 0


def test_validate_reports_every_finding(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "validate", "tiny/add", "lefd=3", "right=x", "tokenizer._component_=nothing.here", "~output_dir"
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: tiny/add: 5 problems\n")
    for words in ("did you mean 'left'?", "right: 'x' (str)", "no module named 'nothing'", "output_dir: is missing"):
        assert words in err
    assert "write left=3" in run(capsys, "validate", "tiny/add", "--left=3")[2]


@pytest.mark.parametrize("name", [config.name for config in _assets.configs()])
def test_every_shipped_config_is_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "validate", name)
    assert (code, err) == (0, "")


def test_validate_needs_a_partner(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "validate", "orphan")
    assert code == 2 and "has no line `recipe: NAME`" in err and "add, subtract" in err
    Path("mine.yaml").write_text("recipe: adt\n")
    assert "did you mean 'add'?" in run(capsys, "validate", "mine.yaml")[2]


def test_traceback_is_shown_on_request(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--traceback", "validate", "nothing"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error and "kdtune.errors.ConfigError" in error


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    import kdtune

    assert run(capsys, "--version")[1] == f"kdtune {kdtune.__version__}\n"
    assert run(capsys)[0] == 2
    assert run(capsys, "lss")[0] == 2
    assert run(capsys, "ls", "add", "--wrong")[0] == 2


@pytest.mark.parametrize(
    "command", ["ls", "cp", "cat", "validate", "data", "plan", "run", "cache", "download", "migrate", "completion"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"kdtune {command}" in out


def test_completion_lists_names(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "completion", "configs")[1].split() == ["orphan", "quickstart", "tiny/add"]
    assert run(capsys, "completion", "recipes")[1].split()[:3] == ["add", "add_single_device", "add_distributed"]
    assert len(run(capsys, "completion", "all")[1].split()) == 9


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["kdtune", "va"], ["validate"]),
        (["kdtune", "run", "ad"], ["add", "add_single_device", "add_distributed"]),
        (["kdtune", "run", "add", "--config", "ti"], ["tiny/add"]),
        (["kdtune", "validate", "qu"], ["quickstart"]),
        (["kdtune", "completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes(assets: Path, capsys: pytest.CaptureFixture[str], line: list[str], expected: list[str]) -> None:
    script = run(capsys, "completion", "bash")[1]
    names = {kind: run(capsys, "completion", kind)[1] for kind in ("recipes", "configs", "all")}
    # The script asks `kdtune` for names; here a shell function answers as the command would.
    answers = "".join(f"{kind}) printf '%s' '{text}' ;;\n" for kind, text in names.items())
    program = (
        f"{script}\nkdtune() {{ case $2 in {answers} esac; }}\n"
        f"COMP_WORDS=({' '.join(line)}); COMP_CWORD={len(line) - 1}; _kdtune 2>/dev/null\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == expected


def test_completion_knows_every_command() -> None:
    from kdtune._cli import completion
    from kdtune._cli.main import build_parser

    actions = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert sorted(actions) == sorted(completion._COMMANDS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [("tiny/add",), ("--config", "tiny/add"), ("--config=tiny/add",), ("add", "--config", "tiny/add"), ("--config", "tiny/add", "~left"),
     ("--config", "tiny/add", "left=1", "right=2"), ("left=1", "--config", "tiny/add", "right=2"), ("tiny/add", "left=1", "~left")],
)  # fmt: skip
def test_validate_takes_its_config_as_run_does(
    arguments: tuple[str, ...], assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "validate", *arguments)
    assert (code, err) == (0, "")
    assert out.startswith("OK: tiny/add is a valid config for add")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "validate: no config is named; write kdtune validate NAME|PATH"),
        (("add",), "validate: no config is named"),
        (("subtract", "--config", "tiny/add"), "is a config for 'add_single_device', not for 'subtract'"),
        (("--config", "tiny/add", "left=x"), "left: 'x' (str) is not allowed; must be int"),
    ],
)
def test_validate_says_what_is_wrong_with_its_arguments(
    arguments: tuple[str, ...], words: str, assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "validate", *arguments)
    assert code == 2 and words in err
