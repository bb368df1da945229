"""The presets are divergences that a config's kd_loss takes, with the published defaults."""

import pytest
import torch

from kdtune import losses
from kdtune.config import instantiate
from kdtune.losses import presets

LOGP = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "settings", "same"),
    [
        ("torchtune", {}, losses.ForwardKL()),
        ("gkd", {}, losses.JensenShannon(0.5)),
        ("gkd", {"beta": 0.1}, losses.JensenShannon(0.1)),
        ("distillm", {}, losses.SkewReverseKL(0.1)),
        ("distillm", {"direction": "forward", "alpha": 0.2}, losses.SkewForwardKL(0.2)),
        ("akl", {}, losses.AdaptiveKL(0.5)),
        ("minillm", {}, losses.ReverseKL()),
        ("distillm2", {}, losses.BySource(losses.SkewForwardKL(0.1), losses.SkewReverseKL(0.1, detach_mixture=True))),
        ("csd", {}, losses.ConcreteScore(("teacher", "student"))),
        ("hard", {}, losses.ArgMaxCrossEntropy()),
    ],
)
def test_presets(name: str, settings: dict[str, object], same: losses.Divergence) -> None:
    found = instantiate({"_component_": f"kdtune.losses.presets.{name}", **settings})
    losses.check_divergence(found)
    assert losses.divergence_name(found) == losses.divergence_name(same)
    assert torch.equal(found(*LOGP), same(*LOGP))
    if isinstance(found, losses.BySource):
        for ours, theirs in zip(
            losses.value_and_gradient(found.parts[1], *LOGP),
            losses.value_and_gradient(same.parts[1], *LOGP),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_presets_for_another_tokenizer() -> None:
    assert isinstance(presets.uld(), losses.ULD)
    found = presets.alm(temperature=50.0)
    assert isinstance(found, losses.ALM) and (found.temperature, found.scale_by_temperature) == (50.0, True)
    assert found.debias_threshold == 0.1 and presets.alm(debias_threshold=None).debias_threshold is None
