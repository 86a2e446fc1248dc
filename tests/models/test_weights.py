"""Opening and fetching: pinned revisions, licences, and what is said where nothing can be had."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ctx_distill.commands.main import main
from ctx_distill.models import weights
from ctx_distill.models.opening import open_expert
from ctx_distill.models.weights import find_text_config, read_license, read_provenance, resolve_source
from ctx_distill.types import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12]])
def test_the_hub_needs_a_full_commit(revision: str | None) -> None:
    with pytest.raises(InputError, match=r"not pinned.*40 hexadecimal digits"):
        open_expert("hf-hub:org/model", revision)


def test_an_unreachable_repository_says_how_to_place_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=rf"hf-hub:org/model at {COMMIT}.*weights fetch hf-hub:org/model --revision"):
        open_expert("hf-hub:org/model", COMMIT)
    with pytest.raises(InputError, match=r"not a repository of the hub"):
        open_expert("hf-hub:model", COMMIT)


def test_a_folder_without_an_expert(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"Expected open_clip_config\.json .*found notes\.txt"):
        open_expert(str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        open_expert(str(tmp_path / "nowhere"))


def test_licences(tmp_path: Path) -> None:
    assert read_license(tmp_path) == "unknown"
    for text, expected in (
        ("---\nlicense: apache-2.0\n---\nx", "apache-2.0"),
        (
            "---\nlicense: other\nlicense_name: health-ai-developer-foundations\n---\n",
            "health-ai-developer-foundations",
        ),
        ("---\nlicense: other\n---\n", "other"),
        ("no front matter", "unknown"),
        ("---\n: [\n---\n", "unknown"),
    ):
        (tmp_path / "README.md").write_text(text)
        assert read_license(tmp_path) == expected


def test_a_snapshot_in_the_hub_cache_knows_its_revision(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    found = read_provenance(folder)
    assert (found.name, found.source, found.revision) == ("name", "hf-hub:org/name", COMMIT)


def test_fetch_takes_no_code_and_leaves_a_record(
    biomedclip_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, object] = {}

    def download(repository: str, revision: str, allow_patterns: list[str], local_dir: Path) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        shutil.copytree(biomedclip_like, local_dir, ignore=shutil.ignore_patterns("TinyBERT"))
        return str(local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: ["open_clip_pytorch_model.bin"])
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda name, file: str(biomedclip_like / name.split("/")[-1] / file)
    )
    out = tmp_path / "out"
    assert main(["weights", "fetch", "hf-hub:org/model", "--revision", COMMIT, "--out", str(out)]) == 0
    assert not any(str(pattern).endswith((".py", ".pt", "*.bin")) for pattern in asked["patterns"])  # type: ignore[attr-defined]
    assert "open_clip_pytorch_model.bin" in asked["patterns"]  # type: ignore[operator]
    printed = capsys.readouterr().out
    assert "licence      mit" in printed
    assert open_expert(str(out)).fingerprint() in printed
    assert open_expert(str(out), COMMIT).revision == COMMIT
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # the folder is enough from here on
    assert open_expert(str(out)).fingerprint() == open_expert(str(biomedclip_like)).fingerprint()
    with pytest.raises(InputError, match=rf"holds revision {COMMIT}, but {'f' * 40}"):
        resolve_source(str(out), "f" * 40)


def test_safetensors_are_preferred_to_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[str] = []
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: ["model.safetensors", "x.bin"])
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *_, allow_patterns, **__: patterns.extend(allow_patterns) or str(tmp_path),
    )
    weights._snapshot("org/model", COMMIT, None)
    assert "open_clip_pytorch_model.bin" not in patterns


def test_text_configurations_are_looked_for_in_the_folder_first(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({}))
    assert find_text_config(tmp_path, "text") == tmp_path / "text"
    assert find_text_config(tmp_path, "org/text") == tmp_path / "text"
    with pytest.raises(InputError, match="not the name of a hub repository"):
        find_text_config(tmp_path, "elsewhere")


def test_importing_the_interface_is_light() -> None:
    code = (
        "import sys, ctx_distill.models.xray_expert, ctx_distill.models.weights, ctx_distill.models.dual_encoder,"
        " ctx_distill.models.report_decoder, ctx_distill.models.text_encoder;"
        "print([m for m in ('open_clip', 'transformers', 'monai', 'timm', 'torchvision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
