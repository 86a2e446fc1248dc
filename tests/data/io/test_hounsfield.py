"""Stored values to HU: exact, whatever the stored type, and in one more array at most."""

from __future__ import annotations

import numpy as np
import pytest

from ctx_distill.data.io.hounsfield import to_hounsfield


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "i1", "<u2", ">u2", "<i4", "<u4", "<i8", "<u8"])
@pytest.mark.parametrize("intercept", [-1024.0, -8192.0, 1000.0, -32768.0, 70000.0, -40000.0])
def test_whole_intercepts_are_exact_and_small_where_they_can_be(dtype: str, intercept: float) -> None:
    info = np.iinfo(dtype)
    for base in (0, 1000, 40000, 70000):
        drawn = np.random.default_rng(0).integers(0, 2000, (3, 4, 5)) + base
        voxels = drawn.clip(info.min, info.max).astype(dtype)
        expected = voxels.astype(np.float64) + intercept
        found = to_hounsfield(voxels, 1.0, intercept)
        np.testing.assert_array_equal(found, expected)
        fits = expected.min() >= -32768 and expected.max() <= 32767
        assert found.dtype == (np.int16 if fits else np.float32)


def test_a_slope_makes_floats_and_none_changes_nothing() -> None:
    voxels = np.array([[-3, 0, 7]], dtype=">i2")
    np.testing.assert_array_equal(to_hounsfield(voxels, 0.5, -2.0), [[-3.5, -2.0, 1.5]])
    same = to_hounsfield(voxels, 1.0, 0.0)
    np.testing.assert_array_equal(same, voxels)
    assert same.dtype.isnative
