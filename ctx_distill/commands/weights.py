"""`ctx-distill weights`."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

weights = App(name="weights", help="Fetch or convert the weights of an X-ray expert.", result_action="return_value")


@weights.command
def fetch(source: str, /, *, revision: str, out: Path) -> None:
    """Download an expert at a pinned revision, for machines without internet.

    Args:
        source: `hf-hub:ORG/NAME`.
        revision: Commit: 40 hexadecimal digits.
        out: Folder to write.
    """
    print(f"fetching {source} ...", flush=True)
    from ctx_distill.models.opening import open_expert
    from ctx_distill.models.weights import fetch as download

    record, folder = download(source, revision, out)
    print(f"{record.source} at {record.revision}\nlicence      {record.license}\nfolder       {folder}")
    print(f"fingerprint  {open_expert(str(folder)).fingerprint()}")


@weights.command
def convert_torchxrayvision(checkpoint: Path, out: Path, /, *, sha256: str | None = None) -> None:
    """Convert torchxrayvision's pickle to safetensors, once.

    Args:
        checkpoint: The `.pt` file.
        out: Folder to write.
        sha256: SHA-256 of the file, in hexadecimal. Default: that of the pinned release.
    """
    print(f"converting {checkpoint} ...", flush=True)
    from ctx_distill.models import convert_torchxrayvision as conversion

    checked = {"sha256": sha256} if sha256 else {}
    print(conversion.convert_torchxrayvision(checkpoint, out, **checked))
