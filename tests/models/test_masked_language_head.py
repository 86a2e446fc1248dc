"""The masked language head: shapes, what it looks at, refusals."""

from __future__ import annotations

import pytest
import torch

from ctx_distill.models.masked_language import MaskedLanguageHead
from ctx_distill.types import InputError


def head(**options: int) -> MaskedLanguageHead:
    torch.manual_seed(0)
    return MaskedLanguageHead(8, 11, 6, **options).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, d, dtype=torch.float64, generator=draw) for n, d in ((5, 8), (4, 6)))  # type: ignore[return-value]


def test_the_chosen_positions_are_those_of_all_in_row_order() -> None:
    model, (states, tokens) = head(num_tokens=4, layers=2), inputs()
    chosen = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    every = model(states, tokens)
    assert every.shape == (2, 5, 11)
    torch.testing.assert_close(model(states, tokens, chosen), torch.stack([every[0, 0], every[0, 3], every[1, 2]]))
    assert model(states, tokens, torch.zeros(2, 5).bool()).shape == (0, 11)


def test_a_word_depends_on_its_own_state_and_its_own_ct_alone() -> None:
    model, (states, tokens) = head(), inputs()
    states.requires_grad_()
    tokens.requires_grad_()
    by_state, by_token = torch.autograd.grad(model(states, tokens)[0, 2].sum(), (states, tokens))
    assert by_state[0, 2].abs().sum() > 0
    assert by_state.abs().sum() == by_state[0, 2].abs().sum()
    assert (by_token[0].abs().sum(dim=1) > 0).all()
    assert by_token[1].abs().sum() == 0


def test_places_tell_the_tokens_apart() -> None:
    states, tokens = inputs()
    order = torch.tensor([2, 0, 3, 1])
    without, placed = head(), head(num_tokens=4)
    torch.testing.assert_close(without(states, tokens[:, order]), without(states, tokens))
    assert not torch.allclose(placed(states, tokens[:, order]), placed(states, tokens))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(InputError, match=r"1 layers of 3 heads over states of width 8.*masking\.heads"):
        head(heads=3)
    with pytest.raises(InputError, match="0 layers"):
        head(layers=0)
