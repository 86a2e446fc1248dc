"""Embed findings prompts in the joint space, and compute the probability of a finding from a pair of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.text.extractor import Vocabulary, vocabulary_for
from ctx_distill.text.prompts import Pairs, Templates, prompt_pairs


def same_finding(name: str) -> str:
    """Return a finding's name in lower case, with underscores and runs of white space replaced by one space."""
    return " ".join(name.replace("_", " ").lower().split())


@torch.no_grad()
def prompt_features(
    encode: Callable[[list[str]], Tensor],
    findings: Sequence[str],
    templates: Templates | Pairs,
    synonyms: bool = True,
    given: Vocabulary | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean text features of each finding's positive and negative prompts.

    Args:
        encode: Maps B texts to (B, D) unit rows.
        findings: F names.
        templates: Prompt templates.
        synonyms: Also use every plain synonym of the shipped vocabularies, not only the label's name.
        given: A vocabulary whose synonyms take precedence over the shipped ones.

    Returns:
        Positive and negative features, each (F, D), unit rows.
    """
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    own = {same_finding(finding.name): finding for finding in given.findings} if given else {}
    known = [own.get(same_finding(finding.name), finding) for finding in vocabulary_for(findings).findings]
    for name, finding in zip(findings, known, strict=True):
        plain = [phrase for phrase in finding.synonyms if "..." not in phrase] if synonyms else []
        pairs = [prompt_pairs(phrase, templates=templates) for phrase in dict.fromkeys([name, *plain])]
        for index, side in enumerate(sides):
            prompts = [prompt for pair in pairs for prompt in pair[index]]
            side.append(F.normalize(encode(prompts).mean(dim=0), dim=-1))
    return torch.stack(sides[0]), torch.stack(sides[1])


def pair_probabilities(image: Tensor, positive: Tensor, negative: Tensor, logit_scale: float) -> Tensor:
    """Return the probability that each finding is present: the softmax over its pair of prompts.

    Args:
        image: (N, D), unit rows.
        positive: (F, D), features of the positive prompts.
        negative: (F, D), features of the negative prompts.
        logit_scale: 1 / temperature.

    Returns:
        (N, F) in [0, 1].
    """
    return torch.sigmoid(logit_scale * (image @ positive.to(image).T - image @ negative.to(image).T))
