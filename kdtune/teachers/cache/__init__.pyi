from .capture import Source, capture_headers, capture_shards, start_capture
from .checks import checked_dataset
from .encode import decode, encode
from .forecast import Amount, amount_of, cache_bytes, capture_seconds
from .format import INDEX, Cache, begin, finish, write_head, write_shard
from .header import Header
from .kinds import KINDS, Column, Kind, bytes_per_token, columns, size_text
from .quality import QUALITY, described, measure_quality
from .server_rows import import_rows, server_header
from .shard import Row, Shard

__all__ = [
    "INDEX",
    "KINDS",
    "QUALITY",
    "Amount",
    "Cache",
    "Column",
    "Header",
    "Kind",
    "Row",
    "Shard",
    "Source",
    "amount_of",
    "begin",
    "bytes_per_token",
    "cache_bytes",
    "capture_headers",
    "capture_seconds",
    "capture_shards",
    "checked_dataset",
    "columns",
    "decode",
    "described",
    "encode",
    "finish",
    "import_rows",
    "measure_quality",
    "server_header",
    "size_text",
    "start_capture",
    "write_head",
    "write_shard",
]
