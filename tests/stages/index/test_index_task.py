"""Stage 1 as a whole: kinds of keys, a report encoder of its own, findings out of texts, and what later stages open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.commands.main import main
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.errors import InputError
from ctx_distill.models.opening import open_expert
from ctx_distill.models.report_encoder import FrozenReportEncoder, open_report_encoder
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.stages.index.quality import held_out_studies
from ctx_distill.stages.index.task import IndexTask
from ctx_distill.stages.shared.frozen_expert import open_queries, open_teacher
from ctx_distill.stages.shared.report_findings import FindingsReader
from ctx_distill.text.extractor import extract, load_vocabulary

REPORTS = ["The heart is enlarged. Small left pleural effusion.", "The lungs are clear. No pneumothorax."]


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained towers of one width."""
    from ctx_distill.models.experts.open_clip_expert import make_expert_folder

    out = tmp_path_factory.mktemp("experts") / "joint"
    make_expert_folder(
        out, REPORTS * 4, image_size=32, embed_dim=24, vision="vit", text_width=32, text_layers=1, context_length=24,
        vocab_size=200, seed=3,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def images_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RAD-DINO's format: no text tower."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    out = tmp_path_factory.mktemp("experts") / "dino"
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(out)
    BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_center_crop=True
    ).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT-like folder as transformers saves it."""
    from transformers import BertConfig, BertModel

    from ctx_distill.text.tokenizer import train_wordpiece

    out = tmp_path_factory.mktemp("encoders") / "bert"
    tokenizer = train_wordpiece(REPORTS * 4, 200, out, 48)
    torch.manual_seed(1)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=48, pad_token_id=0,
        )
    ).save_pretrained(out)  # fmt: skip
    return out


def index(cohort: Path, tiny: Path, run: Path, expert: Path, *overrides: str) -> int:
    given = ["index", "--data", str(cohort), "--run", str(run), "--preset", str(tiny), "--expert", str(expert)]
    given += [f"--model.init_args.{item}" for item in overrides]
    return main(given)


def pool_reports(store: XrayIndexArtefact, cohort: Path) -> list[str]:
    manifest = read_manifest(cohort / "xray.csv", check_images=False)
    return [manifest.report(row) for row in store.items["row"]]


def centred(rows: Tensor, mean: Tensor) -> Tensor:
    return F.normalize(rows - mean, dim=-1)


@pytest.mark.parametrize("key", ["text", "image", "both"])
def test_scores_are_the_cosines_of_centred_parts(
    key: str, cohort: Path, tiny_preset: Path, expert: Path, tmp_path: Path
) -> None:
    assert index(cohort, tiny_preset, tmp_path, expert, f"key={key}", "vocabulary=phantom") == 0
    teacher, store = open_teacher(str(expert), None, str(tmp_path / "index" / "artefact"))
    queries = open_queries(teacher, store)
    assert queries is teacher
    ct = read_manifest(cohort / "ct.csv", check_images=False)
    train, held_out = ct.split("train"), held_out_studies(ct)
    mean = teacher.encode_text([train.report(row) for row in train.frame.index]).mean(0)
    asked = teacher.encode_text([held_out.report(row) for row in held_out.frame.index])
    own = centred(asked, mean)
    parts = {"text": teacher.encode_text(pool_reports(store, cohort)), "image": store.features.float()}
    cosines = {name: own @ centred(rows, rows.mean(0)).T for name, rows in parts.items()}
    expected = (cosines["text"] + cosines["image"]) / 2 if key == "both" else cosines[key]
    similarity, positions = store.search(asked, len(store))
    assert torch.allclose(similarity, expected.gather(1, positions), atol=1e-5)
    assert torch.allclose(similarity, expected.sort(dim=1, descending=True).values, atol=1e-5)
    assert (store.key_dim, store.query_dim) == (48 if key == "both" else 24, 24)
    with pytest.raises(InputError, match="queries have 48 dimensions"):
        store.search(torch.zeros(1, 48), 1)


def test_findings_are_read_from_texts_and_the_re_rank_uses_them(
    cohort: Path, tiny_preset: Path, expert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index(cohort, tiny_preset, tmp_path, expert, "vocabulary=phantom") == 0
    printed = capsys.readouterr().out
    store = XrayIndexArtefact.open(tmp_path / "index" / "artefact")
    vocabulary = load_vocabulary("phantom")
    assert store.finding_names == vocabulary.names
    assert store.findings is not None
    texts = pool_reports(store, cohort)
    for row in (0, 5, len(store) - 1):
        told = extract(texts[row], vocabulary)
        assert [told.get(name) for name in vocabulary.names] == [
            None if np.isnan(value) else int(value) for value in store.findings[row].tolist()
        ]
    reader = FindingsReader(store, "phantom")
    own = reader.extract(texts[:1])
    everyone = NeighbourLookup(store, len(store), findings_rerank=True, visible=reader.visible)
    queries = open_expert(str(expert)).encode_text(texts[:1])
    first = int(everyone.look_up(queries, own)["positions"][0, 0])
    shown = reader.visible
    assert torch.equal(store.findings[first][shown] == 1, own[0][shown] == 1)

    with pytest.raises(InputError, match="has findings that the vocabulary chexpert lacks"):
        FindingsReader(store, "chexpert")

    metrics: dict[str, Any] = json.loads((tmp_path / "index" / "metrics.json").read_text())
    for name in ("jaccard_random", "jaccard_tfidf", "jaccard_rerank", "jaccard_oracle"):
        assert 0 <= metrics[name] <= metrics["jaccard_oracle"]
        assert 0 <= metrics[f"{name}_visible"] <= metrics["jaccard_oracle_visible"]
        kind = name.removeprefix("jaccard_")
        for k in (1, 5, 10):
            assert 0 <= metrics[f"recall_at_{k}_{kind}"] <= metrics[f"recall_at_{k}_oracle"]
    assert metrics["jaccard_at_1"]["value"] <= metrics["jaccard_oracle"]
    assert "coronary calcification" not in metrics["findings_visible"]
    assert "pleural effusion" in metrics["findings_visible"]
    for word in ("random", "TF-IDF", "re-ranked", "oracle", "same findings set among the nearest 5"):
        assert word in printed


def test_an_expert_without_text_takes_a_report_encoder(
    cohort: Path, tiny_preset: Path, images_alone: Path, bert: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert index(cohort, tiny_preset, run, images_alone, f"report_encoder={bert}") == 0
    teacher, store = open_teacher(str(images_alone), None, str(run / "index" / "artefact"))
    assert (store.key_dim, store.value_dim, store.config["report_encoder"]["text_dim"]) == (32, 16, 32)
    encoder = open_queries(teacher, store)
    assert encoder.fingerprint() == store.upstream["report-encoder"] == store.config["made_from"]["report-encoder"]
    assert str(bert) not in (run / "index" / "artefact" / "artefact.json").read_text()
    ct = read_manifest(cohort / "ct.csv", check_images=False)
    train = ct.split("train")
    mean = encoder.encode_text([train.report(row) for row in train.frame.index]).mean(0)
    texts = encoder.encode_text(pool_reports(store, cohort))
    similarity, _ = store.search(texts[:3], 1)
    expected = (centred(texts[:3], mean) @ centred(texts, texts.mean(0)).T).max(dim=1).values
    assert torch.allclose(similarity[:, 0], expected, atol=1e-5)

    changed = tmp_path / "bert"
    changed.mkdir()
    for path in bert.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(changed / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][0] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    place = run / "index" / "artefact" / "report_encoder.json"
    place.write_text(json.dumps({"source": str(changed), "revision": None}))
    with pytest.raises(InputError, match="report encoder that the index"):
        open_queries(*open_teacher(str(images_alone), None, str(run / "index" / "artefact")))
    place.unlink()
    with pytest.raises(InputError, match=r"report_encoder\.json: no readable source"):
        XrayIndexArtefact.open(run / "index" / "artefact")


def test_images_are_found_without_reports_and_then_nothing_is_re_ranked(
    cohort: Path, tiny_preset: Path, expert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(cohort, data)
    table = pd.read_csv(data / "xray.csv", dtype=str, keep_default_na=False)
    silent = table.index[table["split"] == "train"][:5]
    table.loc[silent, ["findings", "impression"]] = ""
    table.to_csv(data / "xray.csv", index=False)
    sizes = {}
    for key in ("image", "text"):
        assert index(data, tiny_preset, tmp_path / key, expert, f"key={key}") == 0
        store = XrayIndexArtefact.open(tmp_path / key / "index" / "artefact")
        sizes[key] = len(store)
        assert (store.findings is None) == (key == "image")
    assert sizes["image"] - sizes["text"] == 5
    assert "index: excluded 5 X-rays (no report text)" in capsys.readouterr().out
    store = XrayIndexArtefact.open(tmp_path / "image" / "index" / "artefact")
    with pytest.raises(InputError, match="built without them"):
        FindingsReader(store, "ct-rate")
    metrics = json.loads((tmp_path / "image" / "index" / "metrics.json").read_text())
    assert metrics["jaccard_tfidf"] is not None
    assert "jaccard_rerank" not in metrics


def test_what_does_not_fit_together_is_refused(images_alone: Path, expert: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text tower, so reports cannot be embedded"):
        IndexTask(str(images_alone))
    with pytest.raises(InputError, match="key both compares reports with images"):
        IndexTask(str(expert), key="both", report_encoder=str(bert))
    with pytest.raises(InputError, match="key image compares reports with images"):
        IndexTask(str(images_alone), key="image", report_encoder=str(bert))
    with pytest.raises(InputError, match="which has no text tower"):
        open_report_encoder(str(images_alone))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not a text encoder"):
        open_report_encoder(str(tmp_path))


def test_a_report_encoder_is_frozen_and_pools_chunks(bert: Path, expert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder = open_report_encoder(str(bert))
    assert isinstance(encoder.train(), FrozenReportEncoder)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    tokens = AutoTokenizer.from_pretrained(str(bert))(REPORTS, padding=True, return_tensors="pt")
    states = (
        AutoModel.from_pretrained(str(bert))
        .eval()(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        .last_hidden_state
    )
    mask = tokens["attention_mask"][..., None].float()
    assert torch.allclose(encoder.encode_text(REPORTS), F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1),
                          atol=1e-6)  # fmt: skip
    long = " ".join(f"{REPORTS[0]} {REPORTS[1]}" for _ in range(8))
    chunks = encoder.encoder.chunks(long)  # type: ignore[operator]
    assert len(chunks) > 2
    mean = encoder.encoder(chunks).mean(0)
    assert torch.allclose(encoder.encode_text([long])[0], F.normalize(mean, dim=0), atol=1e-6)
    assert torch.allclose(encoder.encode_text([long, *REPORTS], batch_size=1), encoder.encode_text([long, *REPORTS]),
                          atol=1e-6)  # fmt: skip
    assert encoder.encode_text([]).shape == (0, 32)

    tower = open_report_encoder(str(expert))
    assert tower.fingerprint() == open_expert(str(expert)).fingerprint()
    assert torch.allclose(tower.encode_text([long]), open_expert(str(expert)).encode_text([long]), atol=1e-6)
