"""The wheel, installed outside the checkout: what it holds, and that the command works from it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kdtune

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow("builds the wheel, installs it and imports torch anew for each command")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("kdtune-*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else; the dependencies come from the running environment."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
        str(wheel),
    ]
    subprocess.run(command, check=True)
    return folder


def run(site: Path, cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The installed console command, started in another folder with the installed package alone on the path."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(site / "bin" / "kdtune"), *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def output(site: Path, cwd: Path, *argv: str) -> str:
    result = run(site, cwd, *argv)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_kdtune_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"kdtune", f"kdtune-{kdtune.__version__}.dist-info"}
    for kind, suffix in (("recipes", ".py"), ("configs", ".yaml")):
        shipped = {path.relative_to(ROOT / kind).as_posix() for path in (ROOT / kind).rglob(f"*{suffix}")}
        assert shipped
        assert {
            name.removeprefix(f"kdtune/_{kind}/") for name in names if name.startswith(f"kdtune/_{kind}/")
        } >= shipped
    assert "kdtune/py.typed" in names
    assert not [name for name in names if "__pycache__" in name]


def test_ls_cat_and_cp_work_from_the_wheel(site: Path, tmp_path: Path) -> None:
    listed = output(site, tmp_path, "ls")
    assert "tiny/knowledge_distillation" in listed
    assert str(site) in output(site, tmp_path, "ls", "knowledge_distillation")
    text = output(site, tmp_path, "cat", "tiny/knowledge_distillation")
    assert text == (ROOT / "configs/tiny/knowledge_distillation.yaml").read_text()
    output(site, tmp_path, "cp", "tiny/knowledge_distillation", "mine")
    assert (tmp_path / "mine.yaml").read_text() == text
    assert output(site, tmp_path, "--version") == f"kdtune {kdtune.__version__}\n"


def test_validate_works_from_the_wheel(site: Path, tmp_path: Path) -> None:
    assert output(site, tmp_path, "validate", "tiny/knowledge_distillation", "kd_ratio=0.75").startswith("OK: ")


def test_a_tiny_run_works_from_the_wheel(site: Path, tmp_path: Path) -> None:
    result = run(
        site, tmp_path, "run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "output_dir=out",
        "max_steps_per_epoch=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert steps
    assert (tmp_path / "out/final/config.json").is_file()
    assert (tmp_path / "out/config.yaml").read_text().startswith("recipe: knowledge_distillation\n")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_wrong_key_exits_2_and_writes_nothing(site: Path, tmp_path: Path) -> None:
    result = run(
        site,
        tmp_path,
        "run",
        "knowledge_distillation",
        "--config",
        "tiny/knowledge_distillation",
        "output_dir=out",
        "kd_ration=1",
    )
    assert result.returncode == 2
    assert "did you mean 'kd_ratio'?" in result.stderr
    assert not (tmp_path / "out").exists()
