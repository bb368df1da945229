"""Templates that go on and on, or make ever more text, end with a message; the rest print what they print in transformers."""

import time
from pathlib import Path

import pytest

from kdtune.errors import CheckpointError, DataError
from kdtune.tokenizers import load, template_limits
from kdtune.tokenizers.chat_format import render_chat

CHAT = [
    {"role": "user", "content": " Hi <b> & 'you' "},
    {"role": "assistant", "content": "Hello\nthere"},
    {"role": "user", "content": "Bye"},
]
GROW = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x }}"


def growing(start: str, following: str) -> str:
    return GROW.replace("START", start).replace("NEXT", following)


HOSTILE = {
    "division": ("{{ 1/0 }}", "ZeroDivisionError"),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x", "steps"),
    "loop in filters": ("{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}", "steps"),
    "macro": ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", "steps"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "recursive loop": ("{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}", "RecursionError|steps"),
    "product": ("{{ 'x' * 2000000000 }}", "2,000,000,000"),
    "list": ("{{ ([1] * 9999999999) | length }}", "9,999,999,999"),
    "sums": (growing("'ab'", "ns.x + ns.x"), "makes"),
    "long sum": (growing("'ab'", " + ".join(["ns.x"] * 40)), "makes"),
    "tildes": (growing("'ab'", "ns.x ~ ns.x"), "makes"),
    "blocks": (GROW.replace("START", "'ab'").replace("{% set ns.x = NEXT %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"), "makes"),
    "lists": (growing("[1]", "ns.x + ns.x"), "makes|steps"),
    "nested lists": (growing("[1]", "[ns.x, ns.x]"), "steps"),
    "nested tuples": (growing("(1,)", "(ns.x, ns.x)"), "steps"),
    "nested mappings": (growing("{}", "{'a': ns.x, 'b': ns.x}"), "steps"),
    "nested calls": (growing("{}", "dict(a=ns.x, b=ns.x)"), "steps"),
    "join": (growing("'ab'", "[ns.x, ns.x] | join"), "makes"),
    "join of a text": (growing("'ab'", "ns.x.join([ns.x, ns.x])"), "makes"),
    "replace": (growing("'aa'", "ns.x | replace('a', ns.x)"), "makes"),
    "replace of a text": (growing("'aa'", "ns.x.replace('a', ns.x)"), "makes"),
    "translate": (growing("'aa'", "ns.x.translate({97: ns.x})"), "makes"),
    "numbers": (growing("10", "ns.x * ns.x"), "bits"),
    "power": ("{{ 10 ** 99999999 }}", "bits"),
    "center": ("{{ 'a' | center(9999999999) }}", "9,999,999,999"),
    "ljust": ("{{ 'a'.ljust(9999999999) }}", "9,999,999,999"),
    "tabs": ("{{ '\t'.expandtabs(999999999) }}", "999,999,999"),
    "indent": ("{{ 'a\nb' | indent(999999999) }}", "999,999,999"),
    "batch": ("{{ [1] | batch(9999999999, 1) | list }}", "9,999,999,999"),
    "format": ("{{ '{:>9999999999}'.format(1) }}", "width"),
    "format by argument": ("{{ '{:{}}'.format(1, 9999999999) }}", "9,999,999,999"),
    "percent": ("{{ '%9999999999d' % 1 }}", "width"),
    "percent star": ("{{ '%*d' % (9999999999, 1) }}", "9,999,999,999"),
    "percent filter": ("{{ '%9999999999d' | format(1) }}", "width"),
    "bytes": ("{{ (1).to_bytes(9999999999, 'big') }}", "9,999,999,999"),
    "chance": ("{{ [1, 2] | random }}", "random"),
    "chance text": ("{{ lipsum() }}", "random"),
    "missing": ("{{ messages[9].content.x }}", "no element 9"),
    "include": ("{% include 'x' %}", "loader"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", 20_000)  # a second where there would be ten
    source, words = HOSTILE[name]
    start = time.thread_time()
    with pytest.raises(DataError, match=rf"^f/chat_template.jinja: the chat template refuses .*\[user\]: .*({words})"):
        render_chat(source, CHAT[:1], add_generation_prompt=True, special_tokens={}, origin="f/chat_template.jinja")
    assert time.thread_time() - start < 5


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% for a in [1] %}" * 40 + "{% endfor %}" * 40]
)
def test_a_template_too_deep_to_compile_is_told(chatml_folder: Path, source: str) -> None:
    file = chatml_folder / "chat_template.jinja"
    file.write_text(source)
    with pytest.raises(CheckpointError, match=f"^{file}: the chat template is not valid Jinja: "):
        load(chatml_folder)


