"""Who writes the text of a step: tables of draws and sources."""

import pytest

from kdtune.errors import ConfigError
from kdtune.rollouts import DistiLLMSchedule, Pairs, Share


def test_constant_shares() -> None:
    policy = Share(student=0.5, teacher=0.25)
    assert policy.sources == {"student", "teacher", "dataset"}
    assert [policy.source(draw, 0.9, is_full=True) for draw in (0.0, 0.499, 0.5, 0.749, 0.75, 0.999)] == [
        "student", "student", "teacher", "teacher", "dataset", "dataset",
    ]  # fmt: skip
    assert Share(student=1.0).sources == {"student"}
    assert policy.state_dict() == {}


def test_earlier_texts_have_a_share() -> None:
    policy = Share(mixed=0.25, replay=0.5)
    assert policy.sources == {"mixed", "replay", "dataset"}
    assert [policy.source(draw, 0.0, is_full=False) for draw in (0.24, 0.25, 0.74, 0.75)] == [
        "mixed", "replay", "replay", "dataset",
    ]  # fmt: skip


def test_weights_of_pairs() -> None:
    """Constant, or as published: from 1 to 1.5 over half of the training."""
    policy = Pairs()
    assert policy.sources == {"teacher", "student"}
    assert policy.source(0.9, 0.0, is_full=False) == ("teacher", "student")
    assert policy.weights(0.3) == {"teacher": 1.0, "student": 1.0}
    rising = Pairs("dataset", final_weight=1.5)
    assert rising.sources == {"dataset", "student"}
    assert [rising.weights(progress)["student"] for progress in (0.0, 0.25, 0.5, 0.9)] == [1.0, 1.25, 1.5, 1.5]
    assert all(sum(rising.weights(progress).values()) == 2.0 for progress in (0.0, 0.1, 0.4, 0.99))
    with pytest.raises(ConfigError, match="student_weight=2.0"):
        Pairs(student_weight=2.0)
    with pytest.raises(ConfigError, match="final_weight=0"):
        Pairs(final_weight=0.0)
    with pytest.raises(ConfigError, match="beside=mixed: must be teacher or dataset"):
        Pairs("mixed")


@pytest.mark.parametrize("shares", [(0.0, 0.0), (-0.1, 0.5), (0.7, 0.4), (0.0, 0.0, 0.0, 0.0, 0.5)])
def test_shares_out_of_range_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="student="):
        Share(*shares)


@pytest.mark.parametrize(
    ("replay", "table"),
    [
        # (draw, progress, is_full) -> source, with phi = 0.4
        ("decreasing", [(0.39, 0.0, True, "student"), (0.21, 0.5, True, "replay"), (0.19, 0.5, True, "student"),
                        (0.21, 0.5, False, "student"), (0.4, 0.0, True, "dataset"), (0.4, 0.0, False, "dataset")]),
        ("constant", [(0.19, 0.9, True, "student"), (0.21, 0.9, True, "replay"), (0.39, 0.9, False, "student")]),
        ("increasing", [(0.01, 0.0, True, "replay"), (0.19, 0.5, True, "student"), (0.39, 0.5, True, "replay")]),
    ],
)  # fmt: skip
def test_sources_of_distillm(replay: str, table: list[tuple[float, float, bool, str]]) -> None:
    policy = DistiLLMSchedule(0.4, replay=replay)
    for draw, progress, is_full, source in table:
        assert policy.source(draw, progress, is_full=is_full) == source, (draw, progress, is_full)


def phis(policy: DistiLLMSchedule, losses: list[float]) -> list[float]:
    found = []
    for loss in losses:
        policy.after_validation({"val_class_loss": loss})
        found.append(round(policy.phi, 6))
    return found


def test_phi_rises_as_published_and_as_described() -> None:
    losses = [3.0, 2.0, 2.2, 2.0, 2.05, 2.16, 3.1, 3.15, 3.2]
    # As published it is compared with the loss at the last rise, first that before training.
    assert phis(DistiLLMSchedule(), losses) == [0, 0, 0, 0, 0, 0, 0.1, 0.1, 0.2]
    # With the validation before: 2.0 -> 2.2, 2.05 -> 2.16, 2.16 -> 3.1; 0.05 is too little.
    assert phis(DistiLLMSchedule(compare_with="previous"), losses) == [0, 0, 0.1, 0.1, 0.1, 0.2, 0.3, 0.3, 0.3]


def test_phi_ends_at_one_and_needs_its_metric() -> None:
    policy = DistiLLMSchedule(0.95, compare_with="previous")
    assert phis(policy, [1.0, 2.0, 3.0]) == [0.95, 1.0, 1.0]
    with pytest.raises(ConfigError, match="metric=val_class_loss: the validation has val_kd_loss"):
        policy.after_validation({"val_kd_loss": 9.0})
    assert policy.state_dict() == {"phi": 1.0, "before": 3.0}


def test_a_restored_schedule_goes_on_alike() -> None:
    losses = [3.0, 3.2, 3.1, 3.4, 3.6, 3.65, 3.9]
    whole, first, second = (DistiLLMSchedule(compare_with="previous") for _ in range(3))
    expected = phis(whole, losses)
    assert phis(first, losses[:3]) == expected[:3]
    second.load_state_dict(first.state_dict())
    assert phis(second, losses[3:]) == expected[3:]


@pytest.mark.parametrize("arguments", [{"start": 1.1}, {"step": 0.0}, {"threshold": -0.1}])
def test_numbers_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="start="):
        DistiLLMSchedule(**arguments)
