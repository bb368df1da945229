"""Compare two tokenizers: a teacher's distribution must mean the same to a student."""

import hashlib
import json

from kdtune.errors import ConfigError
from kdtune.tokenizers.base import Tokenizer

# Texts in many scripts, on which two tokenizers are compared.
BATTERY = (
    "The quick brown fox jumps over the lazy dog. It's 12,345.67 o'clock, isn't it?",
    "  two spaces,\ttabs\t\tand\n\nnewlines \r\n   before words  ",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # 0x1F <= 3e-4 && y != NULL;\n",
    "Élève naïve, Größe, łódź, çağ, Đặng, Ωμέγα, Привет, мир! שלום עולם السلام عليكم",
    "नमस्ते दुनिया สวัสดีชาวโลก 你好，世界。こんにちは世界 안녕하세요 ২০২৪ 一二三",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u0301 \u00a0 \u200b ﬁ ½ x² ∑∫ → €",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ________________________________ ................",
    "<|im_start|> <|im_end|> <|eot_id|> <s> </s> <unk> [INST]",
)
PLAIN_BATTERY = BATTERY[:-1]
"""Those without the names of special tokens."""


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> str | None:
    """Return None if the two give the same ids, else a sentence that describes the difference.

    Compares bos, eos, the special tokens with their ids, and the ids of a fixed set of texts in many scripts.
    """
    for name in ("bos_id", "eos_id"):
        if getattr(a, name) != getattr(b, name):
            return f"they differ in {name}: {getattr(a, name)} against {getattr(b, name)}"
    return same_ids(a, b)


def same_ids(a: Tokenizer, b: Tokenizer) -> str | None:
    """Like `same_tokenizer` without bos and eos, which a base model and its finetuned form may choose differently."""
    for token in sorted(a.special_tokens.keys() | b.special_tokens.keys()):
        left, right = a.special_tokens.get(token), b.special_tokens.get(token)
        if left != right:
            return f"they differ in the special token {token!r}: id {left} against {right}"
    return same_text_ids(a, b)


def same_text_ids(a: Tokenizer, b: Tokenizer) -> str | None:
    """Like `same_tokenizer` for texts without special tokens."""
    for text in BATTERY:
        left_ids = a.encode(text, add_bos=False, add_eos=False)
        right_ids = b.encode(text, add_bos=False, add_eos=False)
        if left_ids != right_ids:
            return f"they differ on {text[:40]!r}: {left_ids[:8]}... against {right_ids[:8]}..."
    return None


def lacking_special_tokens(tokenizer: Tokenizer, other: Tokenizer) -> list[str] | None:
    """Return the special tokens that `tokenizer` has and `other` lacks; None if they use an id for different texts.

    A base model and its instruct model differ in this way: text has the same ids, and the latter has further special tokens,
    or names for those that the former reserves.
    """
    if same_text_ids(tokenizer, other) is not None:
        return None
    for one, its in ((tokenizer, other), (other, tokenizer)):
        free = set(its.special_tokens.values())
        for token, i in one.special_tokens.items():
            taken = i < its.vocab_size and i not in free and its.decode([i], skip_special=False) != token
            if its.special_tokens.get(token, i) != i or taken:
                return None
    return sorted(
        tokenizer.special_tokens.keys() - other.special_tokens.keys(), key=tokenizer.special_tokens.__getitem__
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, model: str = "model") -> None:
    """Raise if the model's embedding (vocab_size rows) has fewer rows than the tokenizer has ids.

    Raises:
        ConfigError: naming both sizes.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"tokenizer: has {tokenizer.vocab_size} ids, but the {model}'s vocabulary is {vocab_size}; "
            f"a token would have no row in its embedding; use the {model}'s own tokenizer, or a {model} with that many rows"
        )


def fingerprint(tokenizer: Tokenizer) -> dict[str, str]:
    """Hash the tokenizer's ids, special ids and chat templates; equal if two tokenizers encode alike.

    Covers the ids of a fixed set of texts in many scripts and of the special tokens.
    """
    parts = {
        "ids": [tokenizer.special_tokens, [tokenizer.encode(text, add_bos=False, add_eos=False) for text in BATTERY]],
        "special_ids": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, sorted(tokenizer.stop_ids)],
        "chat_template": tokenizer.chat_template,
        "tool_template": tokenizer.tool_template,
    }
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for name, part in parts.items()
    }
