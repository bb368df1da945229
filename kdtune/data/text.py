"""Plain text: every token is trained on."""

from typing import TYPE_CHECKING, Unpack

from kdtune.data.columns import Row, suggest_text_column, text_column
from kdtune.data.dataset import Dataset
from kdtune.data.packing import pack_examples
from kdtune.data.rows import FilterFn, build_dataset
from kdtune.data.sources import Source, SourceOptions
from kdtune.data.transforms import EncodedRow, pair_of, truncated

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer


def text_completion_dataset(
    tokenizer: "Tokenizer",
    *,
    source: str,
    column: str = "text",
    add_eos: bool = True,
    filter_fn: FilterFn | str | None = None,
    packed: bool = False,
    split_across_pack: bool = False,
    **where: Unpack[SourceOptions],
) -> Dataset:
    """Build a dataset of texts, one per example, without any template; an empty text counts as untrainable.

    column: the one with the text. add_eos: end each text with the tokenizer's eos. packed,
    split_across_pack: see pack_examples.
    A text begins with bos if transformers, with the tokenizer's files, would add it.

    The rows of a text file are its lines. A text longer than the tokenizer's max_seq_len is cut there. The other
    arguments and the errors are alpaca_dataset's.
    """
    pair = pair_of(tokenizer)

    def encode(row: Row) -> EncodedRow:
        text = text_column(row, column)
        ids = tokenizer.encode(text, add_bos=tokenizer.begins_with_bos, add_eos=add_eos)
        trained = [bool(text)] * len(ids)
        teacher = None if pair is None else pair.pair_text(ids, trained, text, add_eos=add_eos)
        return truncated(EncodedRow(ids, trained, teacher=teacher), tokenizer)

    dataset = build_dataset(
        encode,
        Source(source, **where),
        filter_fn,
        columns=[column],
        suggest=suggest_text_column,
        is_paired=pair is not None,
    )
    return pack_examples(dataset, tokenizer, packed=packed, split_across_pack=split_across_pack)
