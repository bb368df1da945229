"""The recipe through the command line: what it measures, from which forms of a model, what it writes and refuses."""

import json
import math
import shutil

import pytest
import torch
from evaluation_tasks import FILES, write_task, write_tasks

from kdtune import evaluation
from kdtune.checkpoint import load_model, save_model, write_adapter
from kdtune.errors import CheckpointError
from kdtune.models import apply_lora, llama
from kdtune.tokenizers import byte_tokenizer

RECIPE = "eleuther_eval"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("evaluate") / "tasks", 8)


def command(output_dir, checkpoint, *overrides):
    return ["run", RECIPE, "--config", "tiny/evaluate", f"output_dir={output_dir}", "~model", "~teacher_model", "~dataset_val",
            "checkpointer._component_=kdtune.checkpoint.Checkpointer", f"checkpointer.checkpoint_dir={checkpoint}", *overrides]  # fmt: skip


def results(output_dir):
    return json.loads((output_dir / "results.json").read_text())


def measure(cli, output_dir, checkpoint, *overrides):
    done = cli(*command(output_dir, checkpoint, *overrides))
    assert done.code == 0, done.err
    return results(output_dir)["metrics"]


def test_all_measurements_at_once(cli, good, tasks, tmp_path):
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} it is"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "story.txt").write_text("Once there was a lamp. " * 20)
    out = tmp_path / "out"
    settings = f"name: own, source: {tmp_path}/rows.jsonl, max_new_tokens: 5, prompt: plain"
    rouge = f"[{{_component_: kdtune.evaluation.InstructionSet, {settings}}}]"
    done = cli(
        "run", RECIPE, "--config", "tiny/evaluate", f"output_dir={out}", f"include_path={tasks}",
        "tasks=[own_endings,own_texts,own_answers]", "limit=4", "log_samples=true", f"perplexity_files=[{tmp_path}/story.txt]",
        f"rouge={rouge}",
    )  # fmt: skip
    assert done.code == 0, done.err
    document = results(out)
    metrics = document["metrics"]
    assert {"own_endings/acc", "own_endings/acc_stderr", "own_endings/acc_norm", "own_texts/word_perplexity", "own_answers/exact_match",
            "held_out/class_loss", "held_out/kd_loss", "held_out/agreement", "held_out/teacher_class_loss", "perplexity/story",
            "perplexity/story/word", "perplexity/story/byte",
            "perplexity/story/bits_per_byte", "rouge/own", "rouge/own_stderr"} <= set(metrics)  # fmt: skip
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert metrics["held_out/perplexity"] == pytest.approx(math.exp(metrics["held_out/class_loss"]))
    assert document["lm_eval"]["n-samples"]["own_endings"]["effective"] == 4
    assert document["versions"]["lm_eval"] and document["versions"]["torch"]
    assert "own_endings" in done.out and "± stderr" in done.out and str(out / "results.json") in done.out
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "results.json", "run.json", "samples"]
    samples = [json.loads(line) for line in (out / "samples" / "own_endings.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and all(len(sample["resps"]) == 4 for sample in samples)
    assert sum(sample["acc"] for sample in samples) / 4 == metrics["own_endings/acc"]
    answers = [json.loads(line) for line in (out / "samples" / "rouge_own.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["Say 0.", "Say 1.", "Say 2."]


def test_a_stopped_evaluation_keeps_what_it_has_measured(cli, good, tasks, tmp_path, monkeypatch):
    (tmp_path / "story.txt").write_text("Once there was a lamp. " * 20)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say \\ud83d.", "output": "cut \\ud83d"}\n')
    settings = f"name: own, source: {tmp_path}/rows.jsonl, max_new_tokens: 3, prompt: plain"
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    line = command(
        out, good / "model", f"include_path={tasks}", "tasks=[own_endings,own_texts]", "limit=2", "log_samples=true",
        f"perplexity_files=[{tmp_path}/story.txt]", f"rouge=[{{_component_: kdtune.evaluation.InstructionSet, {settings}}}]",
    )  # fmt: skip
    whole, asked = evaluation.evaluate_tasks, []

    def stopped(model, tokenizer, tasks, **arguments):
        asked.append(results(partial)["metrics"])  # on the disk by then, for a process that is killed
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(model, tokenizer, tasks, **arguments)

    monkeypatch.setattr(evaluation, "evaluate_tasks", stopped)
    assert cli(*line).code == 1
    assert not out.exists() and "own_endings/acc" in asked[1] and "own_texts/byte_perplexity" not in asked[1]
    assert {"perplexity/story", "rouge/own"} <= asked[0].keys() and "own_endings/acc" not in asked[0]
    # A lone surrogate is no character, but JSON has it.
    answer = json.loads((partial / "samples" / "rouge_own.jsonl").read_text())
    assert (answer["prompt"], answer["references"]) == ("Say \ud83d.", ["cut \ud83d"])
    assert len((partial / "samples" / "own_endings.jsonl").read_text().splitlines()) == 2

    monkeypatch.undo()
    refused = cli(*line)
    assert refused.code == 2 and "out.partial beside it has what a stopped evaluation measured" in refused.err
    shutil.rmtree(partial)
    done = cli(*line)
    assert done.code == 0, done.err
    found = results(out)
    assert asked[1].items() <= found["metrics"].items() and not partial.exists()
    assert set(found["lm_eval"]["results"]) == set(found["lm_eval"]["n-shot"]) == {"own_endings", "own_texts"}


def test_numbers_do_not_depend_on_the_batch_size(cli, good, tasks, tmp_path):
    settings = (f"include_path={tasks}", "tasks=[own_endings,own_letters,own_texts,own_answers]")
    one, many = (measure(cli, tmp_path / f"{size}", good / "model", *settings, f"batch_size={size}") for size in (1, 7))
    assert one == pytest.approx(many, rel=1e-5) and one


def test_sharded_folder_and_adapter_on_its_base(cli, good, tasks, tmp_path):
    settings = (f"include_path={tasks}", "tasks=[own_texts]", "limit=3")
    plain = measure(cli, tmp_path / "plain", good / "model", *settings)
    assert measure(cli, tmp_path / "sharded", good / "sharded", *settings) == plain
    model = apply_lora(load_model(good / "model"), lora_rank=4)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    (tmp_path / "adapter").mkdir()
    write_adapter(model, tmp_path / "adapter", base=good / "model")
    adapted = measure(
        cli, tmp_path / "adapted", good / "model", *settings, f"checkpointer.adapter_dir={tmp_path / 'adapter'}"
    )
    assert adapted["own_texts/byte_perplexity"] != pytest.approx(plain["own_texts/byte_perplexity"], rel=1e-3)


@pytest.mark.real
def test_a_gguf(cli, smollm2_gguf, tasks, tmp_path):
    settings = (f"include_path={tasks}", "tasks=[own_endings]", "limit=2", "tokenizer._component_=kdtune.tokenizers.load",
                f"tokenizer.path={smollm2_gguf}", "max_seq_length=256")  # fmt: skip
    assert 0 <= measure(cli, tmp_path / "out", smollm2_gguf, *settings)["own_endings/acc"] <= 1


def test_a_finished_folder_is_refused_and_left_alone(cli, good, tasks, tmp_path):
    settings = (f"include_path={tasks}", "tasks=[own_texts]", "limit=2")
    measure(cli, tmp_path / "out", good / "model", *settings)
    before = (tmp_path / "out" / "results.json").read_bytes()
    again = cli(*command(tmp_path / "out", good / "model", *settings))
    assert again.code == 2 and "already holds a run; choose another output_dir" in again.err
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_examples_token_by_token(cli, tmp_path):
    """inspect.html has the first examples, with the divergence that the table has the mean of."""
    done = cli("run", "evaluate", "--config", "tiny/evaluate", f"output_dir={tmp_path / 'out'}", "inspect=27",
               "kd_loss=kdtune.losses.presets.gkd")  # fmt: skip
    assert done.code == 0 and f"{tmp_path / 'out' / 'inspect.html'}" in done.out
    page = (tmp_path / "out" / "inspect.html").read_text()
    found = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    tokens = [token for row in found["rows"] for token in row if "divergence" in token]
    metrics = results(tmp_path / "out")["metrics"]
    assert len(found["rows"]) == 27 and len(tokens) == metrics["held_out/tokens"]
    mean = sum(token["divergence"] for token in tokens) / len(tokens)
    assert mean == pytest.approx(metrics["held_out/kd_loss"], rel=1e-3)
    assert found["divergence"] == "JSD (0.5)"


TEACHER = "{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: x}"
WRONG_SET = "{_component_: kdtune.evaluation.InstructionSet, name: a, source: b, max_tokens: 3}"
BAD_SET = "{_component_: kdtune.evaluation.InstructionSet, name: a, source: b, top_k: 0}"
BAD = {
    "nothing to measure": (["dataset_val=null"], "nothing to measure"),
    "limit": (["tasks=[own_texts]", "limit=0"], "limit=0"),
    "settings without tasks": (["perplexity_files=[a.txt]", "limit=3"], "limit: has no effect without tasks"),
    "page without a teacher": (
        ["dataset_val=kdtune.data.quickstart_dataset", "inspect=2"],
        "inspect=2: needs a teacher that is a model",
    ),
    "page of fewer than no examples": (["perplexity_files=[a.txt]", "inspect=-1"], "inspect=-1: must be 0"),
    "stride without files": (["tasks=[own_texts]", "perplexity_stride=3"], "perplexity_stride=3"),
    "two files of one name": (["perplexity_files=[a/x.txt,b/x.txt]"], "x occurs twice"),
    "teacher without examples": (
        ["tasks=[own_texts]", f"teacher_checkpointer={TEACHER}"],
        "dataset_val: missing, the examples to compare with the teacher on; give it, or ~teacher_checkpointer",
    ),
    "unknown task": (["tasks=[own_text]"], "'own_text' is not a task"),
    "missing split": (["tasks=[own_split]"], "needs the split 'validation'"),
    "missing file": (["perplexity_files=[/nowhere/x.txt]"], "/nowhere/x.txt"),
    "samples without tasks": (["perplexity_files=[a.txt]", "log_samples=true"], "log_samples=true: has no effect"),
    "sets that are no list": ([f"rouge={BAD_SET}"], "rouge: must be a list of sets; write rouge=[{_component_: "),
    "another kind of set": (
        ["rouge=[{_component_: kdtune.data.quickstart_dataset}]"],
        "the recipe needs InstructionSet here",
    ),
    "sampling of a set": ([f"rouge=[{BAD_SET}]"], "rouge.a.top_k=0"),
    "unknown argument of a set": ([f"rouge=[{WRONG_SET}]"], "rouge.0.max_tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_a_weight_is_read(cli, good, tmp_path, monkeypatch, name):
    overrides, words = BAD[name]
    folder = write_tasks(tmp_path / "tasks", 2)
    write_task(folder, "own_split", FILES["endings"], split="validation")
    monkeypatch.setattr("kdtune.parallel.build_model", lambda *args, **kwargs: pytest.fail("a weight was read"))
    needs_path = any(override.startswith("tasks=") for override in overrides)
    done = cli(
        *command(tmp_path / "out", good / "model", *([f"include_path={folder}"] if needs_path else []), *overrides)
    )
    assert done.code == 2 and words in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_texts_of_like_names_keep_their_numbers_apart(cli, good, tmp_path):
    (tmp_path / "a.txt").write_text("Once there was a lamp.")
    (tmp_path / "a_word.txt").write_text("And twice there was none of them.")
    files = f"perplexity_files=[{tmp_path}/a.txt,{tmp_path}/a_word.txt]"
    both = measure(cli, tmp_path / "both", good / "model", files)
    one, two = (
        measure(cli, tmp_path / name, good / "model", f"perplexity_files=[{tmp_path}/{name}.txt]")
        for name in ("a", "a_word")
    )
    assert len(both) == 8 and both == pytest.approx({**one, **two}, rel=1e-5)


def test_a_folder_that_is_not_empty_is_refused_at_the_start(cli, good, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    monkeypatch.setattr("kdtune.parallel.build_model", lambda *args, **kwargs: pytest.fail("a weight was read"))
    done = cli("run", RECIPE, "--config", "tiny/evaluate", f"output_dir={tmp_path / 'out'}")
    assert done.code == 2 and "is not empty (holds 'notes.txt'); choose another output_dir" in done.err


def test_the_table_is_printed_before_the_folder_is_written(cli, tmp_path, monkeypatch):
    def full(path):
        raise CheckpointError("disk full")

    monkeypatch.setattr("kdtune.checkpoint.atomic_folder", full)
    done = cli("run", RECIPE, "--config", "tiny/evaluate", f"output_dir={tmp_path / 'out'}")
    assert done.code == 2 and "disk full" in done.err and "cross entropy" in done.out


def test_another_models_tokenizer_is_refused(cli, good, tmp_path, monkeypatch):
    shutil.copytree(good / "model", tmp_path / "model")
    vocabulary = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocab = vocabulary["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(vocabulary))
    (tmp_path / "a.txt").write_text("Once there was a lamp.")
    monkeypatch.setattr("kdtune.parallel.build_model", lambda *args, **kwargs: pytest.fail("a weight was read"))
    done = cli(*command(tmp_path / "out", tmp_path / "model", f"perplexity_files=[{tmp_path}/a.txt]"))
    assert done.code == 2 and f"checkpointer={tmp_path / 'model'}: the tokenizer is not this model's" in done.err


def test_a_vocabulary_that_is_too_small_is_refused(cli, tmp_path):
    (tmp_path / "a.txt").write_text("Once there was a lamp.")
    done = cli("run", RECIPE, "--config", "tiny/evaluate", f"output_dir={tmp_path / 'out'}", "~dataset_val", "~teacher_model",
               "model.vocab_size=257", f"perplexity_files=[{tmp_path}/a.txt]")  # fmt: skip
    assert done.code == 2 and "the model's vocabulary is 257" in done.err


@pytest.mark.parametrize("key", ["", "teacher_"])
def test_a_quantized_head_is_refused_before_the_examples(cli, tmp_path, monkeypatch, key):
    done = cli("run", "quantize", "--config", "tiny/quantize", f"output_dir={tmp_path / 'q'}", "model.tie_embeddings=false",
               "quantize_output=true", "~dataset_val")  # fmt: skip
    assert done.code == 0, done.err
    monkeypatch.setattr("kdtune.evaluation.evaluate_ce", lambda *args, **kwargs: pytest.fail("measured"))
    monkeypatch.setattr("kdtune.evaluation.evaluate_kd", lambda *args, **kwargs: pytest.fail("measured"))
    checkpointer = f"{{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {tmp_path / 'q'}}}"
    done = cli("run", RECIPE, "--config", "tiny/evaluate", f"output_dir={tmp_path / 'out'}", f"~{key}model",
               f"{key}checkpointer={checkpointer}")  # fmt: skip
    assert done.code == 2 and f"the {'teacher' if key else 'model'}'s output head cannot be fused" in done.err


OWN_SET = "rouge=[{{_component_: kdtune.evaluation.InstructionSet, name: own, source: {source}}}]"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "i", "output": "o"}, None),
        ({"prompt": "i", "response": ["o", "p"]}, "row 1: column 'instruction' is missing; found: prompt, response"),
        ({"question": "i", "answer": "o"}, "set 'rouge.0.column_map={instruction: question, output: answer}'"),
        ({"messages": [{"role": "user", "content": "i"}]}, "name the columns in the dataset's config"),
        ({"instruction": "i", "output": 3}, "row 1: column 'output' must hold text: found int (3)"),
    ],
)
def test_validate_looks_at_the_first_row_of_a_set_of_instructions(cli, tmp_path, row, told):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    done = cli("validate", "tiny/evaluate", OWN_SET.format(source=rows))
    assert done.code == (0 if told is None else 2), done.err
    assert "rouge.own: " not in done.err if told is None else told in done.err
    # What is not on this machine may be where the evaluation runs, as with training data.
    assert cli("validate", "tiny/evaluate", OWN_SET.format(source=tmp_path / "elsewhere.jsonl")).code == 0
    assert cli("validate", "tiny/evaluate", OWN_SET.format(source="databricks/databricks-dolly-15k")).code == 0


def test_a_set_whose_file_is_missing_is_told_before_a_weight_is_read(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("kdtune.parallel.build_model", lambda *args, **kwargs: pytest.fail("a weight was read"))
    missing = OWN_SET.format(source=tmp_path / "missing.jsonl")
    done = cli("run", "evaluate", "--config", "tiny/evaluate", f"output_dir={tmp_path / 'out'}", missing)
    assert done.code == 2 and "missing.jsonl: no such file" in done.err


def test_the_price_of_a_quantized_teacher(cli, tmp_path):
    """Of a model against itself: no distance without quantization, a small one and fewer bytes with it."""
    torch.manual_seed(0)
    save_model(llama(vocab_size=320, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=128,
                     max_seq_len=256, tie_embeddings=True), tmp_path / "model", tokenizer=byte_tokenizer())  # fmt: skip
    node = f"{{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {tmp_path / 'model'}}}"
    both = ["run", RECIPE, "--config", "tiny/evaluate", "~model", "~teacher_model", f"checkpointer={node}",
            f"teacher_checkpointer={node}"]  # fmt: skip
    assert cli(*both, f"output_dir={tmp_path / 'same'}").code == 0
    assert results(tmp_path / "same")["metrics"]["held_out/kd_loss"] == pytest.approx(0, abs=1e-6)
    done = cli(*both, f"output_dir={tmp_path / 'out'}", "quantization=int8")
    assert done.code == 0, done.err
    found = results(tmp_path / "out")["metrics"]
    assert 0 < found["held_out/kd_loss"] < 1e-3 and found["held_out/agreement"] > 0.9
    assert found["cost/model/megabytes"] < 0.6 * found["cost/teacher/megabytes"]
    assert found["cost/teacher/megabytes"] == pytest.approx(
        (tmp_path / "model" / "model.safetensors").stat().st_size / 1e6, rel=0.02
    )
    assert min(found[f"cost/{one}/tokens_per_second"] for one in ("model", "teacher")) > 0
    assert "megabytes" in done.out and "tokens_per_second" in done.out
