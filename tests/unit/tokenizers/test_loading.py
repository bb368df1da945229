"""What is found at a path, what goes with it, what is refused, and what `save` writes."""

import base64
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from kdtune.errors import CheckpointError, ConfigError
from kdtune.tokenizers import (
    GGUFTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    llama2_tokenizer,
    llama3_tokenizer,
    load,
    same_tokenizer,
)

TEXT = "the cat sat: naïve 你好 😀 \n\n  1 <|im_end|> </s> <|eot_id|>"


def test_every_kind_is_found(
    chatml_folder: Path, tiktoken_file: Path, sentencepiece_file: Path, gguf_file: Path
) -> None:
    for path, kind in (
        (chatml_folder, HuggingFaceTokenizer),
        (tiktoken_file, TiktokenTokenizer),
        (sentencepiece_file, SentencePieceTokenizer),
        (gguf_file, GGUFTokenizer),
    ):
        for found in (load(path), load(str(path if path.is_dir() else path.parent))):
            assert type(found) is kind
            assert found.decode(found.encode(TEXT)) == TEXT
            assert found.max_seq_len is None
            assert max(found.special_tokens.values()) < found.vocab_size
            assert found.decode([found.vocab_size, 10**9]) == ""


def test_meta_folder(tiktoken_file: Path) -> None:
    original = tiktoken_file.parent / "original"
    original.mkdir()
    tiktoken_file.rename(original / "tokenizer.model")
    assert type(load(tiktoken_file.parent)) is TiktokenTokenizer
    assert type(llama3_tokenizer(tiktoken_file.parent)) is TiktokenTokenizer


def test_a_sentencepiece_model_comes_before_its_conversion(sentencepiece_file: Path, chatml_folder: Path) -> None:
    folder = sentencepiece_file.parent
    shutil.copy(chatml_folder / "tokenizer.json", folder)
    # Its added tokens are not the model's: the folder's vocabulary was extended, so tokenizer.json is the whole of it.
    assert type(load(folder)) is HuggingFaceTokenizer
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    assert type(load(folder)) is SentencePieceTokenizer


def test_bos_and_eos_are_added_where_there_are_any(chatml_folder: Path, sentencepiece_file: Path) -> None:
    tokenizer = load(sentencepiece_file)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file)).encode(TEXT)
    assert tokenizer.encode(TEXT) == [1, *plain, 2]
    assert tokenizer.encode(TEXT, add_bos=False) == [*plain, 2]
    assert tokenizer.encode(TEXT, add_eos=False) == [1, *plain]
    assert tokenizer.encode("") == [1, 2]
    (chatml_folder / "tokenizer_config.json").unlink()
    bare = load(chatml_folder)
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (None, None, 0)
    assert bare.encode("the") == bare.encode("the", add_bos=False, add_eos=False)


