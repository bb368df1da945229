"""Tokenizers: text to ids and back, chat templates, training masks."""

from kdtune.tokenizers.base import Tokenizer
from kdtune.tokenizers.byte import byte_tokenizer
from kdtune.tokenizers.compare import check_vocabulary, fingerprint, lacking_control_tokens, same_ids, same_tokenizer
from kdtune.tokenizers.gguf import GGUFTokenizer
from kdtune.tokenizers.huggingface import HuggingFaceTokenizer
from kdtune.tokenizers.loading import llama2_tokenizer, llama3_tokenizer, load
from kdtune.tokenizers.sentencepiece import SentencePieceTokenizer
from kdtune.tokenizers.tiktoken import TiktokenTokenizer

__all__ = [
    "GGUFTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "byte_tokenizer",
    "check_vocabulary",
    "fingerprint",
    "lacking_control_tokens",
    "llama2_tokenizer",
    "llama3_tokenizer",
    "load",
    "same_ids",
    "same_tokenizer",
]
