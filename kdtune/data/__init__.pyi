from .alignment import TeacherExample, TokenizerPair
from .alpaca import alpaca_cleaned_dataset, alpaca_dataset, alpaca_prompt, quickstart_dataset
from .answers import answers_dataset
from .batch import Batch, collate
from .chat import chat_dataset, instruct_dataset
from .conversation import ConversationEncoder, ConversationOptions, TrainingOptions
from .dataset import Dataset, DatasetStats, MapDataset, Report, StreamDataset, TokenizedDataset
from .first_row import dataset_nodes, first_row_problems, read_problems
from .loader import Loader, LoaderState, batches
from .messages import Conversation, Message, parse_conversation
from .mix import MixedDataset, MixedStream, load_dataset, mixed_dataset
from .packing import PackedDataset, PackedStream, pack_examples
from .prompts import prompts_dataset
from .rows import RowStream
from .sources import Source, open_rows, previewed
from .text import text_completion_dataset
from .transforms import EncodedRow, Example, make_example, truncate

__all__ = [
    "Batch",
    "Conversation",
    "ConversationEncoder",
    "ConversationOptions",
    "Dataset",
    "DatasetStats",
    "EncodedRow",
    "Example",
    "Loader",
    "LoaderState",
    "MapDataset",
    "Message",
    "MixedDataset",
    "MixedStream",
    "PackedDataset",
    "PackedStream",
    "Report",
    "RowStream",
    "Source",
    "StreamDataset",
    "TeacherExample",
    "TokenizedDataset",
    "TokenizerPair",
    "TrainingOptions",
    "alpaca_cleaned_dataset",
    "alpaca_dataset",
    "alpaca_prompt",
    "answers_dataset",
    "batches",
    "chat_dataset",
    "collate",
    "dataset_nodes",
    "first_row_problems",
    "instruct_dataset",
    "load_dataset",
    "make_example",
    "mixed_dataset",
    "open_rows",
    "pack_examples",
    "parse_conversation",
    "previewed",
    "prompts_dataset",
    "quickstart_dataset",
    "read_problems",
    "text_completion_dataset",
    "truncate",
]
