"""run: how its command line is split, what it passes on, and its exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdtune import _assets
from kdtune._cli import launch as launch_module
from kdtune._cli import run as run_module
from kdtune._cli.main import run_command
from kdtune.errors import ConfigError


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def code_of(*argv: str) -> int:
    try:
        return run_command(["run", *argv])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0


def test_runs_by_name_alias_and_path(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in ("add", "add_single_device", str(assets / "recipes/add.py")):
        assert code_of(recipe, "--config", "tiny/add", "right=2") == 0
        assert capsys.readouterr().out == "42 alone 1\n"


def test_a_copied_recipe_runs(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["cp", "add", "mine"])
    Path("mine.py").write_text(Path("mine.py").read_text().replace("left + cfg.right", "left * cfg.right"))
    capsys.readouterr()
    assert code_of("mine.py", "--config", "tiny/add") == 0
    assert capsys.readouterr().out == "80 alone 1\n"


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["add", "--config", "tiny/add", "left=13"], 1, "error: step 1: left is 13"),
        (["add", "--config", "tiny/add", "lefd=1"], 2, "did you mean 'left'?"),
        (["add", "--config", "tiny/ad"], 2, "did you mean 'tiny/add'?"),
        (["add"], 2, "--config"),
        (["ad", "--config", "tiny/add"], 2, "unknown recipe 'ad'; did you mean 'add'?"),
        (["--nproc_per_node", "4", "ad", "--config", "tiny/add"], 2, "unknown recipe 'ad'; did you mean 'add'?"),
        (["--config", "tiny/add"], 2, "no recipe is named"),
        ([], 2, "no recipe is named"),
        (["nowhere.py", "--config", "tiny/add"], 2, "'nowhere.py': no such file"),
        (["subtract", "--config", "tiny/add"], 2, "is a config for 'add_single_device', not for 'subtract'"),
    ],
)
def test_exit_codes_and_messages(
    assets: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, words: str
) -> None:
    assert code_of(*argv) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_file_that_is_no_recipe(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plain.py").write_text("x = 1\n")
    assert code_of("plain.py", "--config", "tiny/add") == 2
    assert "has no main decorated with" in capsys.readouterr().err
    Path("needy.py").write_text("import a_module_nobody_has\n")
    assert code_of("needy.py", "--config", "tiny/add") == 2
    assert "needs the module 'a_module_nobody_has'" in capsys.readouterr().err


def test_help_of_run_and_of_a_recipe(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--help") == 0
    assert "[torchrun options] RECIPE --config" in capsys.readouterr().out
    assert code_of("add", "--help") == 0
    assert "Adds two numbers." in capsys.readouterr().out


def test_traceback_works_before_and_after(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("add", "--config", "tiny/add", "left=13", "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run_command(["--traceback", "run", "add", "--config", "tiny/add", "left=13"])
    assert stop.value.code == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "standalone"),
    [
        (["--nproc_per_node", "4"], True),
        (["--nproc-per-node=4", "--log-dir", "x"], True),
        (["--standalone", "--nproc_per_node=2"], False),
        (["--nnodes", "2", "--rdzv_backend=c10d"], False),
        (["--master_addr=a", "--node_rank=1"], False),
    ],
)
def test_torchrun_gets_its_options_verbatim(assets: Path, options: list[str], standalone: bool) -> None:
    left, recipe, rest = run_module.split_arguments([*options, "add_distributed", "--config", "tiny/add", "a=b=c"])
    assert (left, recipe.name, rest) == (options, "add", ["--config", "tiny/add", "a=b=c"])
    arguments = launch_module.torchrun_arguments(left, recipe, rest)
    assert arguments == [
        *(["--standalone"] if standalone else []), *options,
        "-m", "kdtune", "run", str(assets / "recipes/add.py"), "--config", "tiny/add", "a=b=c",
    ]  # fmt: skip


def test_the_first_recipe_splits(assets: Path) -> None:
    left, recipe, rest = run_module.split_arguments(["--x", "subtract", "add", "--config", "add"])
    assert (left, recipe.name, rest) == (["--x"], "subtract", ["add", "--config", "add"])
    with pytest.raises(ConfigError):
        run_module.split_arguments(["--config", "add"])


def test_a_bad_config_stops_before_torchrun(
    assets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.run.run", lambda args: pytest.fail("torchrun was started"))
    assert code_of("--nproc_per_node=2", "add", "--config", "tiny/add", "lefd=1") == 2
    assert "did you mean 'left'?" in capsys.readouterr().err


def test_two_processes_under_torchrun(assets: Path) -> None:
    own = assets / "recipes" / "add.py"
    config = assets / "configs/tiny/add.yaml"
    root = Path(_assets.__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kdtune", "run", "--nproc_per_node", "2", str(own), "--config", str(config)]
    good = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert good.returncode == 0, good.stderr
    assert sorted(good.stdout.splitlines()) == ["42 0 2", "42 1 2"]
    bad = subprocess.run([*command, "left=13"], capture_output=True, text=True, env=environment, check=False)
    assert bad.returncode == 1
    assert "error: step 1: left is 13" in bad.stderr


def test_a_recipe_is_a_script_too(assets: Path) -> None:
    root = Path(_assets.__file__).resolve().parents[1]
    command = [sys.executable, str(assets / "recipes/add.py"), "--config", str(assets / "configs/tiny/add.yaml")]
    environment = os.environ | {"PYTHONPATH": str(root)}
    good = subprocess.run([*command, "right=1"], capture_output=True, text=True, env=environment, check=False)
    assert (good.returncode, good.stdout) == (0, "41 alone 1\n")
    bad = subprocess.run([*command, "right=x"], capture_output=True, text=True, env=environment, check=False)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "right: 'x' (str)" in bad.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--nproc_per_node", "2", "add_single_device"],
            "add_single_device runs on one process, found torchrun (--nproc_per_node 2); use add_distributed",
        ),
        (
            ["add_distributed"],
            "add_distributed runs under torchrun, found no torchrun option; say on how many processes: kdtune run "
            "--nproc_per_node 2 add_distributed ..., or use add_single_device",
        ),
    ],
)
def test_a_name_that_does_not_fit_the_start(
    assets: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert code_of(*words, "--config", "tiny/add") == 2
    assert message in capsys.readouterr().err
