"""tokenizer.model with tokens added beside it and no tokenizer.json, and settings that change ids. Witness: transformers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdtune.errors import CheckpointError
from kdtune.tokenizers import SentencePieceTokenizer, llama2_tokenizer, load, same_tokenizer

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on the mat"}]
# No runs of blanks: transformers 5 merges those in another order than sentencepiece does.
TEXTS = [
    "the cat",
    " user",
    "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|> how",
    "mat <|im_end|> are</s>you",
    "a<tok>b <tok> you",
    "é↯",
]
CONFIG = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "add_bos_token": True,
    "legacy": False, "chat_template": CHATML,
}  # fmt: skip

PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


@pytest.fixture
def folder(sentencepiece_file: Path) -> Callable[..., Path]:
    """The model's folder with <|im_end|> and <|im_start|> added, and changes to tokenizer_config.json and to their flags."""
    size = SentencePieceTokenizer(sentencepiece_file).vocab_size

    def write(changes: dict[str, Any], flags: dict[str, Any], words: int = 0) -> Path:
        added = {"<|im_end|>": size, "<|im_start|>": size + 1, **({"<tok>": size + 2} if words else {})}
        listed = {"<unk>": 0, "<s>": 1, "</s>": 2, **added}
        decoder = {
            str(i): {**PLAIN, "content": token, "special": token != "<tok>", **(flags if i >= size else {})}
            for token, i in listed.items()
        }
        (sentencepiece_file.parent / "added_tokens.json").write_text(json.dumps(added))
        config = {
            key: value
            for key, value in {**CONFIG, "added_tokens_decoder": decoder, **changes}.items()
            if value is not None
        }
        (sentencepiece_file.parent / "tokenizer_config.json").write_text(json.dumps(config))
        return sentencepiece_file.parent

    return write


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({}, {}, 0),
        ({"legacy": True}, {}, 0),
        ({"legacy": None}, {}, 0),
        ({"add_prefix_space": False}, {}, 0),
        ({"add_bos_token": False}, {}, 0),
        ({"add_eos_token": True}, {}, 0),
        ({"do_lower_case": True}, {}, 0),
        ({"eos_token": "</s>", "pad_token": {"content": "<pad>", "__type": "AddedToken"}}, {}, 0),
        ({}, {"rstrip": True}, 0),
        ({}, {"lstrip": True}, 0),
        ({}, {"normalized": True}, 0),
        ({}, {}, 1),
        ({"additional_special_tokens": ["<|im_end|>", "<|new|>"]}, {}, 1),
        ({"additional_special_tokens": ["<|new|>"], "pad_token": "<pad>"}, {}, 1),
    ],
    ids=str,
)  # fmt: skip
def test_ids_equal_transformers(
    folder: Callable[..., Path], changes: dict[str, Any], flags: dict[str, Any], words: int, tmp_path: Path
) -> None:
    place = folder(changes, flags, words)
    reference, ours = transformers.AutoTokenizer.from_pretrained(place), load(place)
    ours.save(tmp_path / "saved")
    for tokenizer in (ours, load(tmp_path / "saved")):
        for text in TEXTS:
            assert tokenizer.encode_rendered(text) == reference(text, add_special_tokens=False).input_ids, text
            split = reference(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert tokenizer.encode(text, add_bos=False, add_eos=False) == split, text
        assert tokenizer.tokenize_messages(CHAT)[0] == reference.apply_chat_template(CHAT, return_dict=False)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, reference.eos_token_id, len(reference))
        assert tokenizer.begins_with_bos == (reference("the").input_ids[0] == 1)
        assert tokenizer.eos_id in tokenizer.stop_ids
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [saved(text, add_special_tokens=False).input_ids for text in TEXTS] == [
        ours.encode_rendered(text) for text in TEXTS
    ]
    assert saved.apply_chat_template(CHAT, tokenize=False) == reference.apply_chat_template(CHAT, tokenize=False)


def test_added_tokens_that_one_file_lists_alone(folder: Callable[..., Path], tmp_path: Path) -> None:
    both = load(folder({}, {}))
    place = folder({"added_tokens_decoder": None}, {})
    assert same_tokenizer(load(place), both) is None
    (folder({}, {}) / "added_tokens.json").unlink()
    assert same_tokenizer(load(place), both) is None


