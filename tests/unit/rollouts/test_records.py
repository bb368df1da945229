"""Rollouts, their buffer and their guards, without a model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdtune.constants import IGNORE_INDEX
from kdtune.data import Batch, collate, make_example
from kdtune.errors import ConfigError, TrainingError
from kdtune.rollouts import Buffer, Guards, PolicyGradient, Rollout
from kdtune.rollouts.policy_gradient import importance_weights
from kdtune.rollouts.record import prompts_of, random_seed
from kdtune.rollouts.watch import describe, watched, watched_means, watched_targets


def rollout(answer: list[int], step: int = 0, key: int = 0, **more: object) -> Rollout:
    return Rollout(np.array([1, 2, 3, *answer]), 3, bool(answer) and answer[-1] == 9, "student", step, key, **more)


def test_every_token_of_the_answer_is_a_target_and_nothing_else() -> None:
    example = rollout([4, 5, 9]).example()
    assert example.tokens.tolist() == [1, 2, 3, 4, 5, 9]
    # The end that the model wrote is learned, at the position before it.
    assert example.labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, 4, 5, 9, IGNORE_INDEX]
    # A text that was cut has no end, and none is made up.
    assert rollout([4, 5]).example().labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, 4, 5, IGNORE_INDEX]
    # An answer of one token is learned, from the prompt's last position.
    assert rollout([9]).example().labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, 9, IGNORE_INDEX]


@pytest.mark.parametrize("padding_free", [False, True])
def test_prompts_are_what_comes_before_the_first_target(padding_free: bool) -> None:
    examples = [make_example([5, 6, 7, 8], [False, False, True, True]), make_example([7, 8, 9], [False, True, True])]
    batch = collate(examples, 0, padding_free=padding_free)
    (first, second) = prompts_of(batch)
    assert (first.ids, second.ids) == ((5, 6), (7,))
    assert first.key == random_seed(5, 6)  # a stream has no numbers
    empty = Batch.from_labels(torch.zeros((1, 1), dtype=torch.int64), torch.full((1, 1), IGNORE_INDEX), (0,))
    assert not list(prompts_of(empty))


def test_seeds_differ_and_fit_a_generator() -> None:
    seeds = {random_seed(seed, epoch, key) for seed in range(3) for epoch in range(3) for key in range(50)}
    assert len(seeds) == 450
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_the_newest_are_kept_and_the_stale_ones_dropped() -> None:
    buffer = Buffer(4, max_staleness=3)
    buffer.push([rollout([9], step, key=step) for step in range(3)])
    assert not buffer.is_full
    buffer.push([rollout([9], step, key=step) for step in range(3, 6)])
    assert buffer.is_full
    assert [one.key for one in buffer.rollouts] == [2, 3, 4, 5]
    buffer.drop_stale(7)
    assert [one.key for one in buffer.rollouts] == [4, 5]
    empty = Buffer(0)
    empty.push([rollout([9])])
    assert empty.rollouts == []


def test_draws_are_uniform_without_replacement_and_depend_on_the_seed_alone() -> None:
    buffer = Buffer(10)
    buffer.push([rollout([9], key=key) for key in range(5)])
    drawn = [tuple(one.key for one in buffer.draw(3, seed)) for seed in range(2000)]
    assert drawn == [tuple(one.key for one in buffer.draw(3, seed)) for seed in range(2000)]
    assert all(len(set(keys)) == 3 for keys in drawn)
    counts = np.bincount([key for keys in drawn for key in keys], minlength=5)
    assert np.abs(counts / 6000 - 0.2).max() < 4 * (0.2 * 0.8 / 6000) ** 0.5
    assert len(buffer.draw(9, 0)) == 5


@pytest.mark.parametrize("targets", [False, True])
def test_a_buffer_comes_back_from_its_state(targets: bool) -> None:
    buffer, other = Buffer(8), Buffer(8)
    for step, answer in enumerate(([4, 5, 9], [7], [6, 6])):
        more = {"target": torch.randn(len(answer), 4, dtype=torch.bfloat16)} if targets else {}
        log_probs = np.linspace(-1, -2, len(answer), dtype=np.float32)
        buffer.push(
            [
                rollout(
                    answer,
                    step,
                    2**62 + step,
                    route=f"r{step}",
                    log_probs=log_probs,
                    teacher_log_probs=2 * log_probs,
                    **more,
                )
            ]
        )
    other.load_state_dict(buffer.state_dict())
    for ours, theirs in zip(buffer.rollouts, other.rollouts, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.log_probs.tolist() == theirs.log_probs.tolist()
        assert ours.teacher_log_probs.tolist() == theirs.teacher_log_probs.tolist()
        for name in ("prompt_length", "is_finished", "source", "step", "key", "route"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert (theirs.target is not None) == targets
        if targets:
            assert torch.equal(ours.target, theirs.target)
    empty = Buffer(8)
    empty.push([rollout([9])])
    empty.load_state_dict(Buffer(8).state_dict())
    assert empty.rollouts == []


@pytest.mark.parametrize("arguments", [(-1, None), (5, -1)])
def test_buffers_out_of_range_are_refused(arguments: tuple[int, int | None]) -> None:
    with pytest.raises(ConfigError, match="buffer_size="):
        Buffer(*arguments)


def test_what_is_logged_of_rollouts() -> None:
    found = describe(
        [
            rollout([4, 5, 6, 7, 9], step=3, log_probs=np.array([-1.0, -1, -1, -1, -1], dtype=np.float32)),
            rollout([4, 4, 4, 4, 4, 4, 4], step=5, log_probs=np.array([-2.0] * 7, dtype=np.float32)),
        ],
        step=6,
    )
    assert found["rollout_tokens"] == 6
    assert found["rollout_cut_share"] == 0.5
    assert found["rollout_staleness"] == 2
    assert found["rollout_entropy"] == pytest.approx(19 / 12)
    # Four sequences of four equal tokens: three have been there before; of the other text, none.
    assert found["rollout_repetition"] == pytest.approx((0 + 3 / 4) / 2)


def test_which_tokens_are_watched_depends_on_the_texts_alone() -> None:
    rollouts = [rollout([4] * length) for length in (3, 50, 1, 30, 40, 6)]
    (all_at_once,) = watched_targets(rollouts, [range(6)])
    assert all_at_once.tolist() == [index * 130 // 64 for index in range(64)]
    starts = np.cumsum([0, *(one.answer_length for one in rollouts)])
    for parts in ([[0], [1], [2], [3], [4], [5]], [[0, 4], [2, 1], [], [3, 5]]):
        found = watched_targets(rollouts, parts)
        tokens = [[at for index in part for at in range(starts[index], starts[index + 1])] for part in parts]
        assert (
            sorted(own[i] for own, one in zip(tokens, found, strict=True) for i in one.tolist()) == all_at_once.tolist()
        )
        assert all(one.dtype == torch.int64 for one in found)
    assert watched_targets(rollouts[:1], [[0], []])[0].tolist() == [0, 1, 2]  # a step of fewer tokens: all of them
    # Beside a teacher's text the student's alone.
    of_teacher = replace(rollouts[1], source="teacher")
    assert watched([of_teacher, *rollouts[:1]]) == rollouts[:1] and watched([of_teacher]) == [of_teacher]
    beside = watched_targets([of_teacher, rollouts[0], of_teacher], [[0, 2], [1], []])
    assert [one if one is None else one.tolist() for one in beside] == [None, [0, 1, 2], []]


@pytest.mark.parametrize(("num_tokens", "num_watched"), [(130, 64), (10, 10)])
def test_means_of_watched_tokens(num_tokens: int, num_watched: int) -> None:
    # The loss adds up 0.25 at each watched token, and the step's row has that sum by token of the step.
    row = {"loss": 2.0, "num_valid_tokens": num_tokens, "log_ratio": 0.5, "overlap": 0.25 * num_watched / num_tokens}
    assert watched_means(row, num_tokens) == {"loss": 2.0, "num_valid_tokens": num_tokens, "rollout_log_ratio": 0.5,
                                  "rollout_overlap": pytest.approx(0.25)}  # fmt: skip
    assert watched_means({"loss": 2.0, "num_valid_tokens": 9}, 9) == {"loss": 2.0, "num_valid_tokens": 9}
    # As many tokens of other text, which is not watched, halve the sums by token.
    row |= {"num_valid_tokens": 2 * num_tokens, "log_ratio": 0.25, "overlap": 0.25 * num_watched / (2 * num_tokens)}
    found = watched_means(row, num_tokens)
    assert (found["rollout_log_ratio"], found["rollout_overlap"]) == (0.5, pytest.approx(0.25))


def test_guards_stop_after_so_many_steps_in_a_row() -> None:
    guards = Guards(max_cut_share=0.5, min_entropy=0.1, patience=3)
    fine, cut, flat = (
        {"rollout_cut_share": share, "rollout_entropy": entropy} for share, entropy in ((0.5, 0.1), (0.6, 1), (0, 0.09))
    )
    for metrics in (cut, cut, fine, cut, cut):
        guards.check(metrics, is_drawn=True)
    restored = Guards(max_cut_share=0.5, min_entropy=0.1, patience=3)
    restored.load_state_dict(guards.state_dict())
    with pytest.raises(TrainingError, match=r"60% of the texts were cut by the limit.*rollouts\.max_new_tokens"):
        restored.check(cut, is_drawn=True)
    for _ in range(9):
        Guards(patience=1, max_cut_share=None, min_entropy=None).check(cut, is_drawn=True)
        guards.check(flat, is_drawn=False)  # the most likely token has no entropy to lose
    guards.check(flat, is_drawn=True)
    guards.check(flat, is_drawn=True)
    with pytest.raises(TrainingError, match=r"entropy of 0\.09 nats.*collapsed"):
        guards.check(flat, is_drawn=True)


def test_a_teacher_that_is_worse_than_none_is_refused() -> None:
    guards = Guards()
    guards.check_teacher({"val_teacher_class_loss": 6.9}, 1000)
    guards.check_teacher({"val_class_loss": 99.0}, 1000)
    with pytest.raises(TrainingError, match=r"7\.1 nats per token.*1000 ids is 6\.91.*check its weights"):
        guards.check_teacher({"val_teacher_class_loss": 7.1}, 1000)
    Guards(max_teacher_loss=None).check_teacher({"val_teacher_class_loss": 99.0}, 1000)


@pytest.mark.parametrize("arguments", [{"max_cut_share": -1.0}, {"min_entropy": -0.1}, {"patience": 0}])
def test_guards_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        Guards(**arguments)


def test_advantages_by_hand() -> None:
    def one(student: list[float], teacher: list[float]) -> Rollout:
        answer = list(range(4, 4 + len(student)))
        return rollout(
            answer, log_probs=np.array(student, dtype=np.float32), teacher_log_probs=np.array(teacher, dtype=np.float32)
        )

    rollouts = [one([-1.0, -2.0, -3.0], [-2.0, -1.0, -1.0]), one([-1.0], [-4.0])]
    # Rewards -1, 1, 2 and -3; of what comes after each token, discounted by a half: 1 + 2 / 2, 2, 0 and 0.
    plain = {"gamma": 0.5, "reward_scale": 1.0, "whitens": False}
    found = PolicyGradient(**plain, normalizes_length=False).advantages(rollouts)
    assert [each.tolist() for each in found] == [[2.0, 2.0, 0.0], [0.0]]
    # Two rewards come after the first token, one after the second.
    found = PolicyGradient(**plain).advantages(rollouts)
    assert [each.tolist() for each in found] == [[1.0, 2.0, 0.0], [0.0]]
    found = PolicyGradient(**plain, includes_current=True).advantages(rollouts)
    assert [each.tolist() for each in found] == [[pytest.approx((-1 + 0.5 * (1 + 0.5 * 2)) / 3), 1.0, 2.0], [-3.0]]
    found = PolicyGradient(
        gamma=0.5, reward_scale=0.5, reward_clip=1.5, whitens=False, normalizes_length=False
    ).advantages(rollouts)
    assert found[0].tolist() == [1.5 + 0.5 * 1.5, 1.5, 0.0]
    white = np.concatenate(PolicyGradient().advantages(rollouts))
    assert white.mean() == pytest.approx(0) and white.std() == pytest.approx(1)
    assert np.concatenate(PolicyGradient().advantages([one([-1.0], [-2.0])])).tolist() == [0.0]


def test_importance_weights_of_a_mixture() -> None:
    text = rollout(
        [4, 5],
        log_probs=np.log([0.5, 0.1]).astype(np.float32),
        teacher_log_probs=np.log([0.25, 0.4]).astype(np.float32),
    )
    assert importance_weights(text, 0.2).tolist() == pytest.approx(
        [0.5 / (0.8 * 0.5 + 0.2 * 0.25), 0.1 / (0.8 * 0.1 + 0.2 * 0.4)]
    )
    assert importance_weights(text, 0.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("clip", [0.2, None])
def test_a_later_pass_has_the_gradient_of_the_clipped_objective(clip: float | None) -> None:
    """min(rho A, clip(rho) A), by autograd in float64; with a ratio of 1, the advantage itself."""
    advantages, log_ratios = (
        np.array([1.0, 1.0, 1.0, -2.0, -2.0, -2.0, 0.0]),
        np.array([0.3, 0.1, -0.9, 0.3, -0.1, -0.9, 0.5]),
    )
    policy = PolicyGradient(ratio_clip=clip)
    log_q = torch.from_numpy(log_ratios).requires_grad_()
    ratio, of_token = log_q.exp(), torch.from_numpy(advantages)
    bounded = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
    torch.minimum(ratio * of_token, bounded * of_token).sum().backward()
    assert policy.replayed(advantages, log_ratios).tolist() == pytest.approx(log_q.grad.tolist(), rel=1e-12)
    assert policy.replayed(advantages, np.zeros(7)).tolist() == advantages.tolist()


@pytest.mark.parametrize(
    "arguments", [{"gamma": 1.1}, {"reward_scale": 0.0}, {"reward_clip": -1.0}, {"ratio_clip": 0.0}]
)
def test_policy_gradients_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="gamma="):
        PolicyGradient(**arguments)
