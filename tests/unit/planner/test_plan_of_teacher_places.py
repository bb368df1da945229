"""A plan with the teacher offloaded, on a device of its own, or beside the student."""

from typing import Any

import pytest
import torch
from exit_codes import run_command

from kdtune._assets import find_recipe
from kdtune.config import instantiate, load
from kdtune.config.recipe import import_recipe
from kdtune.distributed import World
from kdtune.models.quantization import num_bytes, quantize
from kdtune.planner.estimate import Estimate, make_estimate
from kdtune.planner.teacher import make_teacher_estimate
from kdtune.teachers.offload import offload_layers

CPU = torch.device("cpu")
GIB = 2**30


def config(*overrides: str, source: str = "tiny/knowledge_distillation") -> Any:
    return load(source, list(overrides), import_recipe(find_recipe("knowledge_distillation")).schema)


def planned(*overrides: str, device_type: str = "cuda") -> Estimate:
    return make_estimate(config(*overrides), World(CPU), device_type=device_type)


@pytest.mark.parametrize("scheme", [None, "int8", "nf4"])
def test_an_offloaded_teacher_has_two_layers_on_the_device(scheme: str | None) -> None:
    given = ["teacher_model.num_layers=5", *([f"teacher_quantization={scheme}"] if scheme else [])]
    plain, plan = planned(*given), planned(*given, "teacher_offload=true")
    model = instantiate(config(*given).teacher_model).requires_grad_(False)
    if scheme:
        quantize(model, scheme)
    whole = sum(num_bytes(one) for one in model.parameters())
    layers = sum(num_bytes(one) for one in model.layers.parameters())
    offloaded = offload_layers(model, CPU)
    slots = sum(slot.memory.nbytes for slot in offloaded.layers._slots)
    assert plain.teacher and plain.teacher.stored == whole and plain.host_bytes == 0
    assert plan.teacher and plan.host_bytes == layers
    rest = whole - layers
    # A slot's weights are aligned to 512 bytes each.
    assert rest < plan.teacher.stored <= rest + slots <= plan.teacher.stored + 2 * 16 * 3 * 512
    assert plan.peak.total == plain.peak.total - (plain.teacher.stored - plan.teacher.stored)


def test_an_overlapping_teacher_computes_in_memory_of_its_own() -> None:
    plain, plan = planned(), planned("teacher_overlap=true")
    assert plain.teacher is not None
    before = {phase.name: phase.total for phase in plain.phases}
    for phase in plan.phases:
        added = 0 if phase.name.startswith("the teacher's") else plain.teacher.working
        assert phase.total == before[phase.name] + added
    assert plain.teacher.working > plain.teacher.hidden


def test_a_device_of_its_own_is_as_a_process_of_its_own() -> None:
    named, apart = planned("teacher_device=cuda:1"), planned("teacher_processes=1")
    assert named.peak.total == apart.peak.total and named.flops == apart.flops
    assert {phase.name for phase in named.phases} == {phase.name for phase in apart.phases}
    theirs = [
        make_teacher_estimate(config(key), World(CPU), 1, device_type="cuda")
        for key in ("teacher_device=cuda:1", "teacher_processes=1")
    ]
    assert theirs[0].peak.total == theirs[1].peak.total and theirs[0].flops == theirs[1].flops
    # The student's own device is no other one, whatever its number.
    assert planned("teacher_device=cuda:1", "device=cuda:1").peak.total == planned().peak.total
    assert planned("teacher_device=cuda:0", "device=cuda:1").peak.total == named.peak.total
    assert planned("teacher_device=cpu", device_type="cpu").peak.total == planned(device_type="cpu").peak.total


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    def out(*overrides: str) -> str:
        assert run_command(["plan", "llama3_2/knowledge_distillation_single_device", *overrides]) == 0
        return capsys.readouterr().out

    def number(text: str, row: str) -> float:
        return float(next(line for line in text.splitlines() if line.strip().startswith(row)).split()[-1])

    plain, offloaded, named = out(), out("teacher_offload=true"), out("teacher_device=cpu")
    # Llama 3.1 8B in bf16: 32 layers of 218,112,000 parameters.
    layers = 32 * 218_112_000 * 2 / GIB
    saved = number(plain, "teacher's weights") - number(offloaded, "teacher's weights")
    assert saved == pytest.approx(30 / 32 * layers, abs=0.06)
    assert number(offloaded, "in the CPU's memory") == pytest.approx(layers, abs=0.06)
    assert number(named, "teacher's head") == pytest.approx(128_256 * 4096 * 2 / GIB, abs=0.006)
    assert "\nmemory of cpu, for the teacher, GiB\n" in named
