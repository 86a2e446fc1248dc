"""`ctx-distill export`."""

from __future__ import annotations

from pathlib import Path


def export(
    checkpoint: Path,
    out: Path,
    /,
    *,
    name: str | None = None,
    license: str | None = None,
    data_license: str | None = None,
    push: str | None = None,
    accept_unknown_licences: bool = False,
) -> None:
    """Export a model to share: safetensors, model card, torch.export, checked against the original.

    Args:
        checkpoint: Run folder, or artefact of stage 3 or 4.
        out: Folder to write.
        name: Name of the model in its card.
        license: Licence of the weights, as the Hugging Face hub names it.
        data_license: Licence of the training data.
        push: Upload to this Hugging Face repository (`ORG/NAME`), private.
        accept_unknown_licences: Push even if the licence of a part is unknown.
    """
    print(f"loading the model of {checkpoint} ...", flush=True)
    from ctx_distill.inference.export import export_model, push_to_hub
    from ctx_distill.inference.licences import CardFacts

    facts = {"name": name, "license": license, "data_license": data_license}
    result = export_model(
        checkpoint, out, CardFacts(**{key: value for key, value in facts.items() if value is not None})
    )
    for part, difference in result["largest_difference"].items():
        print(f"{part}: largest difference from the model {difference:.2g}")
    for part, reason in result["not_exported"].items():
        print(f"{part}: not exported ({reason})")
    print(out)
    if push:
        print(push_to_hub(out, push, accept_unknown_licences=accept_unknown_licences))
