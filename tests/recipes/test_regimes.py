"""Regimes of the distillation recipe: who has written a step's text, and that it depends on nothing else than it should."""

import importlib.util
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import CLI, Fork
from safetensors.torch import load_file

from kdtune.generation import complete
from kdtune.rollouts import VLLMWriter, random_seed
from kdtune.rollouts import rollouts as writing

MEASURED = {"time", "step_seconds", "data_seconds", "generation_seconds", "tokens_per_second", "peak_memory_rss"}
REGIMES = ("gkd", "on_policy", "seqkd", "distillm", "distillm2", "minillm", "speculative")
RUN = ("run", "knowledge_distillation", "sample_prompts=[]", "max_steps_per_epoch=6", "save_every_n_steps=2",
       "run_val_every_n_steps=2", "dataset_val.split=test[:4]", "optimizer=torch.optim.SGD", "optimizer.lr=0.3",
       "~lr_scheduler", "rollouts.max_new_tokens=8")  # fmt: skip


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "loss" in row]


@pytest.fixture(scope="module")
def runs(cli: CLI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of each regime, uninterrupted."""
    folder = tmp_path_factory.mktemp("regimes")
    for name in REGIMES:
        done = cli(*RUN, "--config", f"tiny/{name}", f"output_dir={folder / name}")
        assert done.code == 0, (name, done.err)
    return folder


def test_the_source_of_each_step(runs: Path) -> None:
    share = {name: [row["rollout_share"] for row in steps(runs / name)] for name in REGIMES}
    assert share["on_policy"] == share["seqkd"] == share["minillm"] == [1.0] * 6
    assert set(share["gkd"]) == {0.0, 1.0}
    for name in REGIMES:
        for row in steps(runs / name):
            if row["rollout_share"] == 1.0:
                assert 1 <= row["rollout_tokens"] <= 8
                # Of a pair, the student's; the teacher's are learned from too.
                num_targets = row["generated_tokens"] if name == "distillm2" else round(row["rollout_tokens"] * 8)
                assert row["num_valid_tokens"] == num_targets
                # Two models: cross entropy on the teacher's text knows of one.
                assert ("rollout_overlap" in row) == ("rollout_log_ratio" in row) == (name != "seqkd")
                assert 0 < row.get("rollout_overlap", 0.5) < 1
            else:
                assert not {"rollout_tokens", "rollout_overlap", "rollout_log_ratio"} & row.keys()
            assert not {"overlap", "log_ratio"} & row.keys()
    assert all(row["kd_loss"] > 0 for row in steps(runs / "on_policy"))
    assert all("policy_gradient_loss" in row and "class_loss" not in row for row in steps(runs / "minillm"))
    assert all("kd_loss" not in row for row in steps(runs / "seqkd"))
    assert {row["rollout_staleness"] for row in steps(runs / "on_policy")} == {0.0}


def test_operations_are_added_up(runs: Path) -> None:
    for name in REGIMES:
        total = 0.0
        for row in steps(runs / name):
            assert row["flops"] > 0
            assert row.get("rollout_flops", 0) > 0 or row["rollout_share"] == 0.0 or "generated_tokens" not in row
            total += row["flops"] + row.get("rollout_flops", 0)
            assert row["total_flops"] == total
    # The student writes and learns, and the teacher reads: the same tokens in a forward of each, and in a backward.
    first = steps(runs / "on_policy")[0]

    assert first["rollout_flops"] < first["flops"] / 3


def test_a_replayed_text_is_older_and_was_written_before(cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, "--config", "tiny/distillm", f"output_dir={tmp_path}", "rollouts.policy.start=1.0",
               "rollouts.policy.replay=increasing", "max_steps_per_epoch=8", "rollouts.max_staleness=3")  # fmt: skip
    assert done.code == 0, done.err
    found = steps(tmp_path)
    assert all(row["rollout_share"] == 1.0 for row in found)
    fresh = ["generated_tokens" in row for row in found]
    # The published draws of these steps, and phi = 1: the buffer is full after two, and then new text comes in with the training.
    draws = [np.random.default_rng(random_seed(0, number)).random() for number in range(8)]
    assert fresh == [number < 2 or draw < number / 8 for number, draw in enumerate(draws)]
    # The buffer holds 16 texts, those of two steps.
    assert fresh[:2] == [True, True] and False in fresh
    assert all(0 < row["rollout_staleness"] <= 3 for row, is_new in zip(found, fresh, strict=True) if not is_new)


@pytest.mark.parametrize("name", REGIMES)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, runs: Path, cli: CLI, tmp_path: Path) -> None:
    whole, cut = runs / name, tmp_path / "cut"
    # What a run killed after its fourth step, which was validated, leaves.
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("final", "step_6"))
    done = cli(*RUN, "--config", f"tiny/{name}", f"output_dir={cut}", "resume_from_checkpoint=true")
    assert done.code == 0, done.err
    assert rows(cut) == rows(whole)
    for folder in ("final", "step_6"):
        assert (cut / folder / "model.safetensors").read_bytes() == (whole / folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "layout",
    [
        ("batch_size=8", "gradient_accumulation_steps=1"),
        ("batch_size=2", "gradient_accumulation_steps=4", "rollouts.slots=3"),
        pytest.param(
            ("tokens_per_micro_batch=300",), marks=pytest.mark.slow("another layout of the same texts, as two others")
        ),
        pytest.param(
            ("padding_free=false",), marks=pytest.mark.slow("another layout of the same texts, as two others")
        ),
    ],
    ids=["one batch", "four batches", "by tokens", "padded"],
)
@pytest.mark.parametrize(
    "name",
    [
        "gkd",
        pytest.param("distillm", marks=pytest.mark.slow("the same layouts, with texts from the buffer")),
        pytest.param("distillm2", marks=pytest.mark.slow("the same layouts, of two writers' texts")),
    ],
)
def test_texts_do_not_depend_on_batches(
    name: str, layout: tuple[str, ...], runs: Path, cli: CLI, tmp_path: Path
) -> None:
    done = cli(*RUN, "--config", f"tiny/{name}", f"output_dir={tmp_path}", *layout)
    assert done.code == 0, done.err
    for ours, theirs in zip(steps(tmp_path), steps(runs / name), strict=True):
        assert ours["rollout_share"] == theirs["rollout_share"]
        for key in ("num_valid_tokens", "rollout_tokens", "rollout_repetition"):
            assert ours.get(key) == theirs.get(key)
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


@pytest.mark.parametrize("kd_ratio", [1.0, 0.25])
def test_a_pair_is_the_sum_of_its_two_texts(kd_ratio: float, cli: CLI, tmp_path: Path) -> None:
    """One step: 2 - b times the loss on the data's answers, with cross entropy, b times the skew reverse KL on the student's text."""
    b, skew_reverse = 0.6, "{_component_: kdtune.losses.SkewReverseKL, detach_mixture: true}"
    own = {
        "pair": (
            "tiny/distillm2",
            "rollouts.policy.beside=dataset",
            f"rollouts.policy.student_weight={b}",
            f"kd_ratio={kd_ratio}",
        ),
        "data": ("tiny/distillm2", "~rollouts", "kd_loss=kdtune.losses.SkewForwardKL", f"kd_ratio={kd_ratio}"),
        "student": ("tiny/on_policy", f"kd_loss={skew_reverse}"),
    }
    sums, counts, watched = {}, {}, {}
    for name, (config, *more) in own.items():
        without = [one for one in RUN if name != "data" or not one.startswith("rollouts.")]
        done = cli(*without, "--config", config, f"output_dir={tmp_path / name}", *more, "max_steps_per_epoch=1", "save_every_n_steps=1",
                   "run_val_every_n_steps=1")  # fmt: skip
        assert done.code == 0, done.err
        (row,) = steps(tmp_path / name)
        counts[name] = row["num_valid_tokens"]
        sums[name] = row["loss"] * counts[name]
        watched[name] = [row.get(f"rollout_{key}") for key in ("log_ratio", "overlap", "tokens", "entropy")]
    assert counts["pair"] == counts["data"] + counts["student"]
    assert watched["pair"] == pytest.approx(watched["student"], rel=1e-5)  # which the data's text is no part of
    assert sums["pair"] == pytest.approx((2 - b) * sums["data"] + b * kd_ratio * sums["student"], rel=1e-5)


def test_a_second_pass_over_unchanged_weights_is_the_first(cli: CLI, tmp_path: Path) -> None:
    """MiniLLM's several passes: with a learning rate of 0 a replayed step is the one that wrote its texts; otherwise it goes on."""
    # The first step would replay, and has nothing to; the sixth writes.
    more = ("rollouts.policy.mixed=0.12", "rollouts.policy.replay=0.88", "rollouts.buffer_size=8")
    run = (*RUN, "--config", "tiny/minillm", *more)
    still = cli(*run, "optimizer.lr=0", f"output_dir={tmp_path / 'still'}")
    assert still.code == 0, still.err
    written: dict[str, Any] = {}
    passes = []
    for row in steps(tmp_path / "still"):
        if "generated_tokens" in row:
            written, _ = row, passes.append(0)
            continue
        passes[-1] += 1
        assert row["rollout_staleness"] > 0
        for key in ("loss", "kd_loss", "policy_gradient_loss", "grad_norm", "num_valid_tokens"):
            assert row[key] == pytest.approx(written[key], rel=1e-4, abs=1e-6)
    assert passes == [4, 0]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli(*run, f"output_dir={whole}").code == 0
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("final", "step_6"))
    resumed = cli(*run, f"output_dir={cut}", "resume_from_checkpoint=true")
    assert resumed.code == 0, resumed.err
    assert rows(cut) == rows(whole)
    assert (cut / "final" / "model.safetensors").read_bytes() == (whole / "final" / "model.safetensors").read_bytes()


