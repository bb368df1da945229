from dataclasses import replace

import pytest

from kdtune.distributed import Parallelism, mesh_problems, parallelism_problems
from kdtune.errors import ConfigError
from kdtune.models import llama
from kdtune.parallel.mesh import tensor_parallel_problem


@pytest.mark.parametrize(
    ("given", "processes", "expected"),
    [
        ((1, -1), 1, (1, 1, 1)),
        ((1, -1), 8, (1, 8, 1)),
        ((-1, 1), 8, (8, 1, 1)),
        ((2, -1), 8, (2, 4, 1)),
        ((-1, 4), 8, (2, 4, 1)),
        ((2, 4), 8, (2, 4, 1)),
        ((1, -1, 2), 8, (1, 4, 2)),
        ((2, 1, -1), 8, (2, 1, 4)),
        ((2, 2, 2), 8, (2, 2, 2)),
    ],
)
def test_sizes(given: tuple[int, ...], processes: int, expected: tuple[int, int, int]) -> None:
    assert tuple(Parallelism(*given).sizes(processes).values()) == expected


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        ((3, -1), 8, "dp_replicate=3 dp_shard=-1 tp=1: needs a multiple of 3 processes, found 8"),
        ((2, 2), 8, "dp_replicate=2 dp_shard=2 tp=1: needs 4 processes, found 8"),
        ((1, 2), 1, "needs 2 processes, found 1; start as many (kdtune run --nproc_per_node N"),
        ((-1, -1), 8, "only one of them may be -1"),
        ((1, 0), 8, "dp_shard=0: must be at least 1, or -1 for the rest"),
        ((1, -1, 3), 8, "tp=3: needs a multiple of 3 processes, found 8"),
    ],
)
def test_sizes_that_do_not_fit(given: tuple[int, ...], processes: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Parallelism(*given).sizes(processes)
    assert message in str(error.value)


def test_the_advice_is_that_of_the_command() -> None:
    (problem,) = mesh_problems(Parallelism(tp=3), None, 2, advice="give another --world-size")
    assert problem.endswith("needs a multiple of 3 processes, found 2; give another --world-size or change the sizes")


def test_problems_are_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert parallelism_problems(Parallelism()) == []
    (problem,) = parallelism_problems(None)
    assert problem.startswith("parallelism=null: kdtune.distributed.Parallelism expected")
    (problem,) = parallelism_problems(Parallelism(), Parallelism(dp_shard=4))
    assert problem.startswith("teacher_parallelism: dp_replicate=1 dp_shard=4 tp=1: needs 4 processes, found 6")
    (problem,) = parallelism_problems(Parallelism(param_dtype="bf16"))
    assert problem == "parallelism: param_dtype=bf16: used under torchrun only (kdtune run --nproc_per_node N)"
    monkeypatch.setenv("RANK", "0")
    assert parallelism_problems(Parallelism(param_dtype="bf16")) == []
    assert parallelism_problems(Parallelism(timeout_minutes=0.0)) == [
        "parallelism: timeout_minutes=0.0: must be above 0"
    ]


def test_a_teacher_is_cut_as_the_student_is_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parallelism_problems(Parallelism(tp=2), Parallelism()) == []
    for name, value in (("reduce_dtype", "fp32"), ("timeout_minutes", 5)):
        (problem,) = parallelism_problems(Parallelism(), Parallelism(**{name: value}))
        assert f"teacher_parallelism.{name}={value}" in problem and "not used" in problem
    assert parallelism_problems(Parallelism(tp=2), Parallelism(tp=-1, dp_shard=2)) == []
    (problem,) = parallelism_problems(Parallelism(tp=2), Parallelism(tp=4))
    assert problem.startswith("teacher_parallelism.tp=4:") and "parallelism.tp=2" in problem


def test_sizes_of_a_model_that_tensor_parallelism_does_not_divide() -> None:
    model = llama(vocab_size=321, embed_dim=32, num_layers=1, num_heads=8, num_kv_heads=4, intermediate_dim=64, max_seq_len=64,
                  tie_embeddings=True)  # fmt: skip
    assert tensor_parallel_problem(model.config, 1) is None
    assert tensor_parallel_problem(model.config, 2) == "tp=2 does not divide vocab_size=321; allowed for this model: 1"
    wider = replace(model.config, vocab_size=320)
    assert tensor_parallel_problem(wider, 2) is tensor_parallel_problem(wider, 4) is None
    assert tensor_parallel_problem(wider, 3) == (
        "tp=3 does not divide num_kv_heads=4, num_heads=8, intermediate_dim=64, vocab_size=320; allowed for this model: 1, 2, 4"
    )
