"""Entity-focused masking of stage 3: mask report words and reconstruct them with cross-attention to the CT's tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctx_distill.errors import InputError
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.masked_language import MaskedLanguageHead
from ctx_distill.models.text_encoder import TextEncoder
from ctx_distill.stages.align.masked_language_loss import masked_language_sums
from ctx_distill.text.entities import EntityFinder, EntityKind
from ctx_distill.text.extractor import load_vocabulary
from ctx_distill.text.masking import choose_units, maskable_units


@dataclass(frozen=True)
class MaskingSettings:
    """Settings of entity-focused masking (rates and head are **ours**).

    Attributes:
        weight: w_efm; 0 disables the term.
        entity_rate: Probability that an entity is chosen.
        word_rate: Probability that another word is chosen.
        entities: Kinds of words that count as entities.
        vocabulary: Vocabulary of the findings; name or YAML file.
        layers: Layers of cross-attention to the CT's tokens.
        heads: Heads per layer.
    """

    weight: float = 0.0
    entity_rate: float = 0.5
    word_rate: float = 0.1
    entities: tuple[EntityKind, ...] = ("finding", "cue")
    vocabulary: str = "ct-rate"
    layers: int = 1
    heads: int = 4


@dataclass
class MaskedText:
    """B masked reports.

    Attributes:
        input_ids: (B, L) int64, with the chosen tokens replaced.
        attention_mask: (B, L) bool.
        chosen: (B, L) bool, the N tokens to predict.
        targets: (N,) int64, the original tokens, in row order.
        entity: (N,) bool, whether the token belongs to an entity.
        owner: (N,) int64, index of the token's report.
    """

    input_ids: Tensor
    attention_mask: Tensor
    chosen: Tensor
    targets: Tensor
    entity: Tensor
    owner: Tensor


def _check(settings: MaskingSettings, encoder: TextEncoder) -> None:
    """Raise InputError for rates out of range, and for a text tower that cannot learn from masked words."""
    for name in ("entity_rate", "word_rate"):
        if not 0 <= getattr(settings, name) <= 1:
            raise InputError(f"masking.{name} is {getattr(settings, name)}; expected a probability from 0 to 1.")
    if settings.weight < 0 or not settings.entity_rate + settings.word_rate:
        raise InputError(
            f"masking.weight is {settings.weight}, entity_rate {settings.entity_rate} and word_rate"
            f" {settings.word_rate}; expected a weight of 0 or more, and a rate above 0. To disable masking, set weight"
            " to 0."
        )
    name = f"entity masking: the text tower ({type(encoder).__name__})"
    remedy = "Set text.tower to scratch or to bert (with text.source), or masking.weight to 0."
    if not encoder.bidirectional:
        raise InputError(
            f"{name} is causal; expected a bidirectional one, which reconstructs a word from both sides. {remedy}"
            " An X-ray expert with a bidirectional text tower also works."
        )
    if not encoder.trainable:
        raise InputError(
            f"{name} is frozen; expected a trainable one. Set text.trainable to true, or masking.weight to 0."
        )
    if encoder.mask_id is None:
        raise InputError(f"{name} has no mask token in its vocabulary; expected one such as [MASK]. {remedy}")
    try:
        encoder.tokens(["No pleural effusion."])
    except (NotImplementedError, ValueError) as error:
        raise InputError(
            f"{name} has a tokenizer that does not return token offsets ({str(error)[:200]}); expected one with offsets"
            f" (tokenizer.json). {remedy}"
        ) from error


class EntityMasking(nn.Module):
    """Mask reports and predict the masked tokens; the text encoder is passed in and is not a submodule."""

    def __init__(
        self, settings: MaskingSettings, encoder: TextEncoder, token_dim: int, num_tokens: int | None = None
    ) -> None:
        """Build the head.

        Args:
            settings: See `MaskingSettings`.
            encoder: The text encoder that `forward` will be called with.
            token_dim: D_c.
            num_tokens: T.

        Raises:
            InputError: a setting is out of range; the text encoder is causal or frozen, or has no mask token or no
                token offsets; the vocabulary does not exist.
        """
        super().__init__()
        _check(settings, encoder)
        self.settings = settings
        self.finder = EntityFinder(load_vocabulary(settings.vocabulary), settings.entities)
        self.head = MaskedLanguageHead(
            encoder.hidden_dim, encoder.vocab_size, token_dim, num_tokens, settings.layers, settings.heads
        )

    @classmethod
    def beside(cls, dual: DualEncoder, settings: MaskingSettings, shape: Sequence[int]) -> EntityMasking:
        """Build the head for a dual encoder of volumes (D, H, W), without changing the random state."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            tokens = dual.ct_encoder(torch.zeros(1, 1, *shape)).tokens
            return cls(settings, dual.text_encoder, tokens.shape[2], tokens.shape[1])

    def mask(self, encoder: TextEncoder, reports: Sequence[str], seeds: Sequence[int]) -> MaskedText:
        """Mask reports. Of a report longer than the context, one random chunk is used.

        Args:
            encoder: The text encoder.
            reports: B reports.
            seeds: B seeds; a report's draws depend on its seed only.
        """
        sources = [random.Random(seed) for seed in seeds]
        texts = [rng.choice(encoder.chunks(report)) for report, rng in zip(reports, sources, strict=True)]
        tokens = encoder.tokens(texts)
        ids = tokens.input_ids.tolist()
        kinds = [[-1] * len(row) for row in ids]
        places = zip(texts, sources, tokens.offsets.tolist(), tokens.special_mask.tolist(), strict=True)
        for row, (text, rng, offsets, special) in enumerate(places):
            units = maskable_units(text, self.finder.spans(text), offsets, special)
            for unit, fate in choose_units(units, self.settings.entity_rate, self.settings.word_rate, rng):
                for position in unit.tokens:
                    kinds[row][position] = int(unit.entity)
                    if fate == "mask":
                        ids[row][position] = encoder.mask_id
                    elif fate == "random":
                        ids[row][position] = rng.randrange(encoder.vocab_size)
        kind = tokens.input_ids.new_tensor(kinds)
        chosen = kind >= 0
        return MaskedText(
            tokens.input_ids.new_tensor(ids), tokens.attention_mask, chosen, tokens.input_ids[chosen],
            kind[chosen] == 1, chosen.nonzero()[:, 0],
        )  # fmt: skip

    def forward(
        self, encoder: TextEncoder, reports: Sequence[str], seeds: Sequence[int], tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sums and counts per report for `masked_language_loss`.

        Args:
            encoder: The text encoder; the masked reports need a separate forward pass.
            reports: B reports.
            seeds: B seeds; see `mask`.
            tokens: (B, T, D_c), tokens of the CTs.

        Returns:
            See `masked_language_sums`.
        """
        masked = self.mask(encoder, reports, seeds)
        states = encoder.hidden(masked.input_ids, masked.attention_mask)
        logits = self.head(states, tokens, masked.chosen)
        return masked_language_sums(logits, masked.targets, masked.entity, masked.owner, len(reports))