def test_the_student_s_own_text_with_the_teacher_s_top_k(cli: CLI, tmp_path: Path) -> None:
    """Of all ids it is the whole reverse KL; of few, with the others as one id more or ignored, less."""

    def losses(name: str, *targets: str) -> list[float]:
        done = cli(
            *RUN, "--config", "tiny/on_policy", f"output_dir={tmp_path / name}", *targets, "max_steps_per_epoch=2"
        )
        assert done.code == 0, done.err
        return [row["loss"] for row in steps(tmp_path / name)]

    whole = losses("whole")
    for outside in ("tail", "ignore"):
        every, few = (
            losses(f"{outside}-{k}", f"teacher_targets={{_component_: kdtune.losses.TopKTargets, k: {k}, outside: {outside}}}")
            for k in (320, 4)
        )  # fmt: skip
        assert every == pytest.approx(whole, rel=1e-4)
        assert all(0 < one < other for one, other in zip(few, whole, strict=True))


def test_the_log_ratio_of_the_teacher_s_text_is_not_recorded(cli: CLI, tmp_path: Path) -> None:
    """Not of that which is learned from again either."""
    done = cli(*RUN, "--config", "tiny/gkd", f"output_dir={tmp_path}", "rollouts.policy.student=0", "rollouts.policy.teacher=0.5",
               "rollouts.policy.replay=0.5", "rollouts.buffer_size=8")  # fmt: skip
    assert done.code == 0, done.err
    assert any(row["rollout_staleness"] > 0 for row in steps(tmp_path))
    assert all("rollout_log_ratio" not in row and "rollout_overlap" in row for row in steps(tmp_path))


