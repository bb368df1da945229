"""The run's tokenizer against the one in a model's folder."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kdtune import tokenizers
from kdtune.checkpoint import Checkpointer
from kdtune.errors import ConfigError
from kdtune.log import get_logger
from kdtune.teachers import check_tokenizer
from kdtune.tokenizers import byte_tokenizer

PUBLISHED = [
    file
    for name in ("gemma", "llama3_1", "phi3", "qwen2_5")
    if (file := Path(os.environ.get("KDTUNE_TEST_MODELS", "/nonexistent"), "chat_templates", f"{name}.jinja")).is_file()
]


def other_ids():
    """Byte level, as the folder's tokenizer, with one special token at another id."""
    tokenizer = byte_tokenizer()
    tokenizer.special_tokens["<|im_end|>"] = 300
    return tokenizer


def other_eos():
    tokenizer = byte_tokenizer()
    tokenizer.eos_id = None
    return tokenizer


@pytest.fixture
def source(tmp_path):
    byte_tokenizer().save(tmp_path)
    return Checkpointer(tmp_path)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", True)
    return caplog


def test_the_same_tokenizer_or_no_model_passes(source, warnings):
    for key in ("checkpointer", "teacher_checkpointer"):
        check_tokenizer(byte_tokenizer(), source, key)
        check_tokenizer(byte_tokenizer(), None, key)
    assert not warnings.text


def test_other_ids_are_refused_by_the_key(source, tmp_path):
    with pytest.raises(
        ConfigError, match=rf"tokenizer and checkpointer={tmp_path}: .*'<\|im_end\|>'.*set tokenizer.path={tmp_path}"
    ):
        check_tokenizer(other_ids(), source, "checkpointer")
    with pytest.raises(ConfigError, match=rf"tokenizer and teacher_checkpointer={tmp_path}: teacher and student"):
        check_tokenizer(other_ids(), source)


def test_another_eos_is_refused_of_a_teacher_and_told_of_another_model(source, warnings):
    with pytest.raises(
        ConfigError, match=r"the same ids, but they differ in eos_id: None against 257, .*: tokenizer.path="
    ):
        check_tokenizer(other_eos(), source)
    check_tokenizer(other_eos(), source, "checkpointer")
    assert "they differ in eos_id" in warnings.text


@pytest.fixture
def pair(tmp_path):
    """Folders of a base model and an instruct model: the same pieces, <|name|> where the former reserves an id, and one more."""
    ids = {"<|end|>": 256, "<|reserved_0|>": 257}
    for name, control in (("base", ids), ("instruct", {"<|end|>": 256, "<|user|>": 257, "<|tool|>": 258})):
        backend = byte_level_tokenizer(control)
        (tmp_path / name).mkdir()
        backend.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return tmp_path / "base", tmp_path / "instruct"


def byte_level_tokenizer(control):
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(control))
    assert {token: backend.token_to_id(token) for token in control} == control
    return backend


def test_an_instruct_teacher_of_a_base_student_leads_to_its_tokenizer(pair, warnings):
    base, instruct = pair
    with pytest.raises(
        ConfigError,
        match=rf"the teacher has special tokens that the run's tokenizer lacks \(<\|user\|>, <\|tool\|>\), .*: tokenizer.path={instruct}$",
    ):
        check_tokenizer(tokenizers.load(base), Checkpointer(instruct))
    # What the message asks for is then taken, with the base model as the student.
    check_tokenizer(tokenizers.load(instruct), Checkpointer(instruct))
    assert not warnings.text
    check_tokenizer(tokenizers.load(instruct), Checkpointer(base), "checkpointer")
    assert "has special tokens that the model's lacks (<|user|>, <|tool|>); the run goes by its own" in warnings.text


def test_a_base_teacher_of_an_instruct_student_is_told(pair):
    base, instruct = pair
    with pytest.raises(
        ConfigError, match=r"the teacher lacks \(<\|user\|>, <\|tool\|>\), .* choose an instruct teacher"
    ):
        check_tokenizer(tokenizers.load(instruct), Checkpointer(base))


def test_special_tokens_at_the_ids_of_text_are_another_tokenizer(pair):
    base, _ = pair
    other = tokenizers.load(base)
    other.special_tokens["<|user|>"] = 65
    for key, words in (("checkpointer", "not this model's"), ("teacher_checkpointer", "different tokenizers")):
        with pytest.raises(ConfigError, match=words):
            check_tokenizer(other, Checkpointer(base), key)


def test_a_teacher_with_another_chat_template_is_told_in_one_line(source, warnings, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    )
    base = byte_tokenizer()
    check_tokenizer(base, source)
    assert not warnings.text  # texts are trained on
    check_tokenizer(base, source, is_chat=True)
    (record,) = warnings.records
    assert f"tokenizer.path={tmp_path} takes its format" in record.getMessage()
    theirs = tokenizers.load(tmp_path)
    check_tokenizer(theirs, source, is_chat=True)
    assert len(warnings.records) == 1


@pytest.mark.skipif(not PUBLISHED, reason="no template in KDTUNE_TEST_MODELS/chat_templates")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_templates_of_a_teacher_are_refused(file, source, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(file.read_text())
    with pytest.raises(
        ConfigError, match=r"another chat template.*takes its format \(or rollouts.guards.same_template=false\)"
    ):
        check_tokenizer(byte_tokenizer(), source, is_chat=True, same_template=True)
    theirs = tokenizers.load(tmp_path)
    check_tokenizer(theirs, source, is_chat=True, same_template=True)


def test_a_folder_without_a_tokenizer_is_told(tmp_path, warnings):
    (tmp_path / "empty").mkdir()
    source = Checkpointer(tmp_path / "empty")
    check_tokenizer(byte_tokenizer(), source, "checkpointer")
    assert "checkpointer: its tokenizer could not be compared" in warnings.text


def test_nothing_is_loaded_from_the_tokenizers_own_folder(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "load", lambda path: pytest.fail("loaded again"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        check_tokenizer(byte_tokenizer(), source, "checkpointer", path=path)


def test_a_run_that_sets_a_variable_of_the_shared_template_is_no_warning(source, tmp_path, warnings):
    (tmp_path / "chat_template.jinja").write_text(
        "{{ style }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    for variables in ({"style": "short"}, {}):
        check_tokenizer(tokenizers.load(tmp_path, chat_template_kwargs=variables), source, is_chat=True)
    assert not warnings.text
    check_tokenizer(byte_tokenizer(), source, is_chat=True)
    assert "another chat template" in warnings.text
