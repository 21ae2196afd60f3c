"""Ridge least squares of a projection from moments."""

import pytest
import torch

from uptrain.conversion.refit import refit_projection


def problem(tokens=200, inputs=6, outputs=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, inputs, generator=draw, dtype=torch.float64)
    target = torch.randn(tokens, outputs, generator=draw, dtype=torch.float64)
    target += features @ torch.randn(inputs, outputs, generator=draw, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
    return weight, features, target


def refit(weight, features, target, **options):
    return refit_projection(
        weight, features.T @ features, features.T @ target, float(target.square().sum()), **options
    )


def test_without_a_ridge_it_is_least_squares():
    weight, features, target = problem()
    fitted = refit(weight, features, target, ridge=0.0)
    expected = torch.linalg.lstsq(features, target).solution.T
    torch.testing.assert_close(fitted.weight, expected)


def test_the_ridge_pulls_towards_the_present_weight():
    weight, features, target = problem()
    gram = features.T @ features
    penalty = 0.1 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(gram + penalty, features.T @ target + penalty @ weight.T).T
    torch.testing.assert_close(refit(weight, features, target, ridge=0.1).weight, expected)
    stiff = refit(weight, features, target, ridge=1e12).weight
    torch.testing.assert_close(stiff, weight)


def test_the_errors_are_those_of_the_tokens():
    weight, features, target = problem()
    fitted = refit(weight, features, target)
    energy = target.square().sum()
    before = (target - features @ weight.T).square().sum() / energy
    after = (target - features @ fitted.weight.T).square().sum() / energy
    assert fitted.error_before == pytest.approx(float(before))
    assert fitted.error_after == pytest.approx(float(after))
    assert fitted.error_after < fitted.error_before


def test_a_bias_is_one_more_column():
    weight, features, target = problem()
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    fitted = refit(weight, torch.cat((features[:, :-1], ones), 1), target + 3, ridge=0.0)
    assert fitted.error_after < fitted.error_before
    constant = refit(torch.zeros(4, 1, dtype=torch.float64), ones, target, ridge=0.0)
    torch.testing.assert_close(constant.weight[:, 0], target.mean(0))


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_directions_without_tokens_keep_their_weights(ridge):
    weight, features, target = problem(tokens=3, inputs=8)
    fitted = refit(weight, features, target, ridge=ridge)
    unseen = torch.linalg.svd(features).Vh[3:]
    torch.testing.assert_close(fitted.weight @ unseen.T, weight @ unseen.T)
    assert fitted.error_after <= fitted.error_before
    if ridge == 0:
        assert fitted.error_after == pytest.approx(0, abs=1e-12)


def test_a_constant_input_and_no_input_at_all():
    weight, features, target = problem()
    features[:, 2] = 1.0
    assert torch.isfinite(refit(weight, features, target, ridge=0.0).weight).all()
    fitted = refit(weight, features * 0, target)
    torch.testing.assert_close(fitted.weight, weight)
    assert fitted.error_after == pytest.approx(1)
    assert refit(weight, features * 0, target * 0).error_after == 0


def test_a_perfect_projection_stays():
    weight, features, _ = problem()
    fitted = refit(weight, features, features @ weight.T)
    torch.testing.assert_close(fitted.weight, weight)
    assert fitted.error_before == pytest.approx(0, abs=1e-12)


def test_wrong_shapes_and_nan_are_refused():
    weight, features, target = problem()
    gram, cross = features.T @ features, features.T @ target
    with pytest.raises(ValueError, match=r"moments \[6, 6\] and \[4, 6\] do not belong"):
        refit_projection(weight, gram, cross.T, 1.0)
    with pytest.raises(ValueError, match="cross holds NaN or Inf"):
        refit_projection(weight, gram, cross * float("nan"), 1.0)
