from .format import Cache, Row, Shard, begin, finish, write_head, write_shard
from .header import Header
from .kinds import KINDS, Column, Kind, bytes_per_token, columns

__all__ = [
    "KINDS",
    "Cache",
    "Column",
    "Header",
    "Kind",
    "Row",
    "Shard",
    "begin",
    "bytes_per_token",
    "columns",
    "finish",
    "write_head",
    "write_shard",
]
