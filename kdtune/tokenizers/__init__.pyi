from .base import Tokenizer
from .compare import check_vocabulary, fingerprint, lacking_special_tokens, same_ids, same_tokenizer
from .gguf import GGUFTokenizer
from .huggingface import HuggingFaceTokenizer
from .loading import byte_tokenizer, llama2_tokenizer, llama3_tokenizer, load
from .sentencepiece import SentencePieceTokenizer
from .tiktoken import TiktokenTokenizer

__all__ = [
    "GGUFTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "byte_tokenizer",
    "check_vocabulary",
    "fingerprint",
    "lacking_special_tokens",
    "llama2_tokenizer",
    "llama3_tokenizer",
    "load",
    "same_ids",
    "same_tokenizer",
]
