"""Chat templates: those of model families and folders, and rendering byte-identical to transformers'."""

import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from kdtune.errors import CheckpointError, ConfigError, DataError
from kdtune.json_files import read_json_if_there, read_text
from kdtune.paths import user_path
from kdtune.tokenizers.folder import TOKENIZER_CONFIG, write_tokenizer_config
from kdtune.tokenizers.template_limits import METER, LimitedEnvironment, LimitError

DATE_VARIABLE = "KDTUNE_DATE"
GIVEN_VARIABLES = {
    "messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception",
    "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token",
}  # fmt: skip
"""What a chat template is given in any case."""

# Meta's llama 2 reference: the system text sits inside the first user turn, and every answer closes its own sequence.
LLAMA2 = """\
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
    {%- set text = message['content'] | trim -%}
    {%- if message['role'] == 'system' -%}
        {%- if not loop.first -%}
            {{- raise_exception('only the first message may have the role system') -}}
        {%- endif -%}
        {%- set state.system = '<<SYS>>\\n' + text + '\\n<</SYS>>\\n\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + state.system + text + ' [/INST]' -}}
        {%- set state.system = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + text + ' ' + eos_token -}}
    {%- else -%}
        {{- raise_exception('role ' + message['role'] + ': this template knows system, user and assistant') -}}
    {%- endif -%}
{%- endfor -%}
"""

# Meta's llama 3 reference: every message is a header, the stripped text and an end-of-turn token.
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def family_template(special_tokens: Container[str]) -> str:
    """Return the template of the family with these special tokens: llama 3, ChatML, else llama 2 with its marks in text."""
    if "<|start_header_id|>" in special_tokens:
        return LLAMA3
    return CHATML if "<|im_start|>" in special_tokens else LLAMA2


def folder_templates(folder: Path) -> tuple[str | None, str | None]:
    """Return the chat template of a Hugging Face folder, and the one for conversations with tools, each None without one.

    `chat_template.jinja` and its `tool_use.jinja` take precedence over the entry in tokenizer_config.json, as in
    transformers; of several named templates, those named "default" and "tool_use" are used.

    Raises:
        CheckpointError: a file cannot be read, or the entry is neither a string nor a list of named templates with a default.
    """
    file, tools = folder / "chat_template.jinja", folder / "additional_chat_templates" / "tool_use.jinja"
    if file.is_file():
        return read_text(file), read_text(tools) if tools.is_file() else None
    config = folder / TOKENIZER_CONFIG
    found = read_json_if_there(config).get("chat_template")
    if found is None or isinstance(found, str):
        return found, None
    if isinstance(found, list) and all(isinstance(entry, Mapping) for entry in found):
        named = {entry.get("name"): entry.get("template") for entry in found}
        if isinstance(named.get("default"), str):
            return named["default"], None if named.get("tool_use") is None else str(named["tool_use"])
        found = sorted(map(str, named))
    raise CheckpointError(
        f"{config}: chat_template: found {found!r}; want a string or a list of named templates of which one is called "
        "'default'; put the template to use into chat_template.jinja"
    )


def save_template(folder: Path, template: str, named: Mapping[str, str]) -> None:
    """Write the chat template into a folder of tokenizer files that has none.

    If tokenizer_config.json is missing too, it is written: a template may print bos_token and eos_token, which
    transformers reads from there.
    """
    if folder_templates(folder)[0] is not None:
        return
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if not (folder / TOKENIZER_CONFIG).is_file():
        write_tokenizer_config(folder, named)


def template_file(origin: Path | str) -> str:
    """Return the file of a tokenizer's chat template, `origin` being the tokenizer's own file or folder."""
    path = user_path(origin)
    folder = path if path.is_dir() else path.parent
    for name in ("chat_template.jinja", TOKENIZER_CONFIG):
        if path.suffix != ".gguf" and (folder / name).is_file():
            return str(folder / name)
    return str(origin)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers' own masks; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def today() -> str:
    """Return the date, YYYY-MM-DD: KDTUNE_DATE from the environment (a sweep sets it for its steps), else today's.

    Raises:
        ConfigError: the variable holds no date.
    """
    return check_date(os.environ.get(DATE_VARIABLE) or _strftime_now("%Y-%m-%d"), DATE_VARIABLE)


def check_date(date: str, key: str) -> str:
    """Return the date. Raises ConfigError naming `key` unless it reads YYYY-MM-DD."""
    try:
        datetime.strptime(date, "%Y-%m-%d")
    except ValueError as error:
        raise ConfigError(f"{key}={date}: is no date; write YYYY-MM-DD") from error
    return date


def asks_date(source: str) -> bool:
    """Return whether a chat template may print the date."""
    return "strftime_now" in source


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def check_template(source: str, *, origin: str) -> None:
    """Raise CheckpointError naming `origin` if the template is not valid Jinja."""
    try:
        _compile(source)
    except Exception as error:  # Python's compiler has words of its own, such as of loops that are nested too deeply
        raise CheckpointError(f"{origin}: the chat template is not valid Jinja: {_reason(error)}") from error


def check_variables(variables: Mapping[str, Any], sources: Iterable[str], *, origin: str) -> None:
    """Raise ConfigError for variables of a chat template that none of the templates looks at, or that every one is given.

    `origin` names the templates' file.
    """
    known = set().union(*(meta.find_undeclared_variables(_environment().parse(source)) for source in sources))
    free = sorted(known - GIVEN_VARIABLES)
    for name in variables:
        if name not in free:
            has = f"it looks at {', '.join(free)}" if free else "it looks at none"
            raise ConfigError(
                f"tokenizer.chat_template_kwargs.{name}: no variable of the chat template in {origin}; {has}"
            )


def _reason(error: Exception) -> str:
    """Return the message of an exception raised by a template; for Python's own exceptions, with the class name."""
    if isinstance(error, jinja2.TemplateError | LimitError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    date: str | None = None,
    origin: str = "",
) -> str:
    """Render the conversation, byte-identical to transformers' `apply_chat_template(tokenize=False)`.

    `special_tokens` holds bos_token, eos_token, ... as far as the tokenizer has them; `variables` further template
    variables. `date` (YYYY-MM-DD) is the day, at midnight, for a template that asks for it; None: now, as in
    transformers. `origin` names the template's file, for the message.

    Raises:
        DataError: the template refuses the conversation, fails on it, or exceeds its limits (see template_limits).
    """
    METER.start(messages)
    try:
        return _compile(source).render(
            messages=list(messages),
            tools=None if tools is None else list(tools),
            add_generation_prompt=add_generation_prompt,
            strftime_now=_strftime_now if date is None else datetime.strptime(date, "%Y-%m-%d").strftime,
            **{"documents": None, **special_tokens, **(variables or {})},
        )
    except Exception as error:  # a template can raise whatever Python can
        roles = [str(message["role"]) for message in messages]
        listed = ", ".join(roles if len(roles) <= 8 else [*roles[:8], "..."])
        where = f"{origin}: " if origin else ""
        raise DataError(
            f"{where}the chat template refuses a conversation with the roles [{listed}]: {_reason(error)}"
        ) from error
