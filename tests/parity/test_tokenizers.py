"""Token ids and rendered chats against libraries we did not write: transformers, tiktoken, sentencepiece."""

import base64
import copy
import io
import json
import os
import random
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from kdtune.tokenizers import Tokenizer, llama2_tokenizer, llama3_tokenizer, load, same_tokenizer

transformers = pytest.importorskip("transformers")

_SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<s>", "</s>", "<unk>"]
_WORDS = r"""
the distillation of Paris isn't We'LL you'Re 3.14159 1,000,000 x=y² ½ naïve Größe łódź Đặng ﬁne 𝔘𝔫𝔦 Привет мир Ωμέγα
שלום عليكم नमस्ते २०२४ สวัสดี 你好世界 こんにちは 안녕하세요 一二三 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 ☃️ CamelCase snake_case
def f(x): return {'a':[1,2]} == != <= >>> //# \n \\ https://a.b/c?d=e&f=g#h ▁ <0x0A> �
""".split()  # noqa: SIM905
_WORDS += ["e\u0301", "\u200b", "\ufeff", "\u2028", "\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\ufffd"]
_BLANKS = [
    " ",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\t\t",
    "\r\n",
    " \n ",
    "\u00a0",
    "\u3000",
    "        ",
    "",
]


@cache
def texts(count: int = 700) -> tuple[str, ...]:
    """Deterministic texts: words of many scripts, blanks, special-token strings, and a few long words and runs."""
    rng = random.Random(20)
    found = [
        "",
        " ",
        "  ",
        "\n",
        "\n\n1. one\n\n2. two",
        " leading",
        "trailing  ",
        "a  1",
        "   42",
        "aa<|im_end|>bb</s>",
    ]
    found += [char * n for char in "a .1\n^é你😀" for n in (2, 17, 400)]
    found += ["Donaudampfschifffahrtsgesellschaft" * 40, "".join(map(chr, range(1, 300))), "👩‍👩‍👧‍👦" * 30]
    while len(found) < count:
        words = rng.choices([*_WORDS, *_SPECIALS], k=rng.randint(1, 30))
        blanks = rng.choices(_BLANKS, k=len(words))
        found.append("".join(word + blank for word, blank in zip(words, blanks, strict=True)))
    return tuple(found)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_bos=False, add_eos=False)


def differing(tokenizer: Tokenizer, reference: Any, some: Iterable[str]) -> list[str]:
    """The texts on which `reference(text)` gives other ids."""
    return [text for text in some if encode(tokenizer, text) != list(reference(text))]


def split_specials(reference: Any) -> Any:
    return lambda text: reference(text, add_special_tokens=False, split_special_tokens=True).input_ids


CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "  What is 2 + 2?\n\n1. three\n2. four "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi 👋🏽"},
        {"role": "assistant", "content": "Hello.\n"},
        {"role": "user", "content": "<b>1 & 2</b>"},
        {"role": "assistant", "content": "  indented"},
    ],
]


# SmolLM2 from a GGUF file


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return load(smollm2_gguf)


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_gguf: Path) -> Any:
    (file,) = smollm2_gguf.glob("*.gguf")
    return transformers.AutoTokenizer.from_pretrained(str(smollm2_gguf), gguf_file=file.name)


@pytest.mark.real
def test_gguf_ids_where_digits_are_cut_alike(smollm2: Tokenizer, smollm2_reference: Any) -> None:
    # transformers cuts a GGUF's text as GPT-2 does, whatever tokenizer.ggml.pre says. SmolLM2 sets digits apart first,
    # which matters after two blanks, and for digits of several bytes; tested in the next test.
    other_cut = re.compile(r"\s\s\d")
    alike = [t for t in texts(1400) if not other_cut.search(t) and all(c.isascii() or not c.isnumeric() for c in t)]
    assert len(alike) >= 500
    assert differing(smollm2, split_specials(smollm2_reference), alike) == []


@pytest.mark.real
def test_gguf_ids_with_single_digits(smollm2: Tokenizer, smollm2_reference: Any) -> None:
    reference = copy.deepcopy(smollm2_reference)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert differing(smollm2, split_specials(reference), texts()) == []
    # The vocabulary lacks the bytes of six control characters, so those alone are lost.
    lossless = [text for text in texts() if not set(text) & set("\x04\x06\x13\x14\x16\x1d")]
    assert len(lossless) >= 500 and all(smollm2.decode(encode(smollm2, text)) == text for text in lossless)


