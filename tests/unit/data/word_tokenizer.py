"""A word-level tokenizer whose ids can be read off by eye."""

from collections.abc import Sequence
from typing import Any

PAD, BOS, EOS, END, USER, ASSISTANT, SYSTEM = range(7)
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}


class WordTokenizer:
    """Ids 7 and up are words in order of first appearance; a turn is: role id, words, END."""

    bos_id, eos_id, pad_id = BOS, EOS, PAD
    stop_ids = frozenset({EOS, END})
    vocab_size = 1000
    begins_with_bos = True

    def __init__(self, max_seq_len: int | None = None) -> None:
        self.max_seq_len = max_seq_len
        self.words: dict[str, int] = {}

    def id_of(self, word: str) -> int:
        return self.words.setdefault(word, 7 + len(self.words))

    def encode(self, text: str, *, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        return [BOS] * add_bos + [self.id_of(word) for word in text.split()] + [EOS] * add_eos

    def tokenize_messages(
        self, messages: Sequence[Any], *, add_generation_prompt: bool = False, train_on: str = "answers", **beside: Any
    ) -> tuple[list[int], list[bool]]:
        ids, trained = [BOS], [train_on == "all"]
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
        for i, message in enumerate(messages):
            chosen = {"all": True, "answers": message.role == "assistant", "last": i == last}[train_on]
            wanted = chosen and not message.masked
            turn = [self.id_of(word) for word in message.content.split()] + [END]
            ids += [ROLES[message.role], *turn]
            trained += [wanted and train_on == "all", *[wanted] * len(turn)]
        return ids, trained

    def left_out(self, messages: Sequence[Any], **beside: Any) -> list[str]:
        return sorted({key for message in messages for key in message.fields})
