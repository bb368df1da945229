"""What rows and turns hold beside their text, rendered as transformers' apply_chat_template does, to the byte."""

import copy
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from kdtune.data import chat_dataset
from kdtune.errors import ConfigError, DataError
from kdtune.tokenizers import Tokenizer, byte_tokenizer, load

transformers = pytest.importorskip("transformers")

# Of the kind that models with tools have: roles, tools and arguments as JSON, reasoning, a variable, names with defaults.
TEMPLATE = """\
{%- if tools is not none and tools | length > 0 %}{{- 'Tools:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson(indent=2)) }}{%- endfor %}{{- '\\n' }}{%- endif %}
{%- if style is defined %}{{- '[' + style + ']' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + (':' + m.name if m.name is defined else '') + '\\n' }}
{%- if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}
{%- if m.content is defined and m.content is not none %}{{- m.content }}{%- endif %}
{%- for c in m.tool_calls or [] %}{{- '<call>' }}{%- for k, v in c.function.arguments.items() %}
{{- k + '=' + (v | tojson) + ';' }}{%- endfor %}{{- c.function.name + '</call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Øslo <|im_end|>", "days": 2.0, "x": None}},
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "a<b & <|im_start|>", "parameters": {}}}
QUESTION = {"role": "user", "content": "Rain?", "name": "Ada"}
ROWS: list[dict[str, Any]] = [
    {"tools": [TOOL], "messages": [
        QUESTION, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "Yes.", "tool_calls": []},
    ]},
    {"tools": [], "messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}]},
    {"messages": [QUESTION, {"role": "assistant", "content": "42", "reasoning_content": "6 * 7"}]},
    {"messages": [QUESTION, {"role": "assistant", "content": "42", "thinking": "6 * 7"}]},
    {"messages": [QUESTION, {"role": "assistant", "content": "42", "reasoning": "6 * 7", "weight": 1}]},
    {"messages": [QUESTION, {"role": "assistant", "content": "x"}], "chat_template_kwargs": {"style": "short <|im_end|>"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chat_fields")
    byte_tokenizer().save(made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("row", ROWS)
def test_rows_render_as_in_transformers(
    row: dict[str, Any], tokenizer: Tokenizer, reference: Any, tmp_path: Path
) -> None:
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    example = chat_dataset(tokenizer, source=str(tmp_path / "row.jsonl"))[0]
    want = reference.apply_chat_template(
        copy.deepcopy(row["messages"]), tools=row.get("tools"), tokenize=False, **row.get("chat_template_kwargs", {})
    )
    assert tokenizer.decode(example.tokens, skip_special=False) == want
    # What the data hold never becomes a special token.
    turns = len(row["messages"])
    assert [example.tokens.tolist().count(i) for i in (tokenizer.bos_id, tokenizer.eos_id)] == [turns, turns]
    direct = tokenizer.render(
        row["messages"], tools=row.get("tools"), template_variables=row.get("chat_template_kwargs")
    )
    assert direct == want


@pytest.mark.parametrize("row", ROWS)
def test_a_tool_template_is_used_where_transformers_uses_it(row: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    named = tmp_path / "named"
    byte_tokenizer().save(named)
    (named / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}")
    (named / "additional_chat_templates").mkdir()
    (named / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(named), load(named)
    options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
    want = reference.apply_chat_template(copy.deepcopy(row["messages"]), tokenize=False, **options)
    found = tokenizer.render(
        row["messages"], tools=row.get("tools"), template_variables=row.get("chat_template_kwargs")
    )
    assert found == want


# As Qwen3's, Granite's and SmolLM3's: a switch for the block of thoughts before an answer.
SWITCH = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}
{{- m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""


@pytest.fixture(scope="module")
def switch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("switch")
    byte_tokenizer().save(made)
    (made / "chat_template.jinja").write_text(SWITCH)
    return made


@pytest.mark.parametrize("thinks", [True, False, None])
def test_a_templates_switch_is_set_for_every_conversation(
    thinks: bool | None, switch_folder: Path, tmp_path: Path
) -> None:
    variables = {} if thinks is None else {"enable_thinking": thinks}
    tokenizer = load(switch_folder, chat_template_kwargs=variables)
    reference = transformers.AutoTokenizer.from_pretrained(switch_folder)
    chat = [QUESTION, {"role": "assistant", "content": "42"}]
    prompt = reference.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True, **variables)
    assert tokenizer.render([QUESTION], add_generation_prompt=True) == prompt
    assert tokenizer.render(chat) == reference.apply_chat_template(chat, tokenize=False, **variables)
    # Trained is what the model has to write after that prompt.
    (tmp_path / "row.jsonl").write_text(json.dumps({"messages": chat}))
    example = chat_dataset(tokenizer, source=str(tmp_path / "row.jsonl"))[0]
    trained = example.labels[example.labels != -100].tolist()
    written = tokenizer.render(chat).removeprefix(prompt).removesuffix("\n")
    assert tokenizer.decode(trained, skip_special=False) == written
    assert written.startswith("42") == (thinks is False)


def test_a_rows_own_variables_come_before_the_configs(switch_folder: Path) -> None:
    tokenizer = load(switch_folder, chat_template_kwargs={"enable_thinking": False})
    own = tokenizer.render([QUESTION], add_generation_prompt=True, template_variables={"enable_thinking": True})
    assert own == load(switch_folder).render([QUESTION], add_generation_prompt=True)


@pytest.mark.parametrize("name", ["thinking", "messages", "bos_token"])
def test_a_variable_that_the_template_does_not_look_at_is_refused(name: str, switch_folder: Path) -> None:
    want = rf"tokenizer.chat_template_kwargs.{name}: no variable of the chat template .*looks at enable_thinking$"
    with pytest.raises(ConfigError, match=want):
        load(switch_folder, chat_template_kwargs={name: True})


def test_a_template_that_raises_names_the_example(switch_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "raising"
    byte_tokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    answer = {"role": "assistant", "content": "42"}
    rows = [[QUESTION, answer], [{"role": "system", "content": "Be brief."}, QUESTION, answer]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl.*: row 2: .*chat_template\.jinja.*no system turn, please"):
        chat_dataset(load(folder), source=str(tmp_path / "rows.jsonl"))


# Published templates of model families, where there are any: KDTUNE_TEST_MODELS/chat_templates/NAME.jinja
PUBLISHED = sorted(Path(os.environ.get("KDTUNE_TEST_MODELS", "/nonexistent")).glob("chat_templates/*.jinja"))
TALKS = [
    [QUESTION],
    [{"role": "system", "content": " Be brief.\n"}, QUESTION],
    [QUESTION, {"role": "assistant", "content": " 42 "}, {"role": "user", "content": "Sure?\n"}, {"role": "assistant", "content": "Yes."}],
    [QUESTION, {"role": "assistant", "content": "42", "reasoning_content": "6 * 7"}],
    [QUESTION, {"role": "assistant", "content": "<think>\n6 * 7\n</think>\n\n42"}],
]  # fmt: skip


@pytest.mark.skipif(not PUBLISHED, reason="no template in KDTUNE_TEST_MODELS/chat_templates")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_a_published_template_renders_as_in_transformers(file: Path, tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(file.read_bytes())
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    code = re.sub(r"\{#.*?#\}", "", file.read_text(), flags=re.DOTALL)
    switches = [{}, *({"enable_thinking": value} for value in (True, False) if "enable_thinking" in code)]
    tokenizers = [load(tmp_path, chat_template_kwargs=variables) for variables in switches]
    rendered = 0
    for talk, tokenizer, prompt in itertools.product(TALKS, tokenizers, (False, True)):
        variables = tokenizer.chat_template_kwargs
        try:
            want = reference.apply_chat_template(
                copy.deepcopy(talk), tokenize=False, add_generation_prompt=prompt, **variables
            )
        except Exception:  # whatever a template raises
            with pytest.raises(DataError, match="the chat template refuses a conversation"):
                tokenizer.render(talk, add_generation_prompt=prompt)
            continue
        assert tokenizer.render(talk, add_generation_prompt=prompt) == want
        rendered += 1
    assert rendered
