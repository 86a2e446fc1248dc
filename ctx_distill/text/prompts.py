"""Zero-shot prompts: paired sentences that assert a finding's presence and its absence."""

from __future__ import annotations

from typing import Literal

Templates = Literal["default", "ensemble", "normal"]
_DEFAULT = (("{Finding} is present.", "{Finding} is not present."),)
_ENSEMBLE = (
    *_DEFAULT,
    ("There is {finding}.", "There is no {finding}."),
    ("{Finding} is seen.", "No {finding} is seen."),
    ("Findings consistent with {finding}.", "No evidence of {finding}."),
    ("{Finding}.", "No {finding}."),
    ("{Finding} is observed.", "{Finding} was not observed."),
)
_NORMAL = (("{Finding}.", "Normal chest."), ("There is {finding}.", "No abnormality."))
_STYLES: dict[str, tuple[tuple[str, str], ...]] = {
    "plain": (),
    "ct": (("Chest CT shows {finding}.", "Chest CT shows no {finding}."),),
    "xray": (("The chest radiograph shows {finding}.", "The chest radiograph shows no {finding}."),),
}


def _spoken(finding: str) -> tuple[str, str]:
    """The finding at the start of a sentence and inside one; acronyms (COPD) keep their capitals."""
    words = finding.replace("_", " ").split()
    inside = " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)
    return inside[:1].upper() + inside[1:], inside


def prompt_pairs(
    finding: str,
    *,
    templates: Templates = "default",
    style: Literal["plain", "ct", "xray"] = "plain",
) -> tuple[list[str], list[str]]:
    """Prompts of one finding; positives[i] and negatives[i] are one pair.

    Args:
        finding: a label's name; case and underscores do not matter. No template depends on an article or a plural.
        templates: "default" is CT-CLIP's single pair, "{finding} is present." / "{finding} is not present."
            (Hamamci et al., arXiv 2403.17834); "ensemble" adds wordings of radiology reports (ours); "normal" sets the
            finding against a normal study instead of against its own negation, which small text towers hardly tell
            from it (ours).
        style: with "ensemble", one more pair that names the modality: "ct" or "xray".

    Returns:
        (positives, negatives), two lists of equal length. The probability of the finding is the softmax over a pair,
        averaged over pairs, or over the mean embeddings of the two lists.

    Raises:
        ValueError: an empty finding, unknown templates or style.
    """
    start, inside = _spoken(finding)
    if not inside:
        raise ValueError("prompt_pairs: the finding's name is empty, expected words such as 'pleural effusion'.")
    if templates not in ("default", "ensemble", "normal"):
        raise ValueError(f"prompt_pairs: templates is {templates!r}, expected 'default', 'ensemble' or 'normal'.")
    if style not in _STYLES:
        raise ValueError(f"prompt_pairs: style is {style!r}, expected one of {', '.join(_STYLES)}.")
    pairs = {"default": _DEFAULT, "normal": _NORMAL, "ensemble": _ENSEMBLE + _STYLES[style]}[templates]
    # replace, not format: a label may hold braces
    filled = [[text.replace("{Finding}", start).replace("{finding}", inside) for text in pair] for pair in pairs]
    return [pair[0] for pair in filled], [pair[1] for pair in filled]
