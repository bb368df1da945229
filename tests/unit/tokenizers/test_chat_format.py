"""Chat templates: the families' texts, where a folder's template is found, and what a template may do."""

import json
from pathlib import Path

import pytest

from kdtune.errors import CheckpointError, DataError
from kdtune.tokenizers import llama2_tokenizer, llama3_tokenizer, load
from kdtune.tokenizers.chat_format import CHATML, LLAMA2, LLAMA3, family_template, render_chat

CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": " Hello. "},
    {"role": "user", "content": "Bye"},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def test_llama2() -> None:
    want = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Bye [/INST]"
    for prompt in (False, True):
        assert render_chat(LLAMA2, CHAT, add_generation_prompt=prompt, special_tokens=NAMES) == want


def test_llama3() -> None:
    def turn(role: str, text: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"

    want = "<s>" + turn("system", "Be brief.<|eot_id|>") + turn("user", "Hi<|eot_id|>")
    want += turn("assistant", "Hello.<|eot_id|>") + turn("user", "Bye<|eot_id|>")
    assert render_chat(LLAMA3, CHAT, add_generation_prompt=False, special_tokens=NAMES) == want
    assert render_chat(LLAMA3, CHAT, add_generation_prompt=True, special_tokens=NAMES) == want + turn("assistant", "")


def test_chatml() -> None:
    want = "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
    assert render_chat(CHATML, CHAT[:2], add_generation_prompt=False, special_tokens={}) == want
    assert (
        render_chat(CHATML, CHAT[:2], add_generation_prompt=True, special_tokens={}) == want + "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [LLAMA2, LLAMA3, CHATML])
def test_families_equal_transformers(template: str, chatml_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(chatml_folder))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    for prompt in (False, True):
        want = reference.apply_chat_template(CHAT, chat_template=template, tokenize=False, add_generation_prompt=prompt)
        assert render_chat(template, CHAT, add_generation_prompt=prompt, special_tokens=names) == want


def test_family_is_chosen_by_special_tokens(chatml_folder: Path, tiktoken_file: Path, sentencepiece_file: Path) -> None:
    assert load(chatml_folder).chat_template == CHATML == family_template({"<|im_start|>"})
    assert llama3_tokenizer(tiktoken_file).chat_template == LLAMA3
    assert llama2_tokenizer(sentencepiece_file).chat_template == LLAMA2


def test_the_folders_template_comes_first(chatml_folder: Path) -> None:
    config = json.loads((chatml_folder / "tokenizer_config.json").read_text())
    file = chatml_folder / "tokenizer_config.json"
    file.write_text(json.dumps({**config, "chat_template": "one"}))
    assert load(chatml_folder).chat_template == "one"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "two"}]
    file.write_text(json.dumps({**config, "chat_template": named}))
    assert load(chatml_folder).chat_template == "two"
    (chatml_folder / "chat_template.jinja").write_text("three")
    assert load(chatml_folder).chat_template == "three"


def test_a_template_lies_beside_tokenizer_model_too(tiktoken_file: Path, sentencepiece_file: Path) -> None:
    for file in (tiktoken_file, sentencepiece_file):
        (file.parent / "chat_template.jinja").write_text("{{ bos_token }}{{ messages | length }}{{ eos_token }}")
        tokenizer = load(file)
        names = [
            tokenizer.decode([i], skip_special=False) for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None
        ]
        assert tokenizer.render(CHAT) == "4".join(names) and all(names)


@pytest.mark.parametrize("entry", [3, [{"name": "rag", "template": "x"}], ["x"]])
def test_an_unusable_template_entry_is_refused(chatml_folder: Path, entry: object) -> None:
    (chatml_folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template: found .*chat_template\.jinja"):
        load(chatml_folder)


def test_broken_jinja_is_refused_at_loading(chatml_folder: Path) -> None:
    (chatml_folder / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        load(chatml_folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception('no') }}",
        "{{ missing.attribute }}",
    ],
)
def test_a_template_cannot_reach_out(template: str) -> None:
    with pytest.raises(DataError, match="the chat template refuses"):
        render_chat(template, CHAT, add_generation_prompt=False, special_tokens={})


def test_tools_of_a_template() -> None:
    template = (
        "{% for m in messages %}\n    {% if loop.index > 2 %}\n        {% break %}\n    {% endif %}\n"
        "{{ {'t': m.content, 'é': '<&>'} | tojson }}\n{% endfor %}\n{{ strftime_now('%%') }}"
    )
    want = '{"t": " Be brief. ", "é": "<&>"}\n{"t": "Hi\\n", "é": "<&>"}\n%'
    assert render_chat(template, CHAT, add_generation_prompt=False, special_tokens={}) == want
