"""The generate recipe through its CLI on a tiny model: what it prints and writes, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdtune import generation
from kdtune.checkpoint import load_model
from kdtune.data import Conversation, Message
from kdtune.generation import Sampling, encode_prompt, generate
from kdtune.tokenizers import byte_tokenizer

CONFIG = "tiny/generate"
PROMPTS = ["Hi", "What is a rainbow, and why?", "Sing!", "Count to ten."]


def arguments(good: Path, *overrides: str) -> list[str]:
    folder = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {good / 'model'}}}"
    return ["run", "generate", "--config", CONFIG, folder, *overrides]


def expected(good: Path, prompt: str, **settings) -> str:
    tokenizer = byte_tokenizer()
    ids = encode_prompt(tokenizer, Conversation([Message("user", prompt)]))
    model = load_model(good / "model", dtype=torch.float32)
    return tokenizer.decode(generate(model, ids, max_new_tokens=32, stop_ids=tokenizer.stop_ids, **settings))


def test_one_prompt_is_streamed(cli, good):
    done = cli(*arguments(good, "prompt=Hi", "temperature=0"))
    assert done.code == 0, done.err
    text, _, last = done.out.rstrip("\n").rpartition("\n")
    assert text.removesuffix("\n") == expected(good, "Hi")
    assert re.match(r"\d+ tokens in \d+\.\d s: \d+\.\d tokens/s", last)


def test_torchtunes_prompt_is_understood(cli, good):
    here = cli(*arguments(good, "prompt={user: Hi, system: Be short.}", "temperature=0"))
    there = cli(*arguments(good, "prompt=Hi", "system_prompt=Be short.", "temperature=0"))
    assert here.code == there.code == 0
    assert here.out.rsplit("\n", 2)[0] == there.out.rsplit("\n", 2)[0]
    assert here.out.rsplit("\n", 2)[0] != expected(good, "Hi")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_many_prompts_go_to_a_file_whatever_the_batch_size(cli, good, tmp_path, batch_size):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    done = cli(*arguments(
        good, "~prompt", f"prompt_file={tmp_path / 'p.jsonl'}", f"output_file={tmp_path / 'out.jsonl'}", "seed=5",
        f"batch_size={batch_size}", "temperature=0.8", "top_p=0.9",
    ))  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    for number, row in enumerate(rows):
        assert row["answer"] == expected(good, row["prompt"], sampling=Sampling(0.8, top_p=0.9), seed=5 + number)
        assert row["finish_reason"] in ("stop", "length")


def test_many_prompts_without_a_file_are_printed(cli, good):
    done = cli(*arguments(good, "~prompt", "prompts=[Hi, Sing!]", "temperature=0"))
    assert done.code == 0, done.err
    for prompt in ("Hi", "Sing!"):
        assert f"> {prompt}\n{expected(good, prompt)}\n" in done.out


def test_answers_are_printed_in_the_prompts_order(cli, good):
    """Batches begin with the longest prompt."""
    done = cli(*arguments(good, "~prompt", f"prompts={json.dumps(PROMPTS)}", "temperature=0", "batch_size=1"))
    assert done.code == 0, done.err
    text = "".join(f"> {prompt}\n{expected(good, prompt)}\n\n" for prompt in PROMPTS)
    assert done.out.startswith(text)


def test_a_stopped_run_prints_the_answers_it_has(cli, good, monkeypatch):
    whole, calls = generation.generate_batch, []

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(generation, "generate_batch", stopped)
    done = cli(*arguments(good, "~prompt", f"prompts={json.dumps(PROMPTS)}", "temperature=0", "batch_size=1"))
    assert done.code == 1
    text = "".join(f"> {PROMPTS[index]}\n{expected(good, PROMPTS[index])}\n\n" for index in (1, 3))
    assert done.out == text, "the two longest, in the prompts' order"


def write_prompts(path: Path, prompts: list[str]) -> None:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def test_lone_surrogates_are_kept(cli, good, tmp_path):
    """They are no characters, but JSON has them: files have them as JSON escapes them."""
    prompts = ["fine", "cut emoji \ud83d", "whole \U0001f600"]
    write_prompts(tmp_path / "p.jsonl", prompts)
    command = arguments(good, "~prompt", f"prompt_file={tmp_path / 'p.jsonl'}", "temperature=0")
    done = cli(*command, f"output_file={tmp_path / 'out.jsonl'}")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    # The model reads what tiktoken reads of such a text.
    assert rows[1]["answer"] == expected(good, "cut emoji \N{REPLACEMENT CHARACTER}")


def test_a_stopped_run_keeps_the_answers_it_has(cli, good, tmp_path, monkeypatch):
    prompts = [f"{'x' * length}" for length in (5, 9, 7, 1)]
    write_prompts(tmp_path / "p.jsonl", prompts)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    command = arguments(good, "~prompt", f"prompt_file={tmp_path / 'p.jsonl'}", f"output_file={out}", "batch_size=1")
    whole, kept = generation.generate_batch, []

    def stopped(*args, **kwargs):
        if len(kept) == 2:
            raise KeyboardInterrupt
        # On the disk as they come: a process that is killed leaves them too.
        kept[:] = [json.loads(line) for line in partial.read_text().splitlines()]
        return whole(*args, **kwargs)

    monkeypatch.setattr(generation, "generate_batch", stopped)
    done = cli(*command)
    assert done.code == 1 and f"{partial}: keeps the 3 rows that were there by then" in done.err
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [(row["number"], row["prompt"]) for row in rows] == [(2, prompts[1]), (3, prompts[2]), (1, prompts[0])]
    assert not out.exists()

    monkeypatch.undo()
    refused = cli(*command)
    assert refused.code == 2 and "out.jsonl.partial beside it has the answers of a run that was stopped" in refused.err
    assert len(partial.read_text().splitlines()) == 3
    done = cli(*command, "overwrite=true")
    assert done.code == 0 and not partial.exists()
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in again] == prompts
    for row in rows:
        assert again[row.pop("number") - 1] == row


def test_a_run_that_fails_at_once_leaves_nothing(cli, good, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate_batch", failing)
    assert cli(*arguments(good, "~prompt", "prompts=[a,b]", f"output_file={tmp_path / 'out.jsonl'}")).code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_weights_that_are_not_numbers(cli, good, tmp_path, temperature):
    shutil.copytree(good / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    done = cli(*arguments(tmp_path, f"temperature={temperature}"))
    assert done.code == 2
    assert "the model's logits are not numbers (found nan): its weights hold NaN or infinity" in done.err


@pytest.mark.parametrize("settings", [
    ["temperature=1e-40"], ["temperature=1e-320"], ["top_p=1e-300"], ["top_k=100000000000000000000", "temperature=1e-45"],
])  # fmt: skip
def test_settings_in_the_limit_take_the_most_likely_token(cli, good, settings):
    done = cli(*arguments(good, "prompt=Hi", *settings))
    assert done.code == 0, done.err
    assert done.out.rpartition("\n\n")[0] == expected(good, "Hi")


@pytest.mark.parametrize("settings", [["temperature=1e308"], ["max_new_tokens=10000000000000000000000"],
                                      ["batch_size=9223372036854775808"]])  # fmt: skip
def test_settings_without_measure(cli, good, settings):
    done = cli(*arguments(good, "~prompt", "prompts=[Hi, Ho]", *settings))
    assert done.code == 0, done.err


def test_plain_text_is_continued(cli, good):
    done = cli(*arguments(good, "prompt=Once", "chat=false", "temperature=0"))
    assert done.code == 0, done.err
    assert not done.out.startswith(expected(good, "Once"))


def test_an_existing_file_is_replaced_only_when_told(cli, good, tmp_path):
    (tmp_path / "out.jsonl").write_text("precious")
    command = arguments(good, f"output_file={tmp_path / 'out.jsonl'}")
    refused = cli(*command)
    assert refused.code == 2 and "out.jsonl: exists; overwrite=true replaces it" in refused.err
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert cli(*command, "overwrite=true").code == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == "Hello"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['prompt=""'], "prompt 1: the prompt is empty"),
        (["prompt={user: null}"], "prompt 1: the prompt is empty"),
        (["prompt=" + "x" * 300], r"prompt 1: 3\d\d tokens; the model's context is 256"),
        (["~prompt"], "prompt, prompts, prompt_file: none given"),
        (["prompts=[a]"], "prompt, prompts: only one can be given"),
        (["prompt={user: a, assistant: b}"], "prompt.assistant: unknown"),
        (["~prompt", "prompt_file=nowhere.txt"], "prompt_file=nowhere.txt: no such file"),
        (["~prompt", "prompts=[]"], "prompts=\\[\\]: holds no prompt"),
        (["temperature=-1"], "temperature=-1.0: must be 0"),
        (["top_p=0"], "top_p=0.0: must be above 0"),
        (["top_p=1.5"], "top_p=1.5: must be above 0"),
        (["top_k=0"], "top_k=0: must be 1"),
        (["max_new_tokens=0"], "max_new_tokens=0"),
        (["batch_size=0"], "batch_size=0"),
        (["overwrite=true"], "overwrite=true: there is no output_file"),
        (["chat=false", "system_prompt=Be short."], "use chat=true"),
        ([f"output_file={__file__}/a.jsonl"], "a.jsonl: its folder cannot be written to: .*is a file"),
        (["output_file=/tmp"], "output_file=/tmp: is a folder"),
    ],
)
def test_bad_input(cli, good, overrides, message):
    done = cli(*arguments(good, *overrides))
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert "Traceback" not in done.err


def test_another_models_tokenizer_is_refused(cli, good, tmp_path):
    """A model of 257 rows, whose folder says nothing of a tokenizer, and a folder with another tokenizer."""
    done = cli("run", "generate", "--config", CONFIG, "model.vocab_size=257")
    assert done.code == 2 and "the model's vocabulary is 257" in done.err
    shutil.copytree(good / "model", tmp_path / "model")
    document = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(document))
    done = cli(*arguments(good, f"checkpointer.checkpoint_dir={tmp_path / 'model'}"))
    assert done.code == 2 and f"checkpointer={tmp_path / 'model'}: the tokenizer is not this model's" in done.err
