"""The steps of the prepared form against their definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctx_distill.data.transforms.rounding import STEPS, from_steps, to_steps


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
def test_the_nearest_step_and_back(ends: tuple[float, float]) -> None:
    low, high = ends
    x = np.linspace(low, high, 1001).astype(np.float32)
    middle, step = (low + high) / 2, (high - low) / 2 / STEPS
    steps = to_steps(torch.from_numpy(x), ends)
    assert steps.dtype == torch.int16
    assert np.abs(steps.numpy() - (x.astype(np.float64) - middle) / step).max() <= 0.5 + 2e-3
    back = from_steps(steps, ends).numpy()
    np.testing.assert_allclose(back, steps.numpy().astype(np.float64) * step + middle, atol=4e-7 * max(map(abs, ends)))
    assert (int(steps[0]), int(steps[-1])) == (-STEPS, STEPS)


def test_rounding_twice_changes_nothing_and_a_batch_is_made_in_place() -> None:
    ends = (-1.0, 1.0)
    once = from_steps(to_steps(torch.rand(3, 5, 7) * 2 - 1, ends), ends)
    assert torch.equal(from_steps(to_steps(once, ends), ends), once)
    out = torch.empty(2, 3, 5, 7)
    from_steps(to_steps(once, ends), ends, out[1])
    assert torch.equal(out[1], once)