def test_names_from_config_json(chatml_folder: Path) -> None:
    (chatml_folder / "tokenizer_config.json").unlink()
    (chatml_folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 0]}))
    tokenizer = load(chatml_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


def test_stop_ids(chatml_folder: Path, tiktoken_file: Path) -> None:
    assert load(chatml_folder).stop_ids == {2}
    (chatml_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load(chatml_folder).stop_ids == {0, 2}
    (chatml_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load(chatml_folder).stop_ids == {2, 7}
    llama3 = load(tiktoken_file)
    names = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    assert llama3.stop_ids == {llama3.special_tokens[name] for name in names}
    assert llama3.special_tokens["<|begin_of_text|>"] == 266 and llama3.vocab_size == 266 + 256
    assert llama3.special_tokens["<|reserved_special_token_247|>"] == 266 + 255


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"])
def test_max_seq_len_is_positive(
    chatml_folder: Path, tiktoken_file: Path, sentencepiece_file: Path, value: object
) -> None:
    for path in (chatml_folder, tiktoken_file, sentencepiece_file):
        with pytest.raises(ConfigError, match=r"max_seq_len=.*positive integer"):
            load(path, max_seq_len=value)  # type: ignore[arg-type]
    assert load(chatml_folder, max_seq_len=8).max_seq_len == 8
    assert llama3_tokenizer(tiktoken_file, 8).max_seq_len == 8
    assert llama2_tokenizer(sentencepiece_file, 8).max_seq_len == 8


def test_pickled_tokenizers_are_the_same(
    chatml_folder: Path, tiktoken_file: Path, sentencepiece_file: Path, gguf_file: Path
) -> None:
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
    for path in (chatml_folder, tiktoken_file, sentencepiece_file, gguf_file):
        tokenizer = load(path)
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        assert again.tokenize_messages(chat) == tokenizer.tokenize_messages(chat)


def test_same_tokenizer(
    make_gguf: Callable[..., Path], chatml_folder: Path, gguf_file: Path, tiktoken_file: Path, tmp_path: Path
) -> None:
    chatml = load(chatml_folder)
    assert same_tokenizer(chatml, load(chatml_folder)) is None
    assert same_tokenizer(chatml, load(gguf_file)) is None
    assert "bos_id" in str(same_tokenizer(chatml, load(tiktoken_file)))
    digits = load(make_gguf(tmp_path / "digits" / "model.gguf", pre="smollm"))
    assert "they differ on" in str(same_tokenizer(chatml, digits))
    config = chatml_folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "<pad>"}))
    assert "'<pad>'" in str(same_tokenizer(chatml, load(chatml_folder)))


# Saving

