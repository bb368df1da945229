"""Cells against itertools, shared steps, identities, placeholders, and what a wrong sweep is told."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from kdtune.reports import baseline_problems
from kdtune.sweeps import make_plan
from kdtune.sweeps.grid import assignments
from kdtune.sweeps.plan import flat_overrides, last_ones

KD = "tiny/knowledge_distillation"
AXES: dict[str, Any] = {"a": [1, 2, 3], "b": ["x", "y"], "seed": [0, 1]}


def plan(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "steps_dir": "out",
        "steps": {"train": {"config": KD, "overrides": ["kd_ratio={r}", "seed={seed}"]}},
        "axes": {"r": [0.5, 1.0], "seed": [0, 1]},
    }
    return make_plan(**(settings | changes))


def test_without_grids_it_is_the_product() -> None:
    expected = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    assert assignments(AXES, None, {}) == expected


def test_grids_and_only_against_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(50):
        grids = [
            {
                axis: draw.sample(values, draw.randint(1, len(values)))
                for axis, values in AXES.items()
                if draw.random() < 0.7
            }
            for _ in range(draw.randint(1, 3))
        ]
        only = {"a": [1, 2]} if draw.random() < 0.5 else {}
        expected: list[dict[str, Any]] = []
        for grid in grids:
            for a in grid.get("a", [1]):
                for b in grid.get("b", ["x"]):
                    for seed in grid.get("seed", [0]):
                        cell = {"a": a, "b": b, "seed": seed}
                        if cell not in expected and (not only or a in (1, 2)):
                            expected.append(cell)
        assert assignments(AXES, grids, only) == expected


def test_a_step_that_is_the_same_in_several_cells_is_one() -> None:
    steps = {
        "teacher": {"config": "tiny/prune", "overrides": ["seed=3"]},
        "train": {"config": KD, "overrides": ["kd_ratio={r}", "seed={seed}", "tokenizer.path={teacher.dir}"]},
    }
    found = plan(steps=steps)
    assert not found.problems and len(found.cells) == 4 and len(found.steps) == 5
    teachers = {cell.steps[0] for cell in found.cells}
    assert len(teachers) == 1 and found.num_users(teachers.pop()) == 4
    assert all(cell.steps[1].needs == {cell.steps[0].id} for cell in found.cells)
    assert f"tokenizer.path={found.cells[0].steps[0].folder}" in found.cells[0].steps[1].overrides


def test_identity_is_recipe_config_and_overrides_not_the_place(tmp_path: Path) -> None:
    text = "recipe: knowledge_distillation\noutput_dir: x\nkd_ratio: 0.5\n"
    config = tmp_path / "c.yaml"
    config.write_text(text)
    steps = {
        "first": {"config": "tiny/prune"},
        "train": {"config": str(config), "overrides": ["tokenizer.path={first.dir}"]},
    }

    def ids(output_dir: str = "out", extra: str = "") -> list[str]:
        steps["train"]["overrides"] = ["tokenizer.path={first.dir}", *([extra] if extra else [])]
        return [step.id for step in plan(steps_dir=output_dir, steps=steps, axes={}).steps]

    before = ids()
    assert ids(output_dir="elsewhere") == before
    config.write_text("# a comment\n" + text)
    assert ids() == before
    assert ids(extra="seed=1")[1] != before[1]
    config.write_text(text.replace("0.5", "0.6"))
    assert ids()[0] == before[0] and ids()[1] != before[1]
    first = steps["first"]
    first["overrides"] = ["seed=1"]
    changed = ids()
    config.write_text(text)
    assert changed[0] != before[0] and ids()[1] != before[1], "what a step reads is part of its identity"


def test_axes_that_do_not_matter_are_left_out_and_cells_fall_together() -> None:
    axes = {
        "method": {
            "baseline": {"evaluate": ["kd_ratio=1"]},
            "sft": {"train": ["kd_ratio=0"]},
            "kd": {"train": ["kd_ratio={r}"]},
        },
        "r": [0.25, 0.75],
        "seed": [0, 1],
    }
    steps = {
        "train": {"config": KD, "when": {"method": ["sft", "kd"]}, "overrides": ["seed={seed}"]},
        "evaluate": {"config": KD, "overrides": ["kd_ratio=0.5"]},
    }
    found = plan(steps=steps, axes=axes)
    assert not found.problems
    assert [cell.axes for cell in found.cells] == [
        {"method": "baseline"},
        {"method": "sft", "seed": 0},
        {"method": "sft", "seed": 1},
        *({"method": "kd", "r": r, "seed": seed} for r in (0.25, 0.75) for seed in (0, 1)),
    ]


def test_when_that_cannot_decide_does_not_use_its_axis() -> None:
    axes = {"student": {"base": {"train": []}, "none": {}}, "teacher": {"plain": {}, "tuned": {}}, "seed": [0]}
    steps = {
        "tune": {"config": "tiny/prune", "when": {"teacher": "tuned", "student": "base"}},
        "train": {"config": KD, "when": {"student": "base"}},
        "evaluate": {"config": KD, "overrides": ["seed=7"]},
    }
    names = [cell.name for cell in plan(steps=steps, axes=axes).cells]
    assert names == ["student=base teacher=plain", "student=base teacher=tuned", "student=none"]


def test_the_last_override_of_a_key_counts_and_settings_come_last() -> None:
    found = plan(settings={"train": {"kd_ratio": 0.1, "dataset": {"source": "a b.jsonl"}}, "all": {"batch_size": 2}})
    assert len(found.cells) == 2 and "r" not in found.cells[0].axes
    assert found.steps[0].overrides == ("seed=0", "batch_size=2", "kd_ratio=0.1", "dataset.source=a b.jsonl")
    assert last_ones(["a=1", "b=2", "a=3"]) == ["b=2", "a=3"]


def test_settings_as_overrides() -> None:
    tree = {"a": {"b": None, "c": True}, "kd_loss": {"_component_": "x.Y", "t": 2}, "text": "1", "list": [1, "x"]}
    assert flat_overrides(tree) == [
        "a.b=null", "a.c=true", 'kd_loss={"_component_": "x.Y", "t": 2}', 'text="1"', 'list=[1, "x"]',
    ]  # fmt: skip


def test_braces_that_are_meant() -> None:
    found = plan(
        steps={
            "train": {"config": KD, "overrides": ["sample_prompts=['{{seed}} {seed}']", "kd_loss={_component_: x.Y}"]}
        }
    )
    assert found.steps[0].overrides == ("sample_prompts=['{seed} 0']", "kd_loss={_component_: x.Y}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": {"r": [], "seed": [0]}}, "axes.r: is empty"),
        ({"axes": {"r": 3, "seed": [0]}}, "axes.r=3: must be a list of values"),
        ({"axes": {"r": [1, 1], "seed": [0]}}, "lists a value twice"),
        ({"axes": {"seed": [0]}}, "{r}: is no axis and no step's folder"),
        ({"steps": {}}, "steps: is empty"),
        ({"steps": {"train": {}}}, "steps.train: must be a mapping with a config"),
        ({"steps": {"train": {"config": KD, "overides": []}}}, "did you mean 'overrides'"),
        ({"steps": {"train": {"config": KD, "overrides": "x=1"}}}, "must be a list"),
        ({"steps": {"train": {"config": "tiny/knowledge"}}}, "unknown config 'tiny/knowledge'"),
        ({"steps": {"train": {"config": KD, "recipe": "knowledge"}}}, "unknown recipe 'knowledge'"),
        ({"steps": {"train": {"config": KD, "when": {"rr": 1}}}}, "steps.train.when.rr: no such axis"),
        ({"steps": {"train": {"config": KD, "when": {"r": 7}}}}, "7 is not a value of axes.r"),
        ({"steps": {"train": {"config": KD, "overrides": ["x={late.dir}"]}, "late": {"config": KD}}}, "comes later"),
        ({"steps": {"train": {"config": KD, "overrides": ["output_dir=x"]}}}, "is set by the sweep"),
        ({"axes": {"r": {"x": {"trian": ["a=1"]}}, "seed": [0]}}, "did you mean 'train'"),
        ({"axes": {"r": {"x": {"train": "a=1"}}, "seed": [0]}}, "must be a list of overrides"),
        ({"grids": []}, "grids: is empty"),
        ({"grids": [{"r": []}]}, "grids.0.r=[]: must be a list with at least one"),
        ({"grids": [{"rr": [1]}]}, "grids.0.rr: no such axis; did you mean 'r'"),
        ({"grids": [{"r": [0.3]}]}, "0.3 is not a value of axes.r"),
        ({"only": {"seed": [9]}}, "only.seed: 9 is not a value"),
        ({"settings": {"trian": {"a": 1}}}, "set.trian: no such step; did you mean 'train'"),
        ({"settings": {"train": 3}}, "names no key"),
    ],
)
def test_a_wrong_sweep_is_told_so(changes: dict[str, Any], words: str) -> None:
    found = plan(**changes)
    assert any(words in problem for problem in found.problems), found.problems


def test_a_folder_of_a_step_that_is_not_run() -> None:
    steps = {
        "teacher": {"config": "tiny/prune", "when": {"r": 1.0}},
        "train": {"config": KD, "overrides": ["tokenizer.path={teacher.dir}", "seed={seed}"]},
    }
    assert "that step is not run in the cell r=0.5 seed=0" in plan(steps=steps).problems[0]


def test_alternatives_of_when_and_lists_inside_lists() -> None:
    axes = {"model": {"teacher": {"evaluate": ["batch_size=1"]}, "kd": {}}, "teacher": ["plain", "tuned"], "seed": [0]}
    steps = {
        "tune": {"config": "tiny/prune", "when": [{"model": "teacher"}, {"model": "kd", "teacher": "tuned"}]},
        "evaluate": {"config": KD, "overrides": [["seed=1", ["kd_ratio=1"]], "seed=2"]},
    }
    found = plan(steps=steps, axes=axes)
    assert [(cell.name, len(cell.steps)) for cell in found.cells] == [
        ("model=teacher", 2),
        ("model=kd teacher=plain", 1),
        ("model=kd teacher=tuned", 2),
    ]
    assert found.cells[1].steps[0].overrides == ("kd_ratio=1", "seed=2")
    assert found.cells[0].steps[0] == found.cells[2].steps[0] and len(found.steps) == 3


def test_only_restricts_what_is_run_and_not_what_there_is() -> None:
    whole = plan()
    found = plan(only={"seed": [1]})
    assert [cell.axes["seed"] for cell in found.cells] == [1, 1]
    assert found.whole == whole.cells == whole.whole and len(found.steps) == 2


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        ({"r": 0.5}, None),
        (None, None),
        ({"r": 0.7}, "baseline: no row has r=0.7; name one row by its axes: r=0.5; r=1.0"),
        ({"seed": 0}, "baseline: no row has seed=0"),
        ({"r": True}, "baseline: no row has r=true"),
    ],
)
def test_a_baseline_is_one_row_of_the_whole_plan(baseline: dict[str, Any] | None, words: str | None) -> None:
    found = baseline_problems(plan(only={"r": [1.0]}), baseline)
    assert found == [] if words is None else found[0].startswith(words)


def test_a_baseline_that_fits_several_rows() -> None:
    steps = {"train": {"config": KD, "overrides": ["kd_ratio={r}", "batch_size={b}"]}}
    axes = {"r": [0.5, 1.0], "b": [1, 2]}
    assert baseline_problems(plan(steps=steps, axes=axes), {"r": 0.5}) == []
    alone = plan(steps=steps, axes=axes, grids=[{"r": [0.5], "b": [1, 2]}])
    assert baseline_problems(alone, {"r": 0.5}) == [
        "baseline: 2 rows have r=0.5, and no other row is equal to one of them in all other axes; name one row by its axes: "
        "r=0.5 b=1; r=0.5 b=2; or none: ~baseline"
    ]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("a={t.dir}/final", ["final"]),
        ("a={t.dir}", [""]),
        ("a=[{t.dir}/final/x.json, '{t.dir}/step_2/']", ["final/x.json", "step_2"]),
        ("a=1", []),
    ],
)
def test_what_a_step_uses_of_another(override: str, parts: list[str]) -> None:
    steps = {"t": {"config": "tiny/prune"}, "train": {"config": KD, "overrides": [override]}}
    first, second = plan(steps=steps, axes={}).steps
    assert second.parts_of(first) == parts
