"""A tokenizer's fingerprint changes with what it encodes to, and says which part."""

from kdtune.tokenizers import byte_tokenizer, fingerprint


def test_which_part_differs() -> None:
    before = fingerprint(byte_tokenizer())
    assert before == fingerprint(byte_tokenizer(max_seq_len=5))
    other_template, other_tools, other_end, other_ids = (byte_tokenizer() for _ in range(4))
    other_template.chat_template += " "
    other_tools.tool_template = "{{ tools }}"
    other_end.eos_id = None
    other_ids.special_tokens["<|im_end|>"] = 300
    changed = {
        "chat_template": other_template,
        "tool_template": other_tools,
        "special_ids": other_end,
        "ids": other_ids,
    }
    for part, tokenizer in changed.items():
        now = fingerprint(tokenizer)
        assert [name for name in before if before[name] != now[name]] == [part]
