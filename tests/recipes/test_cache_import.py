"""kdtune cache: from the prompts of a data set over a server's answers to a teacher cache; whatever does not fit is refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from logprob_server import answer_to, logprob_server
from test_cache_teacher import CONFIG, scripts

from kdtune.data import quickstart_dataset
from kdtune.errors import CheckpointError
from kdtune.models import llama
from kdtune.teachers.cache import Cache
from kdtune.tokenizers import byte_tokenizer

RANGE = ["first_example=2", "max_examples=3", "k=6", "stored_dtype=fp32", "examples_per_shard=2"]


@pytest.fixture(scope="module")
def teacher():
    """That of the config."""
    torch.manual_seed(0)
    return llama(
        vocab_size=320, embed_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_dim=96, max_seq_len=256
    )


@pytest.fixture(scope="module")
def data():
    return quickstart_dataset(byte_tokenizer(max_seq_len=256))


@pytest.fixture
def answers(teacher, data):
    """Lines for the examples of the range, in another order."""
    rows = []
    for index in (4, 2, 3):
        ids = data[index].tokens.tolist()
        rows.append({"example_id": index, "prompt_token_ids": ids, **answer_to(teacher, ids, 6)})
    return rows


def import_lines(cli, folder, rows, *overrides):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cli(
        "cache", "import", CONFIG, str(folder / "rows.jsonl"), f"output_dir={folder / 'cache'}", *RANGE, *overrides
    )


def test_what_a_server_says_is_what_a_capture_writes(cli, teacher, data, tmp_path):
    """The prompts, the script of the docs, the import; beside the capture of the same teacher."""
    done = cli("cache", "prompts", CONFIG, *RANGE)
    assert done.code == 0, done.err
    (tmp_path / "ask.py").write_text(scripts()["ask.py"])
    with logprob_server(teacher) as url:
        asked = subprocess.run(
            [sys.executable, "ask.py", url, "served", "6"],
            cwd=tmp_path,
            input=done.out,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert asked.returncode == 0, asked.stderr
    (tmp_path / "rows.jsonl").write_text(asked.stdout)
    done = cli("cache", "import", CONFIG, str(tmp_path / "rows.jsonl"), f"output_dir={tmp_path / 'served'}", *RANGE,
               "--teacher", "tiny-random")  # fmt: skip
    assert done.code == 0 and "3 examples" in done.out, done.err
    assert (
        cli("run", "cache_teacher", "--config", CONFIG, f"output_dir={tmp_path / 'own'}", *RANGE, "kind=topk").code == 0
    )
    served, own = Cache(tmp_path / "served"), Cache(tmp_path / "own")
    assert served.header.teacher["served"] == "tiny-random"
    for index in (2, 3, 4):
        tokens = data[index].tokens
        found, expected = served.read(index, tokens), own.read(index, tokens)
        assert torch.equal(found.positions, expected.positions) and len(found.positions)
        assert torch.equal(found.columns["ids"], expected.columns["ids"])
        for name in ("logp", "log_tail"):
            assert torch.allclose(found.columns[name], expected.columns[name], atol=1e-4)


def test_batch_files_and_answers_asked_for_again(cli, answers, tmp_path):
    """Lines of vLLM's run_batch; the last one of an example counts."""
    batch = [{"custom_id": str(row["example_id"]), "error": None, "prompt_token_ids": row["prompt_token_ids"],
              "response": {"status_code": 200, "body": {"choices": row["choices"]}}} for row in answers]  # fmt: skip
    failed = {"custom_id": "3", "error": "overloaded", "response": None}
    done = import_lines(cli, tmp_path, [failed, *batch])
    assert done.code == 0, done.err
    done = import_lines(cli, tmp_path, [*batch, failed], f"output_dir={tmp_path / 'other'}")
    assert done.code == 2 and "line 4, example 3: has no list prompt_token_ids" in done.err and "overloaded" in done.err


def spoil(rows, what):
    """Change the answer for example 3."""
    row = next(row for row in rows if row["example_id"] == 3)
    entries = row["choices"][0]["prompt_logprobs"]
    if what == "missing":
        rows.remove(row)
    elif what == "token":
        row["prompt_token_ids"][5] += 1
    elif what == "length":
        row["prompt_token_ids"].pop()
    elif what == "entries":
        entries.pop()
    elif what == "few ids":
        entries[-1] = dict(list(entries[-1].items())[:3])
    elif what == "no log-probabilities":
        for one in entries[-1].values():
            one["logprob"] /= 10
    elif what == "unknown id":
        entries[-1]["999"] = {"logprob": -0.01, "rank": 1}
    elif what == "null":
        entries[-1] = None
    elif what == "not JSON":
        row["example_id"] = "three"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "has no answer for 1 of 3 examples, such as 3"),
        ("token", "line 3, example 3: token 5 is"),
        ("length", "example 3: has"),
        ("entries", "prompt_logprobs has"),
        ("few ids", "and k=6; ask for prompt_logprobs=6"),
        ("no log-probabilities", "add up to"),
        ("unknown id", "id 999 with log-probability -0.01; ids are below 320 (a head with more rows: --vocab-size)"),
        ("null", "prompt_logprobs must have an object id -> {logprob, rank} here, found None"),
        ("not JSON", "must be a JSON object with a number as its example_id"),
    ],
)
def test_what_does_not_fit_is_refused(cli, answers, tmp_path, what, words):
    spoil(answers, what)
    done = import_lines(cli, tmp_path, answers)
    assert done.code == 2 and words in done.err, done.err
    assert not (tmp_path / "cache" / "index.json").exists()


@pytest.mark.parametrize(
    ("repeats_ids", "words"), [(False, "has no log-probability of the text's own token"), (True, "token 3 is ")]
)
def test_answers_in_the_wrong_order_are_refused(cli, teacher, data, answers, tmp_path, repeats_ids, words):
    """An answer beside the ids of another example of equal length, as a join by place gives it."""
    row = answers[0]
    other = list(row["prompt_token_ids"])
    other[3] ^= 1
    row |= answer_to(teacher, other, 6)
    if repeats_ids:
        row["choices"][0]["prompt_token_ids"] = other
    else:
        assert str(row["prompt_token_ids"][3]) not in row["choices"][0]["prompt_logprobs"][3]
    done = import_lines(cli, tmp_path, answers)
    assert done.code == 2 and "line 1, example 4" in done.err and words in done.err, done.err


def test_configs_that_ask_for_something_else(cli, answers, tmp_path):
    for overrides, words in ((["kind=path", "k=64"], "kind=path: a server gives the most likely ids"),
                             (["temperature=2.0"], "a server's prompt_logprobs are of temperature 1")):  # fmt: skip
        done = import_lines(cli, tmp_path, answers, *overrides)
        assert done.code == 2 and words in done.err, done.err
    done = cli("cache", "import", "tiny/prune", "rows.jsonl")
    assert done.code == 2, done.err


def test_other_answers_do_not_pass_for_those_that_were_imported(cli, answers, tmp_path):
    for _ in range(2):
        assert import_lines(cli, tmp_path, answers).code == 0
    (tmp_path / "cache" / "index.json").unlink()
    with pytest.raises(CheckpointError, match="is not finished: .* run the same kdtune cache import again"):
        Cache(tmp_path / "cache")
    other = copy.deepcopy(answers)
    for one in other[0]["choices"][0]["prompt_logprobs"][1].values():
        one["logprob"] -= 0.01
    done = import_lines(cli, tmp_path, other)
    assert done.code == 2 and "holds the capture of something else" in done.err and "answers" in done.err
