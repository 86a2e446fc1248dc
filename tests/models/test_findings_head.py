"""The findings head under autocast: its logits keep the weights' precision."""

from __future__ import annotations

import pytest
import torch

from ctx_distill.models.heads import FindingsHead


@pytest.mark.parametrize("norm", [True, False])
def test_logits_are_not_rounded_to_bf16(norm: bool) -> None:
    """In bf16 all probabilities from 0.5 to 1 are one of 128 values: studies tie, and their ranks are lost."""
    torch.manual_seed(0)
    head, pooled = FindingsHead(16, 3, norm), torch.randn(400, 16)
    expected = head(pooled)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(pooled)
        rounded = head(pooled.bfloat16())
    assert found.dtype == rounded.dtype == torch.float32
    assert torch.equal(found, expected)
    assert len(found.sigmoid().unique()) > 1000
    torch.testing.assert_close(rounded, expected, atol=0.02, rtol=0.02)
    found.sum().backward()
    assert head.linear.weight.grad is not None