def test_a_special_tokens_map_that_names_another_eos(sentencepiece_file: Path) -> None:
    (sentencepiece_file.parent / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|end|>", "pad_token": "<pad>"})
    )
    tokenizer = load(sentencepiece_file)
    size = SentencePieceTokenizer(sentencepiece_file).vocab_size
    assert {tokenizer.eos_id, tokenizer.pad_id} == {size, size + 1}


def test_flags_of_the_models_own_special_tokens(sentencepiece_file: Path) -> None:
    decoder = {"2": {**PLAIN, "content": "</s>", "lstrip": True, "rstrip": True}}
    (sentencepiece_file.parent / "tokenizer_config.json").write_text(
        json.dumps({**CONFIG, "eos_token": "</s>", "added_tokens_decoder": decoder})
    )
    reference = transformers.AutoTokenizer.from_pretrained(sentencepiece_file.parent)
    text = "the cat </s> sat"
    assert load(sentencepiece_file).encode_rendered(text) == reference(text, add_special_tokens=False).input_ids


def test_the_model_alone_stays_sentencepieces(sentencepiece_file: Path) -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (sentencepiece_file.parent / "tokenizer_config.json").write_text(json.dumps(named))
    assert isinstance(load(sentencepiece_file), SentencePieceTokenizer)


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"split_special_tokens": True}, {}, r"tokenizer_config.json: split_special_tokens=true"),
        ({}, {"single_word": True}, r"'<\|im_end\|>' has single_word=true"),
        ({"added_tokens_decoder": {"9000": {"content": "<far>", "special": True}}}, {}, r"'<far>' is listed with the id 9000, but \d+ is"),
        ({"added_tokens_decoder": {"x": {"content": "<far>"}}}, {}, r"tokens by id \(whole numbers\), each an AddedToken object"),
    ],
)  # fmt: skip
def test_what_is_not_followed_is_refused(
    folder: Callable[..., Path], changes: dict[str, Any], flags: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        load(folder(changes, flags))


def test_llama2_tokenizer_says_what_reads_added_tokens(folder: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"take kdtune.tokenizers.load$"):
        llama2_tokenizer(folder({}, {}))


def test_a_gguf_without_pre_tokenizer_is_told(
    make_gguf: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kdtune"):
        load(make_gguf(tmp_path / "g" / "named.gguf"))
        assert not caplog.records
        load(make_gguf(tmp_path / "g" / "default.gguf", pre="default"))
        assert "tokenizer.ggml.pre says 'default': how this model's text was cut into words is not known" in caplog.text
        caplog.clear()
        load(make_gguf(tmp_path / "g" / "none.gguf", pre=None))
        assert "tokenizer.ggml.pre is missing" in caplog.text


def write_beside(folder: Path, config: dict[str, Any], mapped: dict[str, Any] | None, added: dict[str, int]) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    for name, content in (("special_tokens_map.json", mapped), ("added_tokens.json", added)):
        if content:
            (folder / name).write_text(json.dumps(content))


BESIDE = ["the<|new|>cat", "the <|new|>  cat", "you <|pad|> are", "the <|im_end|>\n\n cat", "a<|im_end|>b"]
STRIPPED = {"__type": "AddedToken", "content": "<|new|>", "lstrip": True, "rstrip": True, "special": True}


@pytest.mark.parametrize(
    ("config", "mapped", "added"),
    [
        ({"additional_special_tokens": ["<|im_end|>", "<|new|>"]}, None, {}),
        ({"additional_special_tokens": ["<|new|>"], "pad_token": "<|pad|>"}, None, {}),
        ({"extra_special_tokens": ["<|new|>"], "pad_token": "<|pad|>"}, None, {}),
        ({"extra_special_tokens": {"image_token": "<|new|>"}}, None, {}),
        ({"image_token": "<|new|>"}, None, {}),
        ({"extra_special_tokens": [STRIPPED]}, None, {}),
        ({"eos_token": STRIPPED}, None, {}),
        ({"eos_token": {**STRIPPED, "content": "<|im_end|>"}}, None, {}),
        ({}, {"additional_special_tokens": ["<|new|>"]}, {}),
        ({"additional_special_tokens": ["<|pad|>"]}, {"additional_special_tokens": ["<|new|>"]}, {}),
        ({"extra_special_tokens": ["<|pad|>"]}, {"extra_special_tokens": ["<|new|>"]}, {}),
        ({}, {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}, {}),
        ({"added_tokens_decoder": {"2": {**PLAIN, "content": "<|im_end|>"}}}, {"pad_token": "<|pad|>"}, {}),
        ({}, None, {"<|new|>": -1}),
        ({"added_tokens_decoder": {"2": {**PLAIN, "content": "<|im_end|>"}}}, None, {"<|new|>": -1}),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_beside_a_tokenizer_json(
    chatml_folder: Path, config: dict[str, Any], mapped: dict[str, Any] | None, added: dict[str, int]
) -> None:
    size = load(chatml_folder).vocab_size
    write_beside(chatml_folder, config, mapped, {text: size for text in added})
    ours, reference = load(chatml_folder), transformers.AutoTokenizer.from_pretrained(chatml_folder)
    assert (ours.vocab_size, ours.eos_id) == (len(reference), reference.eos_token_id)
    for text in BESIDE:
        assert ours.encode_rendered(text) == reference(text, add_special_tokens=False).input_ids, text


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "normalized", "single_word", "special"])
def test_flags_of_tokenizer_config_go_before_those_of_tokenizer_json(
    chatml_folder: Path, flag: str, special: bool, there: bool
) -> None:
    """`there`: whether the flag is set in tokenizer.json, and not in tokenizer_config.json, or the other way round."""
    file = chatml_folder / "tokenizer.json"
    content = json.loads(file.read_text())
    token = {**PLAIN, "content": "<|new|>", "special": special}
    content["added_tokens"].append({**token, "id": load(chatml_folder).vocab_size, flag: there})
    file.write_text(json.dumps(content))
    decoder = {str(content["added_tokens"][-1]["id"]): {**token, flag: not there}}
    write_beside(chatml_folder, {"added_tokens_decoder": decoder}, None, {})
    if flag == "single_word" and special and not there:
        with pytest.raises(CheckpointError, match=r"'<\|new\|>' has single_word=true"):
            load(chatml_folder)
        return
    ours, reference = load(chatml_folder), transformers.AutoTokenizer.from_pretrained(chatml_folder)
    for text in BESIDE:
        assert ours.encode_rendered(text) == reference(text, add_special_tokens=False).input_ids, text
    is_text = (not there) if flag == "special" else special
    assert (
        (ours.special_tokens["<|new|>"] not in ours.encode("a<|new|>b"))
        if is_text
        else "<|new|>" not in ours.special_tokens
    )


def test_an_id_that_the_token_does_not_get_is_told(chatml_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_beside(chatml_folder, {"added_tokens_decoder": {"9000": {**PLAIN, "content": "<|new|>"}}}, None, {})
    with caplog.at_level(logging.WARNING, "kdtune"):
        ours = load(chatml_folder)
    reference = transformers.AutoTokenizer.from_pretrained(chatml_folder)
    assert ours.special_tokens["<|new|>"] == reference.convert_tokens_to_ids("<|new|>")
    assert "the token '<|new|>' is listed with the id 9000 and gets" in caplog.text


@pytest.mark.parametrize(("kind", "refused"), [("GPT2Tokenizer", True), ("PreTrainedTokenizerFast", False)])
def test_a_prefix_that_two_files_tell_differently(chatml_folder: Path, kind: str, refused: bool) -> None:
    file = chatml_folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": kind, "add_prefix_space": True}))
    if refused:
        with pytest.raises(CheckpointError, match=r"add_prefix_space=true, but tokenizer.json puts no space"):
            load(chatml_folder)
    else:
        reference = transformers.AutoTokenizer.from_pretrained(chatml_folder)
        assert (
            load(chatml_folder).encode_rendered("the cat") == reference("the cat", add_special_tokens=False).input_ids
        )
