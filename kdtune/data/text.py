"""Plain text, every token of which is trained on."""

from typing import TYPE_CHECKING, Unpack

from kdtune.data.dataset import Dataset, FilterFn, build_dataset
from kdtune.data.sources import Source, SourceOptions
from kdtune.data.transforms import Encoded, Row, text_column

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer


def text_completion_dataset(
    tokenizer: "Tokenizer",
    *,
    source: str,
    column: str = "text",
    add_eos: bool = True,
    filter_fn: FilterFn | str | None = None,
    **where: Unpack[SourceOptions],
) -> Dataset:
    """A dataset of texts, one an example, without any template; an empty text counts as untrainable.

    A text begins with bos where transformers, under the tokenizer's files, begins it so.

    The rows of a text file are its lines. The other arguments and the errors are alpaca_dataset's.
    """

    def encode(row: Row) -> Encoded:
        text = text_column(row, column)
        ids = tokenizer.encode(text, add_bos=tokenizer.begins_with_bos, add_eos=add_eos)
        return ids, [bool(text)] * len(ids)

    return build_dataset(tokenizer, encode, Source(source, **where), filter_fn)
