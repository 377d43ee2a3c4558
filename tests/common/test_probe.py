"""Probes: they find a linear relation, on samples that were not fitted on, with an interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.probe import ProbeSplit, mean_baseline_errors, probe_errors, r2_ci

PARTS = ProbeSplit(np.arange(120), np.arange(120, 160), np.arange(160, 240))


def r2(inputs: torch.Tensor, target: torch.Tensor, **options: object) -> float:
    return r2_ci(probe_errors({"x": inputs}, target, PARTS, **options)["x"], mean_baseline_errors(target, PARTS))[0]


def test_a_linear_truth_is_found_and_noise_is_not() -> None:
    target = torch.randn(240, 2)
    assert r2(target @ torch.randn(2, 30) * 1e-3 + 7, target) > 0.99, "neither scale nor offset of an input matters"
    assert abs(r2(torch.randn(240, 30), target)) < 0.2


def test_wide_inputs_are_reduced_to_their_principal_components() -> None:
    target = torch.randn(240, 2)
    wide = target @ torch.randn(2, 300) + 0.1 * torch.randn(240, 300)
    assert r2(wide, target, columns=2) > 0.95
    buried = torch.cat([target, torch.randn(240, 1) @ torch.randn(1, 300)], dim=1)
    assert r2(buried, target) > 0.9 > 0.2 > r2(buried, target, columns=1), "one component holds the loud part only"


def test_a_column_that_is_constant_while_fitting_does_not_explode_on_the_test_part() -> None:
    target = torch.randn(240, 2)
    corner = 1e-6 * torch.randn(240, 20)
    corner[160:] = torch.randn(80, 20)
    assert r2(torch.cat([target, corner], dim=1), target, columns=22) > 0.9


def test_parts_that_share_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be fitted on"):
        probe_errors(
            {"x": torch.randn(240, 3)},
            torch.randn(240, 1),
            ProbeSplit(np.arange(121), np.arange(120, 160), np.arange(160, 240)),
        )


def test_dependent_samples_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    errors, scale = np.repeat(rng.uniform(0, 1, 20), 10), np.ones(200)
    groups = np.repeat(np.arange(20), 10).astype(str)
    alone, grouped = r2_ci(errors, scale), r2_ci(errors, scale, groups)
    assert alone[0] == pytest.approx(grouped[0]) and grouped[2] - grouped[1] > 2 * (alone[2] - alone[1])
