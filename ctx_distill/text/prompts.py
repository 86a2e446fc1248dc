"""Create zero-shot prompts: pairs of sentences that assert the presence and absence of a finding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml

from ctx_distill.errors import InputError

Pairs = tuple[tuple[str, str], ...]
"""Custom templates: (presence, absence), with {finding} or {Finding} for the finding."""
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
    """Return the finding for the start and for the middle of a sentence; acronyms (COPD) keep their capitals."""
    words = finding.replace("_", " ").split()
    inside = " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)
    return inside[:1].upper() + inside[1:], inside


def prompt_pairs(
    finding: str,
    *,
    templates: Templates | Pairs = "default",
    style: Literal["plain", "ct", "xray"] = "plain",
) -> tuple[list[str], list[str]]:
    """Return the prompts of one finding; positives[i] and negatives[i] form a pair.

    Args:
        finding: label name; case and underscores are ignored. No template depends on articles or plurals.
        templates: "default" is CT-CLIP's single pair, "{finding} is present." / "{finding} is not present."
            (Hamamci et al., arXiv 2403.17834). "ensemble" adds wordings of radiology reports (ours). "normal" contrasts
            the finding with a normal study instead of its negation, which small text towers hardly distinguish (ours).
            Or custom pairs, see `load_templates`.
        style: with "ensemble", adds a pair that names the modality: "ct" or "xray".

    Returns:
        (positives, negatives), two lists of equal length. The probability of the finding is the softmax over a pair,
        averaged over pairs, or over the mean embeddings of the two lists.

    Raises:
        ValueError: an empty finding, unknown templates or style.
    """
    start, inside = _spoken(finding)
    if not inside:
        raise ValueError("prompt_pairs: empty finding name; expected words such as 'pleural effusion'")
    if isinstance(templates, str) and templates not in ("default", "ensemble", "normal"):
        raise ValueError(f"prompt_pairs: templates is {templates!r}; expected 'default', 'ensemble' or 'normal'")
    if style not in _STYLES:
        raise ValueError(f"prompt_pairs: style is {style!r}; choose from: {', '.join(_STYLES)}")
    shipped = {"default": _DEFAULT, "normal": _NORMAL, "ensemble": _ENSEMBLE + _STYLES[style]}
    pairs = shipped[templates] if isinstance(templates, str) else templates
    # replace instead of format, because a label may contain braces
    filled = [[text.replace("{Finding}", start).replace("{finding}", inside) for text in pair] for pair in pairs]
    return [pair[0] for pair in filled], [pair[1] for pair in filled]


def load_templates(name_or_path: str) -> Templates | Pairs:
    """Load templates by name or from a YAML file of pairs: `- ["{Finding} is seen.", "No {finding} is seen."]`.

    Raises:
        InputError: an unknown name, or an invalid file.
    """
    if name_or_path in ("default", "ensemble", "normal"):
        return name_or_path  # type: ignore[return-value]
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"unknown templates {name_or_path!r}; choose from: default, ensemble, normal, or pass a .yaml file of pairs"
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot read the file as YAML ({error}); check the path and the file") from error
    if not isinstance(raw, list) or not raw:
        raise InputError(f"{path}: found {type(raw).__name__}; expected a list of pairs of prompts")
    for number, pair in enumerate(raw, 1):
        valid = isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text for text in pair)
        if not valid or "{finding}" not in pair[0].lower():
            raise InputError(
                f"{path}, pair {number}: found {pair!r}; expected two texts (presence, absence), the first with {{finding}} or "
                "{Finding}"
            )
    return tuple((pair[0], pair[1]) for pair in raw)
