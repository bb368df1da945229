import pytest

from kdtune.distributed import Parallelism, parallelism_problems
from kdtune.errors import ConfigError

NODE = {"_component_": "kdtune.distributed.Parallelism"}


@pytest.mark.parametrize(
    ("replicate", "shard", "processes", "expected"),
    [
        (1, -1, 1, (1, 1)),
        (1, -1, 8, (1, 8)),
        (-1, 1, 8, (8, 1)),
        (2, -1, 8, (2, 4)),
        (-1, 4, 8, (2, 4)),
        (2, 4, 8, (2, 4)),
    ],
)
def test_sizes(replicate: int, shard: int, processes: int, expected: tuple[int, int]) -> None:
    assert Parallelism(replicate, shard).sizes(processes) == expected


@pytest.mark.parametrize(
    ("replicate", "shard", "processes", "message"),
    [
        (3, -1, 8, "dp_replicate=3 dp_shard=-1: needs a multiple of 3 processes, found 8"),
        (2, 2, 8, "dp_replicate=2 dp_shard=2: needs 4 processes, found 8"),
        (1, 2, 1, "needs 2 processes, found 1; start as many (kdtune run --nproc_per_node N"),
        (-1, -1, 8, "only one of them may be -1"),
        (1, 0, 8, "dp_shard=0: must be at least 1, or -1 for the rest"),
    ],
)
def test_sizes_that_do_not_fit(replicate: int, shard: int, processes: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Parallelism(replicate, shard).sizes(processes)
    assert message in str(error.value)


def test_problems_are_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert parallelism_problems(NODE) == []
    (problem,) = parallelism_problems(None)
    assert problem.startswith("parallelism=null: kdtune.distributed.Parallelism expected")
    (problem,) = parallelism_problems(NODE | {"dp_shard": 4}, "teacher_parallelism")
    assert problem.startswith("teacher_parallelism: dp_replicate=1 dp_shard=4: needs 4 processes, found 6")
    (problem,) = parallelism_problems(NODE | {"param_dtype": "bf16"})
    assert problem == "parallelism: param_dtype=bf16: used under torchrun only (kdtune run --nproc_per_node N)"
    monkeypatch.setenv("RANK", "0")
    assert parallelism_problems(NODE | {"param_dtype": "bf16"}) == []
    assert parallelism_problems(NODE | {"timeout_minutes": 0}) == ["parallelism: timeout_minutes=0.0: must be above 0"]
