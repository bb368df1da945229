import math

import pytest
import torch

from kdtune import training
from kdtune.errors import ConfigError


def lr_of_steps(schedule, num_steps=None, lr=2.0, **arguments):
    """The learning rate that each optimizer step really uses."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, **arguments)
    used = []
    for _ in range(num_steps or arguments["num_training_steps"]):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


WARMUP = [2.0 * (k + 1) / 4 for k in range(4)]


@pytest.mark.parametrize(
    ("schedule", "arguments", "after"),
    [
        ("cosine", {}, lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        ("cosine", {"num_cycles": 1.5}, lambda t: 0.5 * (1 + math.cos(3 * math.pi * t))),
        ("cosine", {"min_lr_ratio": 0.1}, lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * t))),
        ("linear", {}, lambda t: 1 - t),
        ("linear", {"min_lr_ratio": 0.2}, lambda t: 1 - 0.8 * t),
        ("constant", {}, lambda t: 1.0),
        ("exponential", {}, lambda t: 10 ** (-2 * t)),
        ("exponential", {"min_lr_ratio": 0.1}, lambda t: 10**-t),
    ],
)
def test_warmup_then_the_closed_formula(schedule, arguments, after):
    function = getattr(training, f"get_{schedule}_schedule_with_warmup")
    used = lr_of_steps(function, num_warmup_steps=4, num_training_steps=14, **arguments)
    expected = WARMUP + [2.0 * after((k - 4) / 10) for k in range(4, 14)]
    assert used == pytest.approx(expected, rel=1e-12)


def test_the_first_and_the_last_step_move():
    for name in ("cosine", "linear", "exponential"):
        used = lr_of_steps(
            getattr(training, f"get_{name}_schedule_with_warmup"), num_warmup_steps=3, num_training_steps=9
        )
        assert min(used) > 0.0
        assert max(used) == used[2] == used[3] == 2.0


def test_no_warmup_starts_at_the_full_rate():
    used = lr_of_steps(training.get_cosine_schedule_with_warmup, num_warmup_steps=0, num_training_steps=4)
    assert used == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


def test_inverse_sqrt():
    function = training.get_inverse_sqrt_schedule_with_warmup
    assert lr_of_steps(function, num_warmup_steps=4, num_training_steps=16)[3::12] == [2.0, 1.0]
    assert lr_of_steps(function, num_warmup_steps=4, num_training_steps=16)[:4] == WARMUP
    assert lr_of_steps(function, num_warmup_steps=0, num_training_steps=9)[::8] == pytest.approx([2.0, 2 / 3])


@pytest.mark.parametrize(
    ("decay", "shape"),
    [
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        ("sqrt", lambda t: 1 - math.sqrt(t)),
    ],
)
def test_wsd_is_flat_between_warmup_and_decay(decay, shape):
    used = lr_of_steps(
        training.get_wsd_schedule, num_warmup_steps=4, num_training_steps=14, num_decay_steps=5, decay=decay
    )
    assert used == pytest.approx(WARMUP + [2.0] * 5 + [2.0 * shape(j / 5) for j in range(5)])


def test_a_step_past_the_end_stays_at_the_end():
    used = lr_of_steps(training.get_linear_schedule_with_warmup, num_steps=12, num_warmup_steps=0, num_training_steps=8)
    assert used[8:] == [0.0] * 4


def test_every_parameter_group_keeps_its_own_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 10.0}])
    training.get_linear_schedule_with_warmup(optimizer, 4, 8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 2.5]


def test_resuming_by_state_dict_continues_the_curve():
    arguments = {"num_warmup_steps": 3, "num_training_steps": 10}
    whole = lr_of_steps(training.get_cosine_schedule_with_warmup, **arguments)

    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, training.get_cosine_schedule_with_warmup(optimizer, **arguments)

    optimizer, scheduler = build()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    states = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = build()
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    rest = []
    for _ in range(6):
        rest.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rest == whole[4:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_warmup_steps": 11, "num_training_steps": 10}, "num_warmup_steps=11: longer than the 10 training steps"),
        ({"num_warmup_steps": -1, "num_training_steps": 10}, "num_warmup_steps=-1: must be 0 or more"),
        ({"num_warmup_steps": 0, "num_training_steps": 0}, "0 training steps; at least 1"),
        ({"num_warmup_steps": 0, "num_training_steps": 5, "min_lr_ratio": 2.0}, "min_lr_ratio=2.0: must be between"),
    ],
)
def test_errors_name_the_key(arguments, message):
    with pytest.raises(ConfigError, match=message):
        lr_of_steps(training.get_cosine_schedule_with_warmup, **arguments)


def test_wsd_errors():
    arguments = {"num_warmup_steps": 6, "num_training_steps": 10}
    with pytest.raises(ConfigError, match=r"num_decay_steps=5: must be between 0 and the 10 training steps less the 6"):
        lr_of_steps(training.get_wsd_schedule, num_decay_steps=5, **arguments)
    with pytest.raises(ConfigError, match="decay='cubic': unknown; use one of linear, cosine, sqrt"):
        lr_of_steps(training.get_wsd_schedule, num_decay_steps=1, decay="cubic", **arguments)


def test_exponential_refuses_zero():
    with pytest.raises(ConfigError, match=r"min_lr_ratio=0\.0: an exponential fall ends above 0"):
        lr_of_steps(
            training.get_exponential_schedule_with_warmup, num_warmup_steps=0, num_training_steps=2, min_lr_ratio=0.0
        )