@pytest.mark.real
@pytest.mark.parametrize("with_config", [False, True], ids=["alone", "beside config.json"])
def test_gguf_saved_loads_in_transformers(smollm2: Tokenizer, tmp_path: Path, with_config: bool) -> None:
    smollm2.save(tmp_path)
    if with_config:
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
        )
    reference = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    again = load(tmp_path)
    assert differing(smollm2, split_specials(reference), texts()) == []
    assert (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id) == (1, 2, 2)
    assert same_tokenizer(smollm2, again) is None
    for chat in CHATS:
        for prompt in (False, True):
            want = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert smollm2.render(chat, add_generation_prompt=prompt) == want
            assert again.render(chat, add_generation_prompt=prompt) == want


@pytest.mark.real
def test_chat_ids_equal_transformers(smollm2: Tokenizer, tmp_path: Path) -> None:
    smollm2.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    rng = random.Random(5)
    for _ in range(256):
        turns = [" ".join(rng.choices(_WORDS, k=rng.randint(1, 25))).strip() or "x" for _ in range(4)]
        chat = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        want = reference.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert smollm2.tokenize_messages(chat)[0] == want
        want = reference.apply_chat_template(chat[:3], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert smollm2.tokenize_messages(chat[:3], add_generation_prompt=True)[0] == want


# tokenizer.json


def _train(kind: str) -> tokenizers.Tokenizer:
    corpus = [text for text in texts() if "<" not in text]
    if kind == "byte level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=800, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *alphabet], show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    if kind != "byte level":
        # The byte pieces were trained as special to get them in; they are ordinary pieces of the model.
        whole = json.loads(tokenizer.to_str())
        whole["added_tokens"] = whole["added_tokens"][:1]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(whole))
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>", normalized=True), AddedToken("<|im_start|>")])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", rstrip=True), AddedToken("<|endoftext|>", lstrip=True)])
    tokenizer.add_tokens([AddedToken("CamelCase", normalized=False), AddedToken("snake_case", normalized=True)])
    return tokenizer


@pytest.fixture(scope="module", params=["byte level", "metaspace", "prepend"])
def json_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    _train(request.param).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "normalized": True},
        "pad_token": "<pad>",
        "chat_template": [
            {"name": "tool_use", "template": "none"},
            {
                "name": "default",
                "template": "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'system' %}\n{% continue %}\n"
                "  {% endif %}\n<|im_start|>{{ m.role }} {{ m | tojson }}\n{% generation %}{{ m['content'] }}"
                "{% endgeneration %}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
                "{{ pad_token }}{{ nothing }}{{ strftime_now('%Y') | length }}",
            },
        ],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizer_json_ids(json_folder: Path) -> None:
    ours, reference = load(json_folder), transformers.AutoTokenizer.from_pretrained(str(json_folder))
    assert len(texts()) >= 500
    assert differing(ours, split_specials(reference), texts()) == []
    assert ours.vocab_size == len(reference)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
        reference.pad_token_id,
    )


def test_tokenizer_json_chat(json_folder: Path) -> None:
    ours, reference = load(json_folder), transformers.AutoTokenizer.from_pretrained(str(json_folder))
    for chat in CHATS:
        for prompt in (False, True):
            want = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(chat, add_generation_prompt=prompt) == want
    # Without an assistant's turn there is no cut, so every token is transformers', those that swallow blanks included.
    chat = CHATS[0]
    assert ours.tokenize_messages(chat)[0] == reference.apply_chat_template(chat, tokenize=True, return_dict=False)


def test_tokenizer_json_saved_loads_the_same(json_folder: Path, tmp_path: Path) -> None:
    ours = load(json_folder)
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (json_folder / "tokenizer.json").read_bytes()
    assert same_tokenizer(ours, load(tmp_path)) is None
    assert load(tmp_path).chat_template == ours.chat_template


# Llama 3: tiktoken


