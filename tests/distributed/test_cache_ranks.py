"""Several processes write the teacher cache that one writes, byte for byte, whether each holds the teacher or a part of it."""

from pathlib import Path

import pytest

from kdtune.teachers.cache import Cache
from recipes import cache_teacher  # noqa: F401  here, so that not every forked process imports it

CAPTURE = [
    "run",
    "cache_teacher",
    "--config",
    "tiny/cache_teacher",
    "max_examples=14",
    "examples_per_shard=2",
    "quality_examples=4",
]
SHARDED = ["parallelism.dp_shard=-1", "parallelism.dp_replicate=1"]


def files(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.name not in ("run.json", "config.yaml", ".lock")
    }


MORE = pytest.mark.slow("five processes for each kind, which differ in nothing but what they keep of hidden states")


@pytest.mark.parametrize("kind", ["hidden", *(pytest.param(kind, marks=MORE) for kind in ("topk", "sampled", "path"))])
def test_two_processes_write_what_one_writes(launch, tmp_path: Path, kind: str) -> None:
    """Two, and two with a part of the teacher each; the second pair goes on with a half that one process has written."""
    runs = {"one": (1, []), "two": (2, []), "parts": (2, SHARDED)}
    for name, (ranks, layout) in runs.items():
        folder = tmp_path / name
        if name == "parts":
            folder.mkdir()
            for part in ("header.json", "shard-00000.safetensors", "shard-00004.safetensors"):
                (folder / part).write_bytes((tmp_path / "one" / part).read_bytes())
        ended = launch.kdtune(*CAPTURE, *layout, f"kind={kind}", f"output_dir={folder}", ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, "\n".join(rank.text for rank in ended)
        assert not any(rank.text for rank in ended[1:]), ended[1].text
        assert files(folder) == files(tmp_path / "one"), name
    assert Cache(tmp_path / "two").header.num_shards == 7


@pytest.mark.slow(
    "two processes for what the test above shows of a teacher in parts, and the recipe's test of a dry run"
)
def test_a_dry_run_of_a_teacher_in_parts(launch, tmp_path: Path) -> None:
    ended = launch.kdtune(*CAPTURE, *SHARDED, "dry_run=true", f"output_dir={tmp_path / 'none'}", ranks=2)
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.text for rank in ended)
    assert "time on 2 processes" in ended[0].text and not (tmp_path / "none").exists()