def test_kept_targets_are_the_teacher_s_answers(cli: CLI, tmp_path: Path) -> None:
    """What the buffer keeps of the teacher trains what asking it again does."""
    more = ("rollouts.policy.start=1.0", "rollouts.policy.replay=increasing")
    for kept in ("true", "false"):
        done = cli(
            *RUN, "--config", "tiny/distillm", f"output_dir={tmp_path / kept}", *more, f"rollouts.keep_targets={kept}"
        )
        assert done.code == 0, done.err
    ours, theirs = (load_file(tmp_path / kept / "final" / "model.safetensors") for kept in ("true", "false"))
    assert [row["loss"] for row in steps(tmp_path / "true")] == pytest.approx(
        [row["loss"] for row in steps(tmp_path / "false")], rel=1e-5
    )
    assert all(((ours[name] - theirs[name]).abs().max() < 1e-5) for name in ours)


def test_a_teacher_that_knows_the_text_alone_can_teach_the_student_s_own(cli: CLI, tmp_path: Path) -> None:
    sampled = ("kd_loss=kdtune.losses.SampledReverseKL",)
    done = cli(*RUN, "--config", "tiny/on_policy", f"output_dir={tmp_path / 'run'}", *sampled)
    assert done.code == 0, done.err
    assert all(row["kd_loss"] > 0 for row in steps(tmp_path / "run"))
    refused = cli(*RUN, "--config", "tiny/gkd", f"output_dir={tmp_path / 'none'}", *sampled)
    assert refused.code == 2
    assert "a data set's text is not" in refused.err


