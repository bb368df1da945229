"""What the command imports before it has to, and how long it takes to answer."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kdtune import _assets

ROOT = Path(_assets.__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
HEAVY = {"torch", "numpy", "tokenizers", "huggingface_hub", "datasets", "matplotlib", "transformers"}


def loaded_modules(*argv: str) -> set[str]:
    """Top-level modules that a command line has imported when it is done."""
    program = (
        "import sys\nfrom kdtune._cli.main import main\n"
        f"try:\n    main({list(argv)!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
        "assert not code, code\n"
        "print('MODULES', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    return set(result.stdout.rpartition("MODULES ")[2].split())


def first_names() -> tuple[str, str]:
    recipes, configs = _assets.recipes(), _assets.configs()
    if not recipes or not configs:
        pytest.fail("no recipe or config is shipped")
    return recipes[0].name, configs[0].name


@pytest.mark.parametrize(
    "command", ["--help", "--version", "ls", "ls RECIPE", "cat RECIPE", "cat CONFIG", "completion all"]
)
def test_light_commands_import_nothing_heavy(command: str) -> None:
    recipe, config = first_names()
    argv = command.replace("RECIPE", recipe).replace("CONFIG", config).split()
    assert not loaded_modules(*argv) & HEAVY


def test_cp_imports_nothing_heavy(tmp_path: Path) -> None:
    assert not loaded_modules("cp", first_names()[1], str(tmp_path / "x.yaml")) & HEAVY


@pytest.mark.parametrize("config", ["comparison", "sweeps/report"])
def test_a_config_without_components_is_validated_without_torch(config: str) -> None:
    assert not loaded_modules("validate", config) & HEAVY


# What torch and others import for several processes, for compiling, for plots and for the hub: seconds, which no first step needs.
LATER = {"torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "torch._inductor",
         "sympy", "matplotlib", "pandas", "datasets", "transformers", "torchao"}  # fmt: skip


def test_the_first_step_needs_neither_compiler_nor_sharding_nor_plots(tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(
        "import sys\n\n\nclass Modules:\n    def log(self, values, step):\n        if step == 1:\n"
        "            print('MODULES', *sys.modules, file=open('modules.txt', 'w'))\n\n    def close(self): ...\n"
    )
    argv = ["run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "metric_logger=seen.Modules",
            "output_dir=run", "max_steps_per_epoch=1", "save_every_n_steps=null", "lr_scheduler.num_warmup_steps=0"]  # fmt: skip
    command = [sys.executable, "-m", "kdtune", *argv]
    subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    found = set((tmp_path / "modules.txt").read_text().split())
    assert "kdtune.training.run" in found
    assert not found & LATER


def test_validating_a_training_config_imports_no_compiler_and_collects_no_garbage_of_torch() -> None:
    program = (
        "import gc, sys\nfrom kdtune._cli.main import main\n"
        "full = []\ngc.callbacks.append(lambda phase, info: full.append(info) if info['generation'] == 2 else None)\n"
        "try:\n    main(['validate', 'tiny/knowledge_distillation'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000 and not full, (gc.get_freeze_count(), full)\n"
        f"found = set({sorted(LATER)!r}) & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)


def test_import_kdtune_imports_nothing() -> None:
    program = "import sys; before = set(sys.modules); import kdtune; print(*(set(sys.modules) - before))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    assert result.stdout.split() == ["kdtune"]


@pytest.mark.parametrize("command", ["ls", "--help"])
def test_answers_in_half_a_second(command: str) -> None:
    """Of the processor's time, which does not depend on what else the machine is at."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        start = spent()
        subprocess.run([sys.executable, "-m", "kdtune", command], capture_output=True, env=ENVIRONMENT, check=True)
        times.append(spent() - start)
    assert min(times) < 0.5
