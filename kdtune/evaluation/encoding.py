"""Encode text exactly as lm-eval's own `hf` backend, so that scores are comparable.

Special-token strings in a text are special tokens, and a text begins with bos if transformers would add it with the
tokenizer's files, unless it already begins with it.
"""

from kdtune.errors import ConfigError
from kdtune.tokenizers import Tokenizer


def prefix_id(tokenizer: Tokenizer) -> int:
    """Return the token before a text without context, bos or else eos; ConfigError if the tokenizer has neither."""
    found = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if found is None:
        raise ConfigError("tokenizer: has neither a bos nor an eos token; a text's first token follows one of them")
    return found


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text at the start of a sequence."""
    bos = tokenizer.decode([prefix_id(tokenizer)], skip_special=False)
    ids = tokenizer.encode_rendered(text)
    if tokenizer.bos_id is not None and tokenizer.begins_with_bos and not text.startswith(bos):
        return [tokenizer.bos_id, *ids]
    return ids


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation; an empty context becomes the prefix token.

    Trailing blanks of the context belong to the continuation, whose first word is often one token with them. The
    continuation's ids are those of the full text after as many ids as the context alone has.
    """
    if not context:
        ids = tokenizer.encode_rendered(continuation)
        prefix = prefix_id(tokenizer)
        return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)
    stripped = context.rstrip()
    whole = encode_text(tokenizer, context + continuation)
    context_ids = encode_text(tokenizer, stripped)
    return context_ids, whole[len(context_ids) :]