def test_there_is_no_cross_entropy_on_the_student_s_own_text(cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, "--config", "tiny/gkd", f"output_dir={tmp_path}", "kd_ratio=0.5")
    assert done.code == 0, done.err
    for row in steps(tmp_path):
        assert ("class_loss" in row) == (row["rollout_share"] == 0)
        of_class = row.get("class_loss", 0.0)
        assert row["loss"] == pytest.approx(0.5 * of_class + 0.5 * row["kd_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("config", "changed", "said"),
    [
        ("on_policy", ("kd_ratio=0.5",), "kd_ratio=0.5: on the student's own text there is no cross entropy"),
        ("gkd", ("kd_ratio=0",), "kd_ratio=0: of the student's own text only the divergence"),
        ("distillm", ("~rollouts.buffer_size",), "rollouts.buffer_size=0: the policy learns from earlier texts"),
        ("gkd", ("rollouts.buffer_size=5",), "rollouts.buffer_size=5: the policy never learns from earlier texts"),
        ("gkd", ("rollouts.policy.student=1.5",), "student=1.5"),
        ("gkd", ("rollouts.max_new_tokens=0",), "max_new_tokens=0"),
        ("gkd", ("parallelism.tp=2",), "parallelism.tp: processes that share a model"),
        ("gkd", ("~teacher_model", "teacher={_component_: kdtune.teachers.CachedTeacher, path: nowhere}"), "teacher: a cache knows"),
        ("seqkd", ("teacher_processes=1", "kd_ratio=0.5"), "rollouts.policy: the teacher writes only as a model"),
        ("gkd", ("dataset.packed=true",), "dataset.packed=true: batch_size would count packs"),
        ("minillm", ("rollouts.temperature=0.5",), "rollouts.policy_gradient: holds for text drawn from the model's own"),
        ("on_policy", ("kd_loss=kdtune.losses.SampledReverseKL", "rollouts.top_p=0.9"), "kd_loss: holds for text drawn"),
        ("distillm", ("dataset_val=null", "run_val_every_n_steps=null"), "rollouts.policy: goes by val_class_loss of the validations"),
        ("minillm", ("teacher_device=cpu",), "teacher_device=cpu: both models write a text on one device"),
        ("speculative", ("hidden_loss=kdtune.losses.HiddenStateLoss",), "hidden_loss: of text that both models write"),
        ("gkd", ("dataset.train_on=all",), "dataset: has no prompts to answer: its examples are trained on from their second token"),
        ("distillm2", ("rollouts.policy=kdtune.rollouts.Share", "rollouts.policy.teacher=1"),
         "kd_loss: has a divergence for the student's own text"),
        ("distillm2", ("rollouts.policy.student_weight=2",), "student_weight=2"),
        ("distillm2", ("rollouts.policy_gradient={_component_: kdtune.rollouts.PolicyGradient}",),
         "rollouts.policy_gradient: is not defined for pairs"),
        ("distillm2", ("rollouts.buffer_size=5",), "rollouts.buffer_size=5: the policy never learns"),
        ("distillm2", ("kd_loss=kdtune.losses.WeightedSum", "kd_loss.weights=[1]",
                       "kd_loss.divergences=[{_component_: kdtune.losses.presets.distillm2}]"),
         "WeightedSum: kdtune.losses.divergences.mixture.BySource chooses by who has written the text"),
        ("distillm2", ("~rollouts",), "kd_loss: has a divergence for the student's own text, and only the data's is learned from"),
        ("distillm2", ("optimizer_in_backward=true", "~clip_grad_norm", "gradient_accumulation_steps=1"),
         "optimizer_in_backward=true, rollouts.policy: a step has micro-batches"),
        ("speculative", ("rollouts.compile=true",), "rollouts.compile=true: nothing is written that"),
        ("gkd", ("rollouts.slots=0",), "slots=0: must be 1 or more"),
        ("gkd", ("rollouts=kdtune.rollouts.Share", "rollouts.student=1"), "rollouts: kdtune.rollouts.Share does not write texts"),
        ("distillm", ("hidden_loss=kdtune.losses.HiddenStateLoss",), "rollouts.keep_targets=true: hidden_loss"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_weight_is_read(
    config: str, changed: tuple[str, ...], said: str, cli: CLI, tmp_path: Path
) -> None:
    done = cli(
        "run", "knowledge_distillation", "--config", f"tiny/{config}", f"output_dir={tmp_path / 'run'}", *changed
    )
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "run").exists()


def test_a_random_teacher_and_texts_without_end_stop_the_run(cli: CLI, tmp_path: Path) -> None:
    endless = cli(*RUN, "--config", "tiny/on_policy", f"output_dir={tmp_path / 'endless'}", "rollouts.guards.max_cut_share=0.5",
                  "rollouts.guards.patience=2")  # fmt: skip
    assert endless.code == 1
    assert "were cut by the limit" in endless.err
    broken = cli(
        *RUN, "--config", "tiny/on_policy", f"output_dir={tmp_path / 'broken'}", "rollouts.guards.max_teacher_loss=0.9"
    )
    assert broken.code == 1
    assert "nothing can be learned from it" in broken.err


def test_the_forward_of_new_tokens_is_compiled_if_asked_for(
    cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def noting(*args: Any, compile: bool, **more: Any) -> Any:
        asked.append(compile)
        return complete(*args, **more)

    monkeypatch.setattr(writing, "complete", noting)
    for number, value in enumerate(("true", "false")):
        done = cli(
            *RUN,
            "--config",
            "tiny/on_policy",
            "max_steps_per_epoch=1",
            f"rollouts.compile={value}",
            f"output_dir={tmp_path / value}",
        )
        assert done.code == 0 and asked == [True, False][: number + 1], done.err


def test_vllm_writes_in_place_of_the_decoder(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake of vLLM that computes with transformers: the most likely text after each step's weights is the decoder's."""
    run = (
        *RUN[:-1],
        "--config",
        "tiny/on_policy",
        "rollouts.temperature=0",
        "max_steps_per_epoch=3",
        "rollouts.max_new_tokens=5",
    )
    writer = "rollouts.writer={_component_: kdtune.rollouts.VLLMWriter, sleeps: false}"
    if importlib.util.find_spec("vllm") is None:
        refused = cli("validate", "tiny/on_policy", writer)
        assert refused.code == 2
        assert "rollouts.writer: needs vLLM, which is not installed; run pip install 'kdtune[vllm]'" in refused.err
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "unit" / "rollouts" / "fake_vllm"))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    for name, more in (("decoder", []), ("vllm", [writer])):
        done = cli(*run, *more, f"output_dir={tmp_path / name}")
        assert done.code == 0, done.err
    for ours, theirs in zip(steps(tmp_path / "vllm"), steps(tmp_path / "decoder"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    with monkeypatch.context() as patched:  # no weights are read, and no vLLM is started
        patched.setattr(VLLMWriter, "start", lambda *_, **__: pytest.fail("started"))
        refused = cli(*run, writer, "teacher_model.vocab_size=300", f"output_dir={tmp_path / 'ids'}")
    assert refused.code == 2 and "the student has 320 ids and the teacher 300" in refused.err
    for config, message in (("seqkd", "writes the student's text, and the policy has none"),
                            ("speculative", "in speculative text both models compute every token")):  # fmt: skip
        refused = cli("validate", f"tiny/{config}", writer)
        assert refused.code == 2 and message in " ".join(refused.err.split())


def test_a_resumed_run_without_the_rollouts_is_refused(runs: Path, cli: CLI, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(runs / "gkd", cut, ignore=shutil.ignore_patterns("final", "step_6"))
    done = cli(*RUN[:-1], "--config", "tiny/gkd", f"output_dir={cut}", "resume_from_checkpoint=true", "~rollouts")
    assert done.code == 2
    assert "rollouts" in done.err


def test_a_policy_that_listens_to_validations_keeps_their_steps(runs: Path, cli: CLI, tmp_path: Path) -> None:
    for name, code in (("distillm", 2), ("gkd", 0)):
        cut = tmp_path / name
        shutil.copytree(runs / name, cut, ignore=shutil.ignore_patterns("final", "step_6"))
        before = rows(cut)
        done = cli(
            *RUN,
            "--config",
            f"tiny/{name}",
            f"output_dir={cut}",
            "resume_from_checkpoint=true",
            "run_val_every_n_steps=3",
        )
        assert done.code == code, done.err
        if code:
            assert "run_val_every_n_steps: was 2, is 3" in done.err
            assert rows(cut) == before


def test_the_page_of_a_run_has_the_curves_of_its_text(runs: Path, cli: CLI, tmp_path: Path) -> None:
    page = ("run", "report", f"run={runs / 'minillm'}", f"output_dir={tmp_path / 'page'}")
    done = cli(*page)
    assert done.code == 0, done.err
    text = (tmp_path / "page" / "report.html").read_text()
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[0])
    names = ["rollout_entropy", "rollout_log_ratio", "rollout_overlap", "rollout_tokens", "rollout_cut_share", "rollout_repetition",
             "rollout_staleness", "generated_tokens", "num_valid_tokens"]  # fmt: skip
    assert [panel["metric"] for panel in data["panels"]][-len(names) :] == names
    for name in names:
        (curve,) = [one for one in data["curves"] if one["metric"] == name]
        assert curve["values"] == pytest.approx([row[name] for row in steps(runs / "minillm")], rel=1e-5)
    assert f"<td>{steps(runs / 'minillm')[-1]['rollout_log_ratio']:.4g} (step 6)</td>" in text
    again = cli(*page)
    assert (again.code, "overwrite=true replaces it" in again.err) == (2, True)
    assert cli(*page, "overwrite=true").code == 0
    for wrong, said in (
        ("metrics=[evaluate.*]", "metrics, baseline: are about a sweep's rows"),
        (f"run={tmp_path}", "holds no training run"),
    ):
        refused = cli(*page, "overwrite=true", wrong)
        assert (refused.code, said in refused.err) == (2, True), refused.err


@pytest.mark.slow("eleven runs; a run that is resumed once is among the quick tests")
@pytest.mark.parametrize(
    ("name", "more", "shares"),
    [
        ("distillm", ("rollouts.policy.start=0.9", "rollouts.policy.replay=increasing"), {0.0, 1.0}),
        ("distillm2", ("rollouts.policy.beside=dataset", "rollouts.policy.final_weight=1.5"), {0.5}),
    ],
)
def test_an_on_policy_run_that_is_killed_ten_times(
    name: str, more: tuple[str, ...], shares: set[float], cli: CLI, tmp_path: Path
) -> None:
    """SIGKILL at random moments, in the middle of writing and learning: the same texts, losses and weights, to the bit."""
    run = (
        *RUN,
        "--config",
        f"tiny/{name}",
        *more,
        "max_steps_per_epoch=24",
        "save_every_n_steps=1",
        "keep_last_n_checkpoints=2",
    )
    whole, cut, random, num_unfinished = tmp_path / "whole", tmp_path / "cut", np.random.default_rng(0), 0
    assert cli(*run, f"output_dir={whole}").code == 0
    for kill in range(10):
        process = Fork(*run, f"output_dir={cut}", "resume_from_checkpoint=true")
        # Not before a step more is saved, and a random moment later.
        while process.is_running and not any(int(one.name[5:]) > 2 * kill for one in cut.glob("step_*")):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
        process.send(signal.SIGKILL)
        process.end(timeout=60)
        num_unfinished += not (cut / "final").exists()
    assert num_unfinished >= 8
    done = cli(*run, f"output_dir={cut}", "resume_from_checkpoint=true")
    assert done.code == 0, done.err
    assert rows(cut) == rows(whole)
    assert {row["rollout_share"] for row in steps(whole)} == shares
    assert (cut / "final" / "model.safetensors").read_bytes() == (whole / "final" / "model.safetensors").read_bytes()
