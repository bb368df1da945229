"""A tokenizer's fingerprint changes with what it encodes to, and says which part."""

from kdtune.tokenizers import byte_tokenizer, fingerprint


def test_which_part_differs() -> None:
    before = fingerprint(byte_tokenizer())
    assert before == fingerprint(byte_tokenizer(max_seq_len=5))
    other_template, other_end, other_ids = (byte_tokenizer() for _ in range(3))
    other_template.chat_template += " "
    other_end.eos_id = None
    other_ids.control_tokens["<|im_end|>"] = 300
    for tokenizer, part in ((other_template, "chat_template"), (other_end, "special_ids"), (other_ids, "ids")):
        now = fingerprint(tokenizer)
        assert [name for name in before if before[name] != now[name]] == [part]