def _tiktoken_reference(file: Path, digits: str = r"\p{N}{1,3}") -> tiktoken.Encoding:
    lines = [line.split() for line in file.read_bytes().splitlines() if line]
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.real
def test_llama3_ids(llama3_tokenizer_file: Path) -> None:
    ours, reference = llama3_tokenizer(llama3_tokenizer_file), _tiktoken_reference(llama3_tokenizer_file)
    assert differing(ours, reference.encode_ordinary, texts()) == []
    assert all(ours.decode(encode(ours, text)) == text for text in texts())
    assert ours.vocab_size == 128_256
    known = {"<|begin_of_text|>": 128_000, "<|finetune_right_pad_id|>": 128_004, "<|eot_id|>": 128_009}
    known |= {"<|python_tag|>": 128_010, "<|reserved_special_token_247|>": 128_255}
    assert known.items() <= ours.special_tokens.items()


@pytest.mark.real
def test_llama3_ids_of_long_runs(llama3_tokenizer_file: Path) -> None:
    ours, reference = llama3_tokenizer(llama3_tokenizer_file), _tiktoken_reference(llama3_tokenizer_file)
    rng = random.Random(7)
    for _ in range(40):
        parts = []
        for _ in range(rng.randint(1, 3)):
            parts.append(rng.choice(["", "a", "1", "!", "foo.", "é", "\x1c", "(\n", "😀"]))
            parts += [rng.choice(_BLANKS[:-1]) for _ in range(3)]
            parts.append(rng.choice([" ", "\n", "\t", "\r\n", " \n", "\u3000"]) * 51_000)
            parts += [rng.choice(_BLANKS[:-1]) for _ in range(2)]
        text = "".join(parts) + rng.choice(["", "a", "1", "!", "'s"])
        assert encode(ours, text) == reference.encode_ordinary(text), text.strip()[:20]


