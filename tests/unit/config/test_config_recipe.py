"""The entry point: what a recipe's main does with its command line, and what it leaves for run.json."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_samples import Config

from kdtune import _assets
from kdtune.config import entry_point, origin, resolved_yaml, run_record
from kdtune.config.recipe import check_partner, prepare_imports
from kdtune.errors import CheckpointError, ConfigError, TrainingError

seen: list[Any] = []


@entry_point(Config)
def main(cfg: Config) -> None:
    """Does nothing but what the config's output_dir says."""
    seen.append(cfg)
    if cfg.output_dir == "user":
        raise CheckpointError("model.safetensors: truncated")
    if cfg.output_dir == "training":
        raise TrainingError("step 3: loss is nan")
    if cfg.output_dir == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/model")
    if cfg.output_dir == "bug":
        raise ZeroDivisionError("a bug")
    if cfg.output_dir == "interrupt":
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    seen.clear()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


def exit_code(*argv: str) -> Any:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code


def test_loads_and_calls(base: Path) -> None:
    main(["kd_ratio=0.75", "--config", str(base), "optimizer.lr=5", "~output_dir", "output_dir=runs/y"])
    assert seen[0].kd_ratio == 0.75
    assert seen[0].optimizer["lr"] == 5
    assert seen[0].output_dir == "runs/y"


def test_keeps_schema_and_function(base: Path) -> None:
    assert main.schema is Config
    with pytest.raises(TrainingError):
        main.function(Config(output_dir="training", tokenizer=None, dataset=None))


@pytest.mark.parametrize(
    ("output_dir", "code", "words"),
    [
        ("user", 2, "error: model.safetensors: truncated\n"),
        ("training", 1, "error: step 3: loss is nan\n"),
        ("full", 1, "error: runs/x/model: No space left on device\n"),
        ("interrupt", 1, "interrupted\n"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    base: Path, capsys: pytest.CaptureFixture[str], output_dir: str, code: int, words: str
) -> None:
    assert exit_code("--config", str(base), f"output_dir={output_dir}") == code
    assert capsys.readouterr().err == words


def test_traceback_on_request(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--traceback", "--config", str(base), "output_dir=user") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_bugs_keep_their_traceback(base: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        main(["--config", str(base), "output_dir=bug"])


@pytest.mark.parametrize("override", ["kd_ratio=7", "output_dir=nowhere", "nothing=1", "--kd_ratio=0.5", "--kd_ratio"])
def test_gates_come_before_the_function(base: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    assert exit_code("--config", str(base), override) == 2
    assert seen == []
    assert "base.yaml: 1 problem" in capsys.readouterr().err


def test_the_first_process_of_every_host_tells_what_the_gates_found(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_code("--config", str(base), "kd_ratio=7") == 2
    assert capsys.readouterr().err.startswith("[rank 9] error:")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code("--config", str(base), "kd_ratio=7") == 2
    assert capsys.readouterr().err == ""
    assert exit_code("--config", str(base), "output_dir=user") == 2
    assert capsys.readouterr().err == "[rank 1] error: model.safetensors: truncated\n"


def test_no_config_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("kd_ratio=1") == 2
    assert "--config" in capsys.readouterr().err
    assert exit_code("--help") == 0
    assert "key=value" in capsys.readouterr().out


def test_the_record_says_how_to_run_it_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/bin/kdtune", "run", "x", "prompts=[a b]"])
    main(["--config", str(base), "kd_ratio=0.75"])
    record = run_record(seen[0])
    assert record["command"] == "kdtune run x 'prompts=[a b]'"
    assert record["overrides"] == ["kd_ratio=0.75"]
    assert record["config"] == str(base)
    assert set(record["versions"]) >= {"kdtune", "torch", "python"}
    assert all(record["versions"][name] for name in ("kdtune", "torch", "python"))
    assert resolved_yaml(seen[0]).startswith("recipe: sample\n")
    assert origin(seen[0]).recipe == "sample"  # type: ignore[union-attr]


def test_a_config_built_by_hand_has_a_record_too() -> None:
    cfg = Config(output_dir="x", tokenizer=None, dataset=None)
    assert run_record(cfg)["command"] is None
    assert resolved_yaml(cfg).startswith("output_dir: x\n")


def test_a_config_of_another_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_assets, "assets_dir", lambda kind: tmp_path / kind)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "configs").mkdir()
    recipe = tmp_path / "recipes" / "distil.py"
    recipe.write_text('"""Distils."""\nALIASES = ("distil_single_device",)\n')
    other = tmp_path / "recipes" / "prune.py"
    other.write_text('"""Prunes."""\n')
    config = tmp_path / "mine.yaml"
    config.write_text("recipe: distil_single_device\n")
    check_partner(recipe, config)
    with pytest.raises(ConfigError, match="is a config for 'distil_single_device', not for 'prune'"):
        check_partner(other, config)
    copied = tmp_path / "my_prune.py"
    copied.write_text(other.read_text())
    check_partner(copied, config)


def test_the_package_imports_no_torch() -> None:
    program = "import sys, kdtune.config; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(_assets.__file__).resolve().parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout == "False\n"


def test_components_of_the_working_directory_resolve(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_component_sample.py").write_text("def own(path):\n    return path\n")
    monkeypatch.chdir(tmp_path)
    main(["--config", str(base), "tokenizer._component_=own_component_sample.own"])
    assert seen[0].tokenizer["_component_"] == "own_component_sample.own"


def test_shipped_recipes_do_not_shadow_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = str(_assets.assets_dir("recipes"))
    monkeypatch.setattr(sys, "path", [folder, "/other"])
    prepare_imports(Path(folder) / "evaluate.py")
    assert folder not in sys.path
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/other"])
    prepare_imports(tmp_path / "mine.py")
    assert sys.path[0] == str(tmp_path)
