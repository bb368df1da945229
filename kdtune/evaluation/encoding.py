"""Text to ids as lm-eval's own `hf` backend has it, so that scores can be compared.

That is: control-token strings in a text are control tokens, and a text begins with bos where the tokenizer's files make
transformers begin it so, unless it begins with it already.
"""

from kdtune.errors import ConfigError
from kdtune.tokenizers import Tokenizer


def prefix_id(tokenizer: Tokenizer) -> int:
    """The token that a text without context follows: bos, or eos where there is none.

    Raises:
        ConfigError: the tokenizer has neither.
    """
    found = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if found is None:
        raise ConfigError("tokenizer: has neither a bos nor an eos token; a text's first token follows one of them")
    return found


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that stands at the start of a sequence."""
    bos = tokenizer.decode([prefix_id(tokenizer)], skip_special=False)
    ids = tokenizer.encode_rendered(text)
    if tokenizer.bos_id is not None and tokenizer.begins_with_bos and not text.startswith(bos):
        return [tokenizer.bos_id, *ids]
    return ids


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of its continuation; an empty context becomes the prefix token.

    Blanks at the end of the context belong to the continuation, whose first word is often one token with them. The
    continuation's ids are what the whole text has beyond the number of ids that the context alone has.
    """
    if not context:
        ids = tokenizer.encode_rendered(continuation)
        prefix = prefix_id(tokenizer)
        return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)
    stripped = context.rstrip()
    whole = encode_text(tokenizer, context + continuation)
    context_ids = encode_text(tokenizer, stripped)
    return context_ids, whole[len(context_ids) :]