@pytest.mark.real
@pytest.mark.parametrize("unit", [" ", " \t", "a", "!", "\n", "word, 12 "])
def test_llama3_takes_texts_that_tiktoken_cannot(llama3_tokenizer_file: Path, unit: str) -> None:
    ours = llama3_tokenizer(llama3_tokenizer_file)
    text = "x" + unit * (1_200_000 // len(unit)) + "x"
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.real
def test_llama3_saved_loads_in_transformers(llama3_tokenizer_file: Path, tmp_path: Path) -> None:
    """Meta's folder has tokenizer.model alone, which transformers does not read: tokenizer.json is made from its ranks."""
    ours = llama3_tokenizer(llama3_tokenizer_file)
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    reference = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert differing(ours, split_specials(reference), texts()) == []
    assert len(reference) == 128_256
    assert reference("Hi").input_ids == ours.encode("Hi", add_eos=False)
    assert (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id) == (128_000, 128_001, 128_004)
    assert same_tokenizer(ours, load(tmp_path)) is None
    for chat in CHATS:
        for prompt in (False, True):
            want = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(chat, add_generation_prompt=prompt) == want
        assert ours.tokenize_messages(chat)[0] == reference.apply_chat_template(chat, return_dict=False)


# Llama 2: sentencepiece


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = [line for text in texts() if len(text) < 2000 for line in text.splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file


def test_llama2_ids(sentencepiece_file: Path) -> None:
    ours = llama2_tokenizer(sentencepiece_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert differing(ours, reference.encode, texts()) == []
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 700)
    # sentencepiece writes blanks as U+2581, so that character alone comes back as a blank.
    assert all(ours.decode(ours.encode(text)) == text.replace("▁", " ") for text in texts())


def test_llama2_saved_for_transformers(sentencepiece_file: Path, tmp_path: Path) -> None:
    llama2_tokenizer(sentencepiece_file).save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = llama2_tokenizer(sentencepiece_file)
    assert differing(ours, split_specials(saved), texts()) == []
    assert saved("Hi").input_ids == ours.encode("Hi", add_eos=False)
    assert (saved.bos_token_id, saved.eos_token_id) == (1, 2)
    assert same_tokenizer(ours, load(tmp_path)) is None
    assert (tmp_path / "tokenizer.model").read_bytes() == sentencepiece_file.read_bytes()


BLANK_TEXTS = ["a  b", "a   b", " x", "  x", "x  ", "   ", "\t x", "def f():\n    return  1", "\u2028 x"]


@pytest.mark.parametrize("prefix", [True, False], ids=["as Llama", "as Gemma"])
def test_blanks_are_sentencepieces_and_stay_so_when_saved(tmp_path: Path, prefix: bool) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def f(x):\n    return  x", "a  b   c    d", "x y z"] * 8), model_writer=model, model_type="bpe",
        vocab_size=300, byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", add_dummy_prefix=prefix,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)  # fmt: skip
    file = tmp_path / "bare" / "tokenizer.model"
    file.parent.mkdir()
    file.write_bytes(model.getvalue())
    (file.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    reference, ours = sentencepiece.SentencePieceProcessor(model_file=str(file)), load(file)
    ours.save(tmp_path / "saved")
    # transformers 5 writes such a tokenizer.json: it puts the blank in front of a text alone.
    rebuilt = tmp_path / "rebuilt"
    transformers.AutoTokenizer.from_pretrained(file.parent).save_pretrained(rebuilt)
    (rebuilt / "tokenizer.model").write_bytes(model.getvalue())
    load(rebuilt).save(tmp_path / "again")
    (tmp_path / "saved" / "tokenizer.model").unlink()
    load(tmp_path / "saved").save(tmp_path / "from json")
    bare, *saved = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("bare", "saved", "again", "from json")
    )
    for text in BLANK_TEXTS:
        want = reference.encode(text)
        assert reference.decode(want) == text
        for tokenizer in saved:
            assert ours.encode(text, add_bos=False, add_eos=False) == want, text
            assert tokenizer(text, add_special_tokens=False).input_ids == want, text
            for token in ("<s>", "</s>"):
                assert ours.encode_rendered(token + text) == tokenizer(token + text, add_special_tokens=False).input_ids
    # docs/checkpoints.md says how transformers 5 differs on the bare file: a leading blank is lost.
    if prefix:
        assert reference.decode(bare(" x", add_special_tokens=False).input_ids) == "x"


def test_llama2_chat_ids_are_those_of_whole_sentences(sentencepiece_file: Path) -> None:
    # Meta encodes "[INST] question [/INST] answer " as one sentence between bos and eos.
    ours = llama2_tokenizer(sentencepiece_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    chat = [
        {"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(["Hi", "the", "x", "Paris"])
    ]
    want = []
    for question, answer in (("Hi", "the"), ("x", "Paris")):
        want += [1, *reference.encode(f"[INST] {question} [/INST] {answer} "), 2]
    assert ours.tokenize_messages(chat)[0] == want


def test_gguf_of_a_sentencepiece_model(sentencepiece_file: Path, tmp_path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    size = reference.get_piece_size()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([reference.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([reference.get_score(i) for i in range(size)])
    kinds = [
        gguf.TokenType.UNKNOWN
        if reference.is_unknown(i)
        else gguf.TokenType.CONTROL
        if reference.is_control(i)
        else gguf.TokenType.BYTE
        if reference.is_byte(i)
        else gguf.TokenType.NORMAL
        for i in range(size)
    ]
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = load(tmp_path)
    assert differing(ours, reference.encode, texts()) == []
    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert differing(ours, split_specials(saved), texts()) == []
    assert saved("Hi").input_ids == ours.encode("Hi", add_eos=False)


# Published tokenizers of other families, where there are any: KDTUNE_TEST_MODELS/tokenizers/NAME


def published() -> list[Path]:
    return sorted(Path(os.environ.get("KDTUNE_TEST_MODELS", "/nonexistent")).glob("tokenizers/*"))


def published_reference(folder: Path) -> Any:
    """What its authors use: a file of ranks (Qwen's, whose digits are single), a sentencepiece model, else transformers."""
    for file in folder.glob("*.tiktoken"):
        return _tiktoken_reference(file, digits=r"\p{N}").encode_ordinary
    if (folder / "tokenizer.model").is_file():
        return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode
    return split_specials(transformers.AutoTokenizer.from_pretrained(str(folder)))


@pytest.mark.skipif(not published(), reason="no tokenizer in KDTUNE_TEST_MODELS/tokenizers")
@pytest.mark.parametrize("folder", published(), ids=lambda folder: folder.name)
def test_a_published_tokenizer(folder: Path, tmp_path: Path) -> None:
    """The same ids as its reference; and a chat and a saved copy as transformers has them."""
    ours = load(folder)
    assert differing(ours, published_reference(folder), texts()) == []
    ours.save(tmp_path, is_chat=True)
    saved = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert same_tokenizer(ours, load(tmp_path)) is None
    for chat in CHATS:
        for prompt in (False, True):
            want = saved.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(chat, add_generation_prompt=prompt) == want
