"""Head for masked language modelling conditioned on CT tokens: cross-attention, then the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctx_distill.types import InputError


class _CrossAttention(nn.Module):
    """A pre-norm decoder layer without self-attention: x + A(LN(x), memory), then x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor, memory: Tensor) -> Tensor:
        attended, _ = self.attention(self.attention_norm(states), memory, memory, need_weights=False)
        states = states + attended
        out: Tensor = states + self.mlp(self.mlp_norm(states))
        return out


class MaskedLanguageHead(nn.Module):
    """Map token states of a masked text and the tokens of its CT to logits over the vocabulary.

    There is no self-attention (**ours**), so that the context of other words must come from the text tower, which is being
    trained. The head is only needed in training; it is in the checkpoint but not in the artefact.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        token_dim: int,
        num_tokens: int | None = None,
        layers: int = 1,
        heads: int = 4,
    ) -> None:
        """Build the head.

        Args:
            width: W, width of the text states.
            vocab_size: V.
            token_dim: D_c.
            num_tokens: T, for learnt position embeddings of the CT tokens; None for none.
            layers: number of cross-attention layers.
            heads: attention heads per layer; a divisor of W.

        Raises:
            InputError: no layer, or the number of heads does not divide W.
        """
        super().__init__()
        if layers < 1 or heads < 1 or width % heads:
            raise InputError(
                f"masked language head: {layers} layers of {heads} heads over states of width {width}; expected at"
                f" least one layer and a number of heads that divides {width}. Set masking.layers and masking.heads."
            )
        self.projection = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, width))
        self.places = nn.Parameter(0.02 * torch.randn(num_tokens, width)) if num_tokens else None
        self.layers = nn.ModuleList(_CrossAttention(width, heads) for _ in range(layers))
        self.out = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, vocab_size)
        )

    def forward(self, states: Tensor, tokens: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the logits of the tokens.

        Args:
            states: (B, L, W) text tower states of the masked text.
            tokens: (B, T, D_c) tokens of the CT.
            chosen: (B, L) bool, the N positions to predict; None for all.

        Returns:
            (N, V) in row order, or (B, L, V). Only selected positions are projected to the vocabulary, the costly part.
        """
        memory = self.projection(tokens)
        memory = memory if self.places is None else memory + self.places
        for layer in self.layers:
            states = layer(states, memory)
        logits: Tensor = self.out(states if chosen is None else states[chosen])
        return logits
