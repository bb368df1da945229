"""run: how its command line is split, what it passes on, and its exit codes."""

import os
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from exit_codes import run_command
from torch.distributed import run

from kdtune import _assets
from kdtune._cli import launch as launch_module
from kdtune._cli import run as run_module
from kdtune.config import load
from kdtune.errors import ConfigError, TrainingError
from kdtune.models import Transformer
from recipes import finetune


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def code_of(*argv: str) -> int:
    return run_command(["run", *argv])


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
    assert run_command(["--traceback", "run", "add", "--config", "tiny/add", "left=13"]) == 1
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


NF4 = ["adapter=kdtune.models.apply_lora", "adapter.quantize_base=true"]


@pytest.mark.parametrize(
    ("recipe", "processes", "overrides", "message"),
    [
        ("knowledge_distillation", 2, ["parallelism.tp=3"], "tp=3: needs a multiple of 3 processes, found 2; start as many (kdtune run"),
        ("finetune", 2, ["parallelism.dp_shard=3"], "parallelism: dp_replicate=1 dp_shard=3 tp=1: needs 3 processes, found 2"),
        ("knowledge_distillation", 3, ["parallelism.tp=3"], "parallelism: tp=3 does not divide num_kv_heads=2"),
        ("knowledge_distillation", 3, ["parallelism.tp=3"], "parallelism, for the teacher: tp=3 does not divide num_kv_heads=2"),
        ("knowledge_distillation", 2, ["parallelism.tp=2", *NF4], "parallelism: tp=2, cpu_offload=false, with adapters of quantize_base"),
        ("evaluate", 3, ["parallelism.tp=3"], "parallelism: tp=3 does not divide num_kv_heads=2"),
        ("generate", 3, ["parallelism.tp=3"], "parallelism: tp=3 does not divide num_kv_heads=2"),
        ("knowledge_distillation", 2, ["output_dir={occupied}"], "already holds a run; resume it with resume_from_checkpoint=true"),
    ],
)  # fmt: skip
def test_what_does_not_fit_stops_before_torchrun(
    recipe: str, processes: int, overrides: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.distributed.run.run", lambda args: pytest.fail("torchrun was started"))
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "metrics.jsonl").write_text("{}\n")
    folder = [] if recipe == "generate" else [f"output_dir={tmp_path / 'out'}"]
    overrides = [override.format(occupied=tmp_path / "occupied") for override in [*folder, *overrides]]
    assert code_of(f"--nproc_per_node={processes}", recipe, "--config", f"tiny/{recipe}", *overrides) == 2
    error = capsys.readouterr().err
    assert message in error and "[rank" not in error
    assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ


def test_a_warning_is_left_to_the_first_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.run.run", lambda args: None)
    command = [
        "finetune",
        "--config",
        "tiny/finetune",
        "sample_prompts=[]",
        "sample_every_n_steps=2",
        f"output_dir={tmp_path}",
    ]
    assert code_of("--nproc_per_node=2", *command) == 0 and not capsys.readouterr().err
    load("tiny/finetune", command[3:], finetune.Config)
    assert "sample_every_n_steps=2: has no effect without sample_prompts" in capsys.readouterr().err


def test_a_host_that_may_come_back_leaves_the_folder_to_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of the other hosts may still hold the folder."""
    started = []
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    rendezvous = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:1", "--rdzv_id=x"]
    run = ["finetune", "--config", "tiny/finetune", "parallelism.tp=3", f"output_dir={tmp_path / 'out'}"]
    assert code_of("--nnodes=2", "--max_restarts=1", *rendezvous, *run) == 0 and len(started) == 1
    assert code_of("--nnodes=1:2", *rendezvous, *run) == 0 and len(started) == 2
    assert code_of("--nnodes=2", *rendezvous, *run) == 2 and len(started) == 2


def test_five_frames_from_the_command_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader of a traceback goes through, or of the code with a debugger."""
    names: list[str] = []
    forward = Transformer.forward

    def recorded(*arguments: object, **settings: object) -> object:
        stack = [frame.name for frame in traceback.extract_stack()]
        if "kd_step" in stack:
            names.extend(stack[stack.index(code_of.__name__) :])
            raise TrainingError("seen")
        return forward(*arguments, **settings)

    monkeypatch.setattr(Transformer, "forward", recorded)
    command = [
        "knowledge_distillation",
        "--config",
        "tiny/knowledge_distillation",
        "~dataset_val",
        "~run_val_every_n_steps",
    ]
    assert code_of(*command, "sample_prompts=[]", f"output_dir={tmp_path / 'out'}") == 1
    first = names.index("main")
    assert names[first : names.index("kd_step") + 1] == ["main", "execute", "main", "run", "kd_step"]


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (["add", "--nproc_per_node", "4", "--config", "tiny/add", "left=1"], "--nproc_per_node 4 add --config tiny/add left=1"),
        (["add", "--config", "tiny/add", "--nproc-per-node=4", "left=1"], "--nproc-per-node=4 add --config tiny/add left=1"),
        (["add", "--standalone", "--nproc_per_node", "4", "--config", "tiny/add", "left=1 2"],
         "--standalone --nproc_per_node 4 add --config tiny/add 'left=1 2'"),
        (["--nnodes=1", "add", "--config", "tiny/add", "--nproc_per_node", "4"], "--nnodes=1 --nproc_per_node 4 add --config tiny/add"),
    ],
)  # fmt: skip
def test_an_option_of_torchrun_after_the_recipe(
    assets: Path, capsys: pytest.CaptureFixture[str], words: list[str], right: str
) -> None:
    """The command line in the error is one that torchrun's own parser takes apart as meant."""
    assert code_of(*words) == 2
    error = capsys.readouterr().err.strip()
    assert "is an option of torchrun, found after the recipe" in error and error.endswith(f": kdtune run {right}")
    options, recipe, rest = run_module.split_arguments(shlex.split(right))
    parsed = run.parse_args(launch_module.torchrun_arguments(options, recipe, rest))
    assert parsed.nproc_per_node == "4" and parsed.training_script == "kdtune"
    run_module.check_order("add", options, rest)


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
    assert bad.stderr.splitlines()[-1].startswith("error: rank ") and "torch/distributed" not in bad.stderr


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