# transformers reads no tiktoken file, so these are written beside it.
MADE_FOR_TRANSFORMERS = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_save_copies_what_is_there(
    chatml_folder: Path, tiktoken_file: Path, sentencepiece_file: Path, tmp_path: Path
) -> None:
    for path in (chatml_folder, tiktoken_file, sentencepiece_file):
        folder = path if path.is_dir() else path.parent
        (folder / "special_tokens_map.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        target = tmp_path / "saved" / folder.name
        load(path).save(target)
        made = set() if path == chatml_folder else MADE_FOR_TRANSFORMERS
        assert {f.name for f in target.iterdir()} == {f.name for f in folder.iterdir()} - {"model.safetensors"} | made
        assert same_tokenizer(load(target), load(path)) is None
        load(target).save(target)  # into itself: nothing to do
        assert same_tokenizer(load(target), load(path)) is None


def test_save_of_a_meta_folder_takes_the_files_above(tiktoken_file: Path, tmp_path: Path) -> None:
    original = tiktoken_file.parent / "original"
    original.mkdir()
    tiktoken_file.rename(original / "tokenizer.model")
    (tiktoken_file.parent / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    tokenizer = llama3_tokenizer(original / "tokenizer.model")
    assert tokenizer.chat_template == "x"
    tokenizer.save(tmp_path / "saved")
    assert {f.name for f in (tmp_path / "saved").iterdir()} == {"tokenizer.model"} | MADE_FOR_TRANSFORMERS
    again = load(tmp_path / "saved")
    assert again.chat_template == "x" and same_tokenizer(tokenizer, again) is None


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_saves_a_folder(make_gguf: Callable[..., Path], tmp_path: Path, pre: str) -> None:
    tokenizer = load(make_gguf(tmp_path / "gguf" / "model.gguf", pre=pre))
    tokenizer.save(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert same_tokenizer(tokenizer, saved) is None
    assert saved.chat_template == tokenizer.chat_template
    assert (saved.stop_ids, saved.pad_id) == (frozenset({2}), tokenizer.pad_id)
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["model_max_length"] == 64


# Refusals


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=r"looked for as tokenizer\.json, tokenizer\.model .*\.gguf"):
            load(path)
        for named in (llama2_tokenizer, llama3_tokenizer):
            with pytest.raises(CheckpointError, match=r"no tokenizer\.model found"):
                named(path)


def test_two_gguf_files(gguf_file: Path) -> None:
    shutil.copy(gguf_file, gguf_file.with_name("other.gguf"))
    with pytest.raises(CheckpointError, match=r"found 2 GGUF files \(model\.gguf, other\.gguf\)"):
        load(gguf_file.parent)


def test_the_wrong_kind_by_name(tiktoken_file: Path, sentencepiece_file: Path) -> None:
    with pytest.raises(CheckpointError, match="a tiktoken file; want llama 2's"):
        llama2_tokenizer(tiktoken_file)
    with pytest.raises(CheckpointError, match="not a tiktoken file"):
        llama3_tokenizer(sentencepiece_file)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_broken_tokenizer_json(chatml_folder: Path, content: bytes) -> None:
    (chatml_folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizers library cannot read it"):
        load(chatml_folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_broken_configs(chatml_folder: Path, name: str, content: bytes) -> None:
    (chatml_folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load(chatml_folder)


def test_generation_config_with_a_wrong_id(chatml_folder: Path) -> None:
    (chatml_folder / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id: found '2'"):
        load(chatml_folder)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        (lambda data: data[:-9], "line 266: found"),
        (lambda data: data.replace(b" 3\n", b" 4\n", 1), "found 266 ranks; want llama 3's 266, 0..265, each once"),
        (lambda data: data[: data.index(b" 99\n") + 4], "found 100 ranks"),
        (lambda data: data.replace(b" 3\n", b" x\n", 1), "line 4: found"),
        (lambda data: data.replace(base64.b64encode(b"\x00"), base64.b64encode(b"ab"), 1), "not every single byte"),
    ],
)
def test_broken_tiktoken_file(tiktoken_file: Path, change: object, want: str) -> None:
    tiktoken_file.write_bytes(change(tiktoken_file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model: .*{want}"):
        load(tiktoken_file)


@pytest.mark.parametrize("content", [b"", b"junk junk", b"\x00" * 100])
def test_broken_sentencepiece_file(sentencepiece_file: Path, content: bytes) -> None:
    sentencepiece_file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: neither a tiktoken nor a sentencepiece model"):
        load(sentencepiece_file)


def test_truncated_sentencepiece_file(sentencepiece_file: Path) -> None:
    whole = sentencepiece_file.read_bytes()
    for length in range(1, len(whole), 7):
        sentencepiece_file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            load(sentencepiece_file)


def test_gguf_of_another_kind(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.model='bert'.*allowed: 'gpt2'"):
        load(make_gguf(tmp_path / "a" / "model.gguf", model="bert"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre='falcon'.*smollm"):
        load(make_gguf(tmp_path / "b" / "model.gguf", pre="falcon"))


def test_truncated_gguf(gguf_file: Path) -> None:
    whole = gguf_file.read_bytes()
    for length in [0, 3, 8, 20, 24, 40, *range(100, len(whole), 997), len(whole) - 1]:
        gguf_file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            load(gguf_file)
    gguf_file.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(CheckpointError, match="want a little-endian GGUF"):
        load(gguf_file)


def test_a_unigram_model_is_saved_without_a_conversion(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "unigram" / "tokenizer.model"
    file.parent.mkdir()
    sentences = [TEXT, "the cat sat on the mat", "hello there, how are you?"] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(file.with_suffix("")),
        model_type="unigram",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (file.parent / "tokenizer.vocab").unlink()
    load(file).save(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["tokenizer.model"]
    assert "no tokenizer.json can be made for it" in caplog.text


def test_a_broken_conversion_beside_a_sentencepiece_model_is_made_anew(
    sentencepiece_file: Path, tmp_path: Path
) -> None:
    (sentencepiece_file.parent / "tokenizer.json").write_text('{"version": "1.0"}')
    ours = SentencePieceTokenizer(sentencepiece_file)
    ours.save(tmp_path / "saved")
    assert same_tokenizer(load(tmp_path / "saved" / "tokenizer.json"), ours) is None
