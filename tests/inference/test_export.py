"""An export says what the model says, stands by itself, and is not left where it would not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ctx_distill
from ctx_distill.commands.main import main
from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.transforms.model_volume import prepare_volume
from ctx_distill.data.transforms.projection import square_projection
from ctx_distill.errors import InputError
from ctx_distill.inference import export as exporting
from ctx_distill.inference.export import export_model, push_to_hub
from ctx_distill.inference.licences import DATA_LICENCES, CardFacts
from ctx_distill.inference.model import CTModel
from ctx_distill.inference.towers import ReportTower
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.text_encoder import BertTextEncoder


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    arguments = ["--license", "cc-by-nc-sa-4.0", "--data-license", "synthetic", "--name", "tiny"]
    assert main(["export", str(finished_run), str(out), *arguments]) == 0
    return out


def test_it_predicts_the_same(exported: Path, finished_run: Path, cohort: Path) -> None:
    scan = sorted(cohort.glob("ct/*.nii.gz"))[0]
    own, copy = ctx_distill.load(finished_run), CTModel.from_pretrained(exported)
    assert copy.fingerprint == own.fingerprint
    a, b = (model.predict(scan, report=True) for model in (own, copy))
    assert (a.probabilities, a.zero_shot, a.report) == (b.probabilities, b.zero_shot, b.report)
    assert (a.embedding == b.embedding).all()


def test_programs_on_scans(exported: Path, finished_run: Path, cohort: Path) -> None:
    """The programs by themselves say what the model says of files, with its prior."""
    own = ctx_distill.load(finished_run)
    assert own.parts.expert is not None
    scans = [read_volume(path) for path in sorted(cohort.glob("ct/*.nii.gz"))[:3]]
    volumes = torch.stack([prepare_volume(scan, own.volume_spec) for scan in scans])
    program = torch.export.load(exported / "image_tower.pt2").module()
    with torch.no_grad():
        found = program(volumes, torch.stack([square_projection(scan) for scan in scans]))
    for place, scan in enumerate(scans):
        said = own.predict_volume(scan)
        torch.testing.assert_close(found["embedding"][place], torch.from_numpy(said.embedding), atol=1e-5, rtol=0)
        probabilities = torch.tensor(list(said.probabilities.values()))
        torch.testing.assert_close(found["logits"][place].sigmoid(), probabilities, atol=1e-5, rtol=0)
    dual, _ = DualEncoder.load(finished_run / "align" / "artefact")
    texts = ["Clear lungs.", "Large pneumothorax on the right. " * 80, "Small nodule.", "The heart is enlarged. " * 50]
    tower = ReportTower(dual)
    assert tower.tokens(texts)[0].shape[0] > 4  # several chunks a report
    text = torch.export.load(exported / "text_tower.pt2").module()(*tower.tokens(texts))
    torch.testing.assert_close(text, dual.encode_text(texts), atol=1e-5, rtol=0)
    told = json.loads((exported / "export.json").read_text())
    assert told["not_exported"] == {}
    assert len(told["programs"]["image_tower.pt2"]["inputs"]) == 2
    assert (
        "`image_tower.pt2`: volume (B, 1, D, H, W), prepared, projection (B, S, S)"
        in (exported / "README.md").read_text()
    )


def test_a_prior_that_cannot_be_exported_is_said(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporting.export_module

    def refusing(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], *more: Any) -> None:
        if len(inputs) == 2:
            raise TypeError("an operator\nthat torch.export does not know")
        real(module, inputs, *more)

    monkeypatch.setattr(exporting, "export_module", refusing)
    told = export_model(finished_run, tmp_path / "out")
    assert told["not_exported"] == {"prior": "TypeError: an operator"}
    assert "leaves out the model's prior" in (tmp_path / "out" / "README.md").read_text()


def test_text_tower_of_bert() -> None:
    from ctx_distill.models.ct_encoder import ResNet3D

    class Words:
        """The encoder's part of it: a tokenizer of single letters."""

        pad_token_id = 0
        mask_token_id = 29

        def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
            texts = [texts] if isinstance(texts, str) else texts
            rows = [[1 + ord(letter) % 20 for letter in text] for text in texts]
            if not options.get("return_tensors"):
                return {"input_ids": rows[0]}
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            offsets = torch.zeros(*ids.shape, 2, dtype=torch.long)
            mask = (ids > 0).long()
            return {
                "input_ids": ids,
                "attention_mask": mask,
                "special_tokens_mask": 1 - mask,
                "offset_mapping": offsets,
            }

    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        add_pooling_layer=False,
    )
    encoder = BertTextEncoder(bert, Words(), context_length=24)
    dual = DualEncoder(ResNet3D("small", base_width=8), encoder, projection_dim=16).eval()
    tower = ReportTower(dual).eval()
    texts = ["a few", "letters of words"]
    torch.testing.assert_close(tower(*tower.tokens(texts)), dual.encode_text(texts), atol=1e-6, rtol=1e-5)


