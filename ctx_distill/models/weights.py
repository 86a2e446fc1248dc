"""Pretrained weights: pinned revisions of the hub, provenance and licences."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ctx_distill.files import hash_file, hash_json, write_json
from ctx_distill.types import InputError

logger = logging.getLogger(__name__)

HUB = "hf-hub:"
PROVENANCE_FILE = "ctx_distill_source.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
SAFE_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "README.md", "LICENSE*", "*/config.json")
OPEN_CLIP_PICKLE = "open_clip_pytorch_model.bin"


@dataclass(frozen=True)
class Provenance:
    """Where weights came from.

    Attributes:
        name: short name.
        source: folder or `hf-hub:organisation/name`.
        revision: commit, where known.
        license: of the model card, or "unknown".
    """

    name: str
    source: str
    revision: str | None
    license: str


def read_license(folder: Path) -> str:
    """The licence that a model card (README.md with YAML in front) names, or "unknown"."""
    import yaml

    card = folder / "README.md"
    if not card.is_file():
        return "unknown"
    front = re.match(r"\A---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(front.group(1)) if front else None
    except yaml.YAMLError:
        return "unknown"
    if not isinstance(values, dict):
        return "unknown"
    named = values.get("license_name") if values.get("license") in (None, "other") else values.get("license")
    return str(named or values.get("license") or "unknown")


def read_provenance(folder: Path) -> Provenance:
    """Where a folder's weights came from: its own record, the hub cache's folder names, or nothing known."""
    record = folder / PROVENANCE_FILE
    if record.is_file():
        try:
            return Provenance(**json.loads(record.read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"{record}: not readable ({error}). Delete it, or fetch the weights again.") from error
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$", str(folder))
    if cached:
        organisation, name, revision = cached.groups()
        return Provenance(name, f"{HUB}{organisation}/{name}", revision, read_license(folder))
    return Provenance(folder.resolve().name, str(folder), None, read_license(folder))


def hash_weights(paths: Sequence[Path]) -> str:
    """One SHA-256 over weight files: the file's own where there is one, else over all of them in order of name."""
    hashes = {path.name: hash_file(path) for path in sorted(paths)}
    return next(iter(hashes.values())) if len(hashes) == 1 else hash_json(hashes)


def _hub_source(source: str, revision: str | None) -> tuple[str, str]:
    repository = source.removeprefix(HUB)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"{source}: not a repository of the hub. Expected {HUB}organisation/name.")
    if revision is None or not COMMIT.fullmatch(revision):
        raise InputError(
            f"{source}: revision {revision!r} is not pinned. A branch or a tag can change under you: give the full"
            f" commit (40 hexadecimal digits) from https://huggingface.co/{repository}/commits/main."
        )
    return repository, revision


def _snapshot(repository: str, revision: str, out: Path | None) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = list(SAFE_PATTERNS)
    try:
        if not any(name.endswith(".safetensors") for name in list_repo_files(repository, revision=revision)):
            patterns.append(OPEN_CLIP_PICKLE)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
        patterns.append(OPEN_CLIP_PICKLE)  # no network: whatever the cache holds
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_dir=out))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"{HUB}{repository} at {revision}: not in the cache of huggingface_hub and not reachable"
            f" ({type(error).__name__}: {str(error).splitlines()[0]}). On a machine with internet run"
            f" `ctx-distill weights fetch {HUB}{repository} --revision {revision} --out FOLDER`, copy FOLDER here"
            " (or share HF_HOME), and give the folder as the expert."
        ) from error


def resolve_source(source: str, revision: str | None = None) -> Path:
    """The folder of a source: itself, or the snapshot of a pinned hub repository (fetched where it is missing).

    Raises:
        InputError: the folder does not exist, the revision is not pinned or another one, or nothing was reachable.
    """
    if source.startswith(HUB):
        return _snapshot(*_hub_source(source, revision), out=None)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{source}: no such folder. Expected a folder with an expert's files, or {HUB}organisation/name with a"
            " revision. Fetch one with `ctx-distill weights fetch`, or train one with `ctx-distill expert`."
        )
    own = read_provenance(folder).revision
    if revision is not None and own is not None and own != revision:
        raise InputError(f"{folder}: holds revision {own}, but {revision} was asked for. Fetch that one.")
    return folder


def find_text_config(folder: Path, name: str) -> Path:
    """The folder with the `config.json` of an open_clip text tower that is a Hugging Face model.

    Looked for in the expert's own folder (`NAME`, then the last part of `organisation/NAME`), then in the hub's
    cache or on the hub. Only the configuration is needed: the weights are the expert's.

    Raises:
        InputError: not found; the message says where it was looked for and how to place it.
    """
    places = [folder / name, folder / name.split("/")[-1]]
    for place in places:
        if (place / "config.json").is_file():
            return place
    reason = "it is not the name of a hub repository"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(name, "config.json")).parent
        except Exception as error:  # the hub's errors come from three libraries; all mean: not had
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    raise InputError(
        f"{folder / 'open_clip_config.json'}: the text tower is {name}, whose config.json (repository {name}, revision"
        f" main) is not in {places[-1]}, not in the cache of huggingface_hub and not reachable ({reason}). Place it at"
        f" {places[-1] / 'config.json'}, or run `ctx-distill weights fetch` on a machine with internet, which does so."
    )


def fetch(source: str, revision: str | None, out: Path | None = None) -> tuple[Provenance, Path]:
    """Download a hub repository at a pinned commit: configuration, tokenizer and weights, no code.

    For machines without internet: fetch elsewhere with
    `out`, then copy the folder.

    Args:
        source: `hf-hub:organisation/name`.
        revision: full commit.
        out: folder to write; None for the cache of huggingface_hub.

    Returns:
        Where the weights came from, and their folder.

    Raises:
        InputError: not pinned, not reachable, or not a model that this package can open.
    """
    repository, commit = _hub_source(source, revision)
    folder = _snapshot(repository, commit, out)
    record = Provenance(repository.split("/")[-1], f"{HUB}{repository}", commit, read_license(folder))
    config = folder / "open_clip_config.json"
    text = json.loads(config.read_text()).get("model_cfg", {}).get("text_cfg", {}) if config.is_file() else {}
    if text.get("hf_model_name"):
        found = find_text_config(folder, text["hf_model_name"]) / "config.json"
        place = folder / text["hf_model_name"].split("/")[-1] / "config.json"
        if out is not None and not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(found.read_bytes())
    if out is not None:
        write_json(folder / PROVENANCE_FILE, asdict(record))
    return record, folder


def refuse_remote_code(folder: Path) -> None:
    """Refuse a model that would have to run code out of its own repository.

    Raises:
        InputError: a configuration in the folder has an `auto_map`.
    """
    for path in [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/config.json"))]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue
        if isinstance(value, dict) and value.get("auto_map"):
            raise InputError(
                f"{path}: has an auto_map, so this model runs Python out of its own repository. Such code is never"
                " run here (trust_remote_code is never set). Use a model of a library's own architecture, or weights"
                " converted to one."
            )
