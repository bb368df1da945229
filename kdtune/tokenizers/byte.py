"""A byte tokenizer for tiny models and tests, with nothing to download."""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from kdtune.tokenizers.chat_format import CHATML
from kdtune.tokenizers.gguf import GGUFTokenizer


def byte_tokenizer(max_seq_len: int | None = None) -> GGUFTokenizer:
    """Build a tokenizer with one id per byte of UTF-8 (256), then <|im_start|> and <|im_end|>, and ChatML as chat template.

    max_seq_len: length to which datasets truncate, in tokens; None: no truncation.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return GGUFTokenizer(
        backend,
        named={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        model_max_length=None,
        chat_template=CHATML,
        max_seq_len=max_seq_len,
        origin="byte_tokenizer",
    )