def test_the_message_names_the_file(chatml_folder: Path) -> None:
    (chatml_folder / "chat_template.jinja").write_text("{{ 1/0 }}")
    with pytest.raises(DataError, match=f"^{chatml_folder / 'chat_template.jinja'}: "):
        load(chatml_folder).tokenize_messages(CHAT)


def test_a_long_conversation_is_no_endless_one() -> None:
    """400 turns, each looked at for each of the others, and 5 MB of text."""
    source = (
        "{% for m in messages %}{% set ns = namespace(n=0) %}{% for other in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ m.content }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "x" * 12_500} for _ in range(400)]
    text = render_chat(source, chat, add_generation_prompt=False, special_tokens={})
    assert text == ("400" + "x" * 12_500) * 400
    (huge,) = [{"role": "user", "content": "x" * 20_000_000}]
    assert (
        len(render_chat("{{ messages[0].content + '!' }}", [huge], add_generation_prompt=False, special_tokens={}))
        == 20_000_001
    )


SAME = [
    "{{ 1 + 2 + 3 }}{{ 'a' + 'b' ~ 3 ~ none }}{{ 7 % 4 }}{{ '%s-%05d' % ('x', 3) }}{{ 2 ** 10 }}{{ 'ab' * 3 }}{{ [1] * 2 + [3] }}",
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.revindex }}{{ loop.nextitem }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
    "{% for i in range(2500) %}{{ loop.length - i if i % 500 == 0 }}{% if i == 2000 %}{% break %}{% endif %}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content | trim | upper | replace('I', 'i') }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ ['a', 'b'] | join }}{{ range(3) | map('string') | join('-') }}{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "{% macro f(x, y=2) %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ f(1) }}{% call f(3) %}c{% endcall %}",
    "{% set x %}  {{ messages[0].content }}{% endset %}{{ x | length }}{{ x }}{% filter upper %}a{{ x }}{% endfilter %}",
    "{{ 'a,b'.split(',') }}{{ '{}-{a:>4}'.format(1, a=2) }}{{ ' x '.strip() }}{{ 'x'.center(5) }}",
    "{{ 'a\tb'.expandtabs(4) }}{{ '-'.join(['a', 'b']) }}",
    "{{ (1, 2) }}{{ {'a': [1, (2,)]} }}{{ {'a': 1}.items() | list }}{{ messages[1:] | length }}{{ messages[-1]['content'][::-1] }}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{{ messages[1].content | indent(4) }}{{ 'abc' | center(9) }}{{ [3, 1] | sort }}",
    "{{ [1, 2, 3] | batch(2) | list }}{{ '%s' | format('x') }}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}{{ undefined_name }}{{ 'x' in 'xyz' }}",
    "{{ dict(a=1) }}{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.role %}{% endfor %}{{ ns.t }}",
]  # fmt: skip


@pytest.mark.parametrize("source", SAME)
def test_what_is_printed_is_what_transformers_prints(source: str) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    (want,), _ = render_jinja_template([CHAT], chat_template=source, add_generation_prompt=True)
    assert render_chat(source, CHAT, add_generation_prompt=True, special_tokens={}) == want
