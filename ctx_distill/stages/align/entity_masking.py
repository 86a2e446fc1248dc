"""Entity-focused masking in stage 3: masked reports through the text tower, reconstructed in view of the CT."""

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
    """Entity-focused masking (rates and head are ours).

    Attributes:
        weight: w_efm; 0 switches it off.
        entity_rate: probability that an entity is chosen.
        word_rate: probability that another word is chosen.
        entities: what counts as an entity.
        vocabulary: of the findings, by name or as a YAML file.
        layers: of cross-attention to the CT's tokens.
        heads: of each layer.
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
    """Masked reports, B of them.

    Attributes:
        input_ids: (B, L) int64, with the chosen tokens replaced.
        attention_mask: (B, L) bool.
        chosen: (B, L) bool, the N tokens to be predicted.
        targets: (N,) int64, what stood there, in row order.
        entity: (N,) bool, whether it belongs to an entity.
        owner: (N,) int64, the report.
    """

    input_ids: Tensor
    attention_mask: Tensor
    chosen: Tensor
    targets: Tensor
    entity: Tensor
    owner: Tensor


def _check(settings: MaskingSettings, encoder: TextEncoder) -> None:
    """Refuse rates that are none, and a text tower that cannot learn from masked words."""
    for name in ("entity_rate", "word_rate"):
        if not 0 <= getattr(settings, name) <= 1:
            raise InputError(f"masking.{name} is {getattr(settings, name)}, expected a probability from 0 to 1.")
    if settings.weight < 0 or not settings.entity_rate + settings.word_rate:
        raise InputError(
            f"masking.weight is {settings.weight}, entity_rate {settings.entity_rate} and word_rate"
            f" {settings.word_rate}; expected a weight of 0 or more, and a rate above 0. Set weight to 0 for no masking."
        )
    name = f"entity masking: the text tower ({type(encoder).__name__})"
    remedy = "Set text.tower to scratch or to bert (with text.source), or masking.weight to 0."
    if not encoder.bidirectional:
        raise InputError(
            f"{name} is causal: a token does not see those after it, so masked words cannot be reconstructed from both"
            f" sides; expected a bidirectional one. {remedy} An X-ray expert whose text tower is bidirectional serves too."
        )
    if not encoder.trainable:
        raise InputError(
            f"{name} is frozen; expected one that learns. Set text.trainable to true, or masking.weight to 0."
        )
    if encoder.mask_id is None:
        raise InputError(f"{name} has no mask token in its vocabulary; expected one such as [MASK]. {remedy}")
    try:
        encoder.tokens(["No pleural effusion."])
    except (NotImplementedError, ValueError) as error:
        raise InputError(
            f"{name} has a tokenizer that does not tell where its tokens stand ({str(error)[:200]}); expected one with"
            f" offsets (tokenizer.json). {remedy}"
        ) from error


class EntityMasking(nn.Module):
    """Masks reports and predicts what was masked; the text encoder stays the owner's."""

    def __init__(
        self, settings: MaskingSettings, encoder: TextEncoder, token_dim: int, num_tokens: int | None = None
    ) -> None:
        """Build the head.

        Args:
            settings: see `MaskingSettings`.
            encoder: the text encoder that will be given to `forward`.
            token_dim: D_c.
            num_tokens: T.

        Raises:
            InputError: settings out of range; a text encoder that is causal, frozen, has no mask token or tells no
                places of its tokens; no such vocabulary.
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
        """For a dual encoder of volumes (D, H, W); the random state goes on as if it had not been built."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            tokens = dual.ct_encoder(torch.zeros(1, 1, *shape)).tokens
            return cls(settings, dual.text_encoder, tokens.shape[2], tokens.shape[1])

    def mask(self, encoder: TextEncoder, reports: Sequence[str], seeds: Sequence[int]) -> MaskedText:
        """Masked reports; of one longer than the context, one chunk that fits, drawn too.

        Args:
            encoder: the text encoder.
            reports: B reports.
            seeds: B; what is drawn for a report is a function of its own seed.
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
        """Sums and counts a report, for `masked_language_loss`.

        Args:
            encoder: the text encoder; the masked text takes its own way through it.
            reports: B reports.
            seeds: B, see `mask`.
            tokens: (B, T, D_c) of the CTs.
        """
        masked = self.mask(encoder, reports, seeds)
        states = encoder.hidden(masked.input_ids, masked.attention_mask)
        logits = self.head(states, tokens, masked.chosen)
        return masked_language_sums(logits, masked.targets, masked.entity, masked.owner, len(reports))
