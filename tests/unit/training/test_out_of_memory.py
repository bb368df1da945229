"""An out-of-memory error says what to change, in order of its price, with the peak before and after."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exit_codes import run_command

from kdtune import models, training
from kdtune._assets import find_recipe
from kdtune.config import load
from kdtune.config.recipe import import_recipe
from kdtune.distributed import World
from kdtune.planner.advice import changes_to_fit
from kdtune.planner.estimate import make_estimate


def config(*overrides: str) -> Any:
    return load(
        "tiny/knowledge_distillation", list(overrides), import_recipe(find_recipe("knowledge_distillation")).schema
    )


def peak_of(cfg: Any) -> int:
    return make_estimate(cfg, World(torch.device("cpu"))).peak.total


def test_each_change_is_the_config_that_its_line_types() -> None:
    before = peak_of(config())
    changes = list(changes_to_fit(config(), 0, peak_of))
    assert [change.overrides.partition("=")[0] for change in changes][:2] == ["batch_size", "batch_size"]
    given: list[str] = []
    for change in changes:
        assert change.before == before
        given += change.overrides.split(" ")
        before = peak_of(config(*given))
        assert change.after == before
    assert len(changes) >= 4


def test_no_more_is_changed_than_needed() -> None:
    all_changes = list(changes_to_fit(config(), 0, peak_of))
    room = (all_changes[0].after + all_changes[1].after) / 2
    assert list(changes_to_fit(config(), room, peak_of)) == all_changes[:2]
    assert list(changes_to_fit(config(), peak_of(config()), peak_of)) == []


def test_smaller_micro_batches_keep_the_gradient() -> None:
    cfg = config("batch_size=6", "gradient_accumulation_steps=2")
    cut = [change.overrides for change in changes_to_fit(cfg, 0, peak_of) if change.overrides.startswith("batch_size")]
    assert cut == ["batch_size=3 gradient_accumulation_steps=4", "batch_size=1 gradient_accumulation_steps=12"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
    ],
)
def test_a_run_out_of_memory_ends_with_the_changes(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(models.Transformer, "forward", forward)
    command = [
        "run",
        "knowledge_distillation",
        "--config",
        "tiny/knowledge_distillation",
        f"output_dir={tmp_path}",
        "sample_prompts=[]",
    ]
    assert run_command(command) == 1
    message = capsys.readouterr().err
    assert "cpu is out of memory: " + str(error).splitlines()[0] in message and "Traceback" not in message
    assert re.search(
        r"batch_size=2 gradient_accumulation_steps=4: [\d.]+ \w+ -> [\d.]+ \w+ \(the same gradient\)", message
    )


def test_other_errors_of_torch_stay_what_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="sizes"),
        training.explained_out_of_memory(config(), World(torch.device("cpu"))),
    ):
        raise RuntimeError("the sizes do not fit")
