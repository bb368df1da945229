"""docs/models.md has every size and every family."""

import re
from pathlib import Path

import pytest

from kdtune.models import FAMILIES, Family

DOCS = (Path(__file__).parents[3] / "docs/models.md").read_text()


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_every_size_is_documented(family: Family) -> None:
    assert f"| `{family.model_type}` |" in DOCS
    for name, (title, config) in family.sizes.items():
        window = next((f"{window:,}" for window in config.windows if window), "")
        tied = "yes" if config.tie_embeddings else "no"
        assert (
            f"| `{name}` | {title} | {config.num_parameters:,} | {tied} | {config.max_seq_len:,} | {window} |" in DOCS
        )


def test_no_other_size_is_documented() -> None:
    sizes = {name for family in FAMILIES for name in family.sizes}
    assert set(re.findall(r"^\| `(\w+)` \| [A-Z]", DOCS, flags=re.M)) == sizes