def test_card(exported: Path, finished_run: Path) -> None:
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-nc-sa-4.0"
    for part in ("not a medical device", "## Data", "## Licences", "## Metrics", "## Intended use", "## Limits"):
        assert part in card
    auroc = json.loads((finished_run / "metrics.json").read_text())["classifier"]["macro_auroc"]
    assert f"| classifier | macro AUROC | {auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}] |" in card
    for path in exported.rglob("*"):
        if path.suffix in (".md", ".json", ".csv"):
            assert str(finished_run) not in path.read_text(), path


def test_only_safe_files(exported: Path) -> None:
    kinds = {path.suffix for path in exported.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".md", ".pt2", ".txt"}


def test_a_wrong_export_is_not_left(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting.export_module

    class Off(torch.nn.Module):
        """A tower that says something else."""

        def __init__(self, tower: torch.nn.Module) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, volume: torch.Tensor, projection: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: value + 1e-3 for name, value in self.tower(volume, projection).items()}

    monkeypatch.setattr(exporting, "export_module", lambda module, *more: real(Off(module), *more))
    with pytest.raises(InputError, match=r"image_tower\.pt2 gives another"):
        export_model(finished_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_overwritten(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files that are not an export"):
        export_model(finished_run, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_pushing(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    done: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            done.append(("create", (name, private, exist_ok)))

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> Any:
            done.append(("upload", (repo_id, folder_path)))
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push_to_hub(exported, "lab/tiny") == "https://hub/commit"
    assert done == [("create", ("lab/tiny", True, True)), ("upload", ("lab/tiny", str(exported)))]
    with pytest.raises(InputError, match="no export"):
        push_to_hub(tmp_path, "lab/tiny")
    with pytest.raises(InputError, match="not pinned"):
        CTModel.from_pretrained("hf-hub:lab/tiny")


def test_licences_come_from_what_is_known(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    record = json.loads((run / "run.json").read_text())
    record["ct"] |= {"synthetic": False, "sources": ["ct-rate", "our-hospital"]}
    record["expert"] |= {"source": "hf-hub:org/xray", "license": "mit"}
    (run / "run.json").write_text(json.dumps(record))
    told = export_model(run, tmp_path / "out", CardFacts(license="cc-by-nc-sa-4.0"))
    assert told["unknown_licences"] == ["data, chest CT: our-hospital"]
    card = (tmp_path / "out" / "README.md").read_text()
    for row in (
        "| X-ray expert (hf-hub:org/xray) | mit |",
        "| data, chest CT: ct-rate | CC BY-NC-SA 4.0, behind an access form; no redistribution |",
        "| data, chest CT: our-hospital | unknown: find out before you pass this model on |",
        "| data, chest X-rays | apache-2.0 (the embedded phantom cohort",
    ):
        assert row in card
    import huggingface_hub

    def unreachable() -> None:
        raise OSError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "HfApi", unreachable)
    with pytest.raises(InputError, match="nothing states the licence of: data, chest CT: our-hospital"):
        push_to_hub(tmp_path / "out", "lab/tiny")
    with pytest.raises(OSError, match="the hub was asked"):
        push_to_hub(tmp_path / "out", "lab/tiny", accept_unknown_licences=True)
    command = ["export", str(run), str(tmp_path / "out"), "--push", "lab/tiny"]
    assert main(command) == 2  # no --license either


def test_the_recipes_say_the_same() -> None:
    folder = Path(__file__).parents[2] / "data_manifests"
    stated = {
        path.stem: " ".join(found[1].split())
        for path in folder.glob("*.md")
        if (found := re.search(r"\*\*Licence\*\* (.+?)\.?\n(?:\*\*|\n)", path.read_text(), re.DOTALL))
    }
    stated.pop("dicom")  # one's own scans
    assert stated == DATA_LICENCES
