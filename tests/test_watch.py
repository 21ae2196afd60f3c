"""What a log tells, on logs made for it."""

import pytest

from uptrain.training.watch import best_step, is_overfit, is_spike


def losses(*values):
    return [{"step": i, "loss": value} for i, value in enumerate(values, 1)]


def validations(*values):
    return [{"step": 10 * i, "validation_loss": value} for i, value in enumerate(values)]


def test_a_loss_far_above_the_recent_ones_is_a_spike():
    rows = losses(*[3.0, 3.1] * 10)  # median absolute deviation 0.05, so the limit is 3.55
    assert is_spike(rows, 3.56)
    assert not is_spike(rows, 3.54)
    assert not is_spike(rows, 1.0)


def test_what_was_long_ago_hides_no_spike():
    assert is_spike(losses(*[9.0] * 50, *[3.0, 3.1] * 25), 4.0)


def test_the_first_steps_are_no_measure():
    assert not is_spike(losses(*[3.0] * 9), 100.0)
    assert is_spike(losses(*[3.0] * 10), 100.0)


@pytest.mark.parametrize(("values", "step"), [((), None), ((3.0,), 0), ((3.0, 2.0, 2.0, 2.5), 10)])
def test_the_best_step_is_the_first_with_the_lowest_validation_loss(values, step):
    assert best_step(losses(1.0) + validations(*values)) == step


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((3.0, 2.0, 2.1, 2.2), False),
        ((3.0, 2.0, 2.1, 2.2, 2.3), True),
        ((3.0, 2.0, 2.1, 2.0, 2.2, 2.3), False),
        ((3.0, 2.0, 2.1, 2.2, 2.3, 2.4), False),  # said once
    ],
)
def test_an_overfit_is_said_at_the_third_rise(values, said):
    assert is_overfit(validations(*values)) == said
