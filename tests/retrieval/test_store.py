"""The index artefact and the shards of a predict job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.checkpoint import write_artefact
from ctx_distill.retrieval.index import XrayIndex, faiss_module
from ctx_distill.retrieval.shards import kept_rows, merge_shards, open_shards, standing_blocks, write_shard
from ctx_distill.retrieval.store import XrayIndexArtefact, write_index_artefact
from ctx_distill.types import InputError

UPSTREAM = {"xray-expert": "e" * 64, "xray-manifest": "m" * 64}
TEXTS = ["", 'Effusion, "small".\nNo nodule.', "NA", *(f"Report {i} – clear\r\nlungs" for i in range(27))]


def unit(rows: int, dimension: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed)), dim=-1)


def items(rows: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "study_id": [f"{i:03d}" for i in range(rows)],
            "image_id": [f"im{i}" for i in range(rows)],
            "patient_id": [f"{i // 2:02d}" for i in range(rows)],
            "row": [2 * i for i in range(rows)],
            "split": "train",
        }
    )


def write(folder: Path, rows: int = 30, **options: object) -> XrayIndexArtefact:
    arguments: dict[str, object] = {"upstream": UPSTREAM, "config": {"key": "text"}, **options}
    return write_index_artefact(folder, unit(rows, 6, 0), unit(rows, 4, 1), items(rows), **arguments)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    findings = torch.randint(-1, 2, (30, 3)).float()
    write(tmp_path / "artefact", texts=TEXTS, findings=findings, finding_names=["a", "b", "c"])
    store = XrayIndexArtefact.open(tmp_path / "artefact", verify=True)
    assert (len(store), store.key_dim, store.value_dim) == (30, 6, 4)
    assert store.expert_fingerprint == UPSTREAM["xray-expert"]
    assert store.config["key"] == "text"
    assert store.config["finding_names"] == ["a", "b", "c"]
    assert store.findings is not None
    assert torch.equal(store.findings, findings)
    assert store.items.columns.tolist() == [
        "position", "study_id", "image_id", "patient_id", "row", "split", "report",
    ]  # fmt: skip
    assert store.items.drop(columns=["position", "report"]).equals(items(30))
    assert store.items["position"].tolist() == list(range(30))
    assert store.items["report"].tolist() == TEXTS
    positions = torch.tensor([[3, 0], [29, 3]])
    assert torch.equal(store.values(positions), unit(30, 4, 1)[positions])
    assert store.values(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, 4)
    assert store.search(unit(30, 6, 0), 1)[1][:, 0].tolist() == list(range(30))


def test_values_are_mapped_and_may_be_half(tmp_path: Path) -> None:
    store = write(tmp_path / "artefact", value_type="float16")
    assert store.features.dtype == torch.float16
    assert str(tmp_path / "artefact" / "model.safetensors") in Path("/proc/self/maps").read_text()
    values = store.values(torch.arange(30))
    assert values.dtype == torch.float32
    assert torch.allclose(values, unit(30, 4, 1), atol=1e-3)


def test_the_fingerprint_covers_content_and_origin(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    other_items = items(30).assign(row=lambda table: table["row"] + 1)
    others = [
        write(tmp_path / "c", upstream={**UPSTREAM, "xray-expert": "f" * 64}),
        write(tmp_path / "d", texts=["x"] * 30),
        write(tmp_path / "e", config={"key": "image"}),
        write_index_artefact(tmp_path / "f", unit(30, 6, 0), unit(30, 4, 2), items(30), UPSTREAM, {"key": "text"}),
        write_index_artefact(tmp_path / "g", unit(30, 6, 0), unit(30, 4, 1), other_items, UPSTREAM, {"key": "text"}),
    ]
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_parts_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    keys, values = unit(30, 6, 0), unit(30, 4, 1)
    with pytest.raises(ValueError, match="30 keys but"):
        write_index_artefact(tmp_path / "a", keys, values[:29], items(30), UPSTREAM, {})
    with pytest.raises(ValueError, match="lack patient_id, split"):
        write_index_artefact(tmp_path / "a", keys, values, items(30).drop(columns=["patient_id", "split"]), {}, {})
    with pytest.raises(ValueError, match="needs the xray-expert fingerprint"):
        write_index_artefact(tmp_path / "a", keys, values, items(30), {}, {})
    values[7, 2] = float("inf")
    with pytest.raises(InputError, match="value 7 of the X-ray index is not finite"):
        write_index_artefact(tmp_path / "a", keys, values, items(30), UPSTREAM, {})
    assert list(tmp_path.iterdir()) == []


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def _swap_index(folder: Path) -> None:
    write(folder.parent / "other", rows=12)
    (folder / "index.faiss").write_bytes((folder.parent / "other" / "index.faiss").read_bytes())


def _swap_weights(folder: Path) -> None:
    write(folder.parent / "other", rows=12)
    (folder / "model.safetensors").write_bytes((folder.parent / "other" / "model.safetensors").read_bytes())


def _swap_table_line(folder: Path) -> None:
    lines = (folder / "items.csv").read_text().splitlines(keepends=True)
    (folder / "items.csv").write_text("".join([*lines[:3], lines[4], lines[3], *lines[5:]]))


def _no_expert(folder: Path) -> None:
    record = json.loads((folder / "artefact.json").read_text())
    (folder / "artefact.json").write_text(json.dumps({**record, "upstream": {}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("artefact.json"), "no xray-index artefact"),
        (_remove("items.csv"), r"items.csv: missing .* Run stage 1"),
        (_remove("index.faiss"), "index.faiss: missing"),
        (_remove("model.safetensors"), "model.safetensors: missing"),
        (_cut("items.csv"), "items.csv: changed since"),
        (_cut("index.faiss"), "not a readable FAISS index"),
        (_cut("model.safetensors"), "model.safetensors: not a readable feature file"),
        (_swap_index, r"parts of the index do not match \(artefact.json 30 x 6, .* index.faiss 12 x 6"),
        (_swap_weights, "parts of the index do not match"),
        (_swap_table_line, "items.csv: changed since"),
        (_no_expert, "has no xray-expert fingerprint"),
    ],
)
def test_damage_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "artefact")
    damage(tmp_path / "artefact")
    with pytest.raises(InputError, match=message):
        XrayIndexArtefact.open(tmp_path / "artefact")


def test_a_flipped_bit_is_found_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "artefact")
    path = tmp_path / "artefact" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="does not match the artefact's fingerprint"):
        XrayIndexArtefact.open(tmp_path / "artefact", verify=True)


def test_another_kind_and_other_tensors_are_refused(tmp_path: Path) -> None:
    write_artefact(tmp_path / "other", "ct-encoder", {}, {"x": torch.ones(1)})
    with pytest.raises(InputError, match="contains the artefact ct-encoder; expected xray-index"):
        XrayIndexArtefact.open(tmp_path / "other")


def shards(folder: Path, parts: list[list[int]]) -> None:
    """Keys and values hold their row's number, so that a wrong order shows."""
    for rank, rows in enumerate(parts):
        row = torch.tensor(rows, dtype=torch.int64)
        keys, values = row[:, None].float().expand(-1, 3), -row[:, None].float().expand(-1, 2)
        write_shard(folder, rank, len(parts), keys, values, row)


def test_merge_restores_the_order_asked_for(tmp_path: Path) -> None:
    shards(tmp_path, [[4, 0, 20], [], [7, 2]])
    wanted = [2, 4, 0, 20, 7]
    merged = merge_shards(tmp_path, wanted)
    assert merged["row"].tolist() == wanted
    assert np.array_equal(merged["keys"], np.array(wanted)[:, None].repeat(3, 1))
    assert np.array_equal(merged["values"], -np.array(wanted)[:, None].repeat(2, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"shard-000000-{rank:05d}.safetensors" for rank in range(3)
    ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0, 1], [1, 2]], r"1 duplicated \(first: row 1\)"),
        ([[0], [2]], r"1 missing \(first: row 1\)"),
        ([[0, 1], [2, 9]], r"1 not expected \(first: row 9\)"),
    ],
)
def test_every_row_must_be_there_exactly_once(tmp_path: Path, parts: list[list[int]], message: str) -> None:
    shards(tmp_path, parts)
    with pytest.raises(InputError, match=message):
        merge_shards(tmp_path, [0, 1, 2])


def test_missing_left_over_and_torn_shards(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has shards of ranks \[\]"):
        merge_shards(tmp_path, [0])
    shards(tmp_path, [[0], [1], [2]])
    (tmp_path / "shard-000000-00001.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"ranks \[0, 2\] of runs with \[3\] ranks, 2 in 1 blocks; expected every rank of one run"
    ):
        merge_shards(tmp_path, [0, 2])
    shards(tmp_path, [[0], [1]])
    with pytest.raises(InputError, match=r"runs with \[2, 3\] ranks"):
        merge_shards(tmp_path, [0, 1])
    (tmp_path / "shard-000000-00002.safetensors").unlink()
    assert merge_shards(tmp_path, [1, 0])["row"].tolist() == [1, 0]
    with pytest.raises(InputError, match="rows requested twice"):
        merge_shards(tmp_path, [1, 0, 1])
    (tmp_path / "shard-000000-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"shard-000000-00000.safetensors: not a readable shard"):
        merge_shards(tmp_path, [0, 1])


def test_blocks_join_and_those_that_stand_are_known(tmp_path: Path) -> None:
    open_shards(tmp_path / "shards", "a", 2, 2)
    for block, rank, rows in ((0, 0, [4, 2]), (0, 1, [3]), (1, 1, [9]), (1, 0, [7])):
        row = torch.tensor(rows)
        write_shard(tmp_path / "shards", rank, 2, row[:, None].float(), -row[:, None].float(), row, block)
    open_shards(tmp_path / "shards", "a", 2, 2)
    assert standing_blocks(tmp_path / "shards", 2, 3) == [0, 1]
    merged = merge_shards(tmp_path / "shards", [2, 3, 4, 7, 9])
    assert merged["keys"][:, 0].tolist() == (-merged["values"][:, 0]).tolist() == [2, 3, 4, 7, 9]
    torn = tmp_path / "shards" / "shard-000001-00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:40])
    assert standing_blocks(tmp_path / "shards", 2, 3) == [0]
    torn.unlink()
    assert standing_blocks(tmp_path / "shards", 2, 3) == [0]
    with pytest.raises(InputError, match="3 in 2 blocks; expected every rank of one run in every block"):
        merge_shards(tmp_path / "shards", [2, 3, 4, 9])
    open_shards(tmp_path / "shards", "b", 2, 2)
    assert standing_blocks(tmp_path / "shards", 2, 3) == []


def test_another_layout_keeps_what_is_embedded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shards"

    def write_part(rank: int, ranks: int, rows: list[int], block: int) -> Path:
        row = torch.tensor(rows)
        return write_shard(folder, rank, ranks, row[:, None].float(), -row[:, None].float(), row, block)

    assert open_shards(folder, "a", 2, 2) == 0
    for block, rank, rows in ((0, 0, [0, 2]), (0, 1, [1, 3]), (1, 0, [4, 6])):
        write_part(rank, 2, rows, block)
    write_part(1, 2, [5, 7], 1).write_bytes(b"damaged")
    assert kept_rows(folder, 0).tolist() == []
    assert capsys.readouterr().out == ""

    # Three ranks: the parts that can be read stay, and the new blocks begin behind them.
    assert open_shards(folder, "a", 3, 2) == 2
    assert capsys.readouterr().out == (
        f"{folder}: 3 shards of 2 ranks in parts of 2 are kept; 3 ranks embed the rest in parts of 2\n"
    )
    assert open_shards(folder, "a", 3, 2) == 2
    assert capsys.readouterr().out == ""
    assert sorted(kept_rows(folder, 2).tolist()) == [0, 1, 2, 3, 4, 6]
    assert standing_blocks(folder, 3, 2, first_block=2) == []
    write_part(0, 3, [5, 9], 2)
    write_part(1, 3, [7], 2)
    with pytest.raises(InputError, match="ranks \\[0, 1\\] of runs with \\[3\\] ranks, 2 in 1 blocks"):
        merge_shards(folder, range(10), first_block=2)
    write_part(2, 3, [8], 2)
    assert standing_blocks(folder, 3, 2, first_block=2) == [2]
    assert merge_shards(folder, range(10), first_block=2)["keys"][:, 0].tolist() == list(range(10))

    # Back on two ranks nothing is left to embed.
    assert open_shards(folder, "a", 2, 2) == 3
    assert sorted(kept_rows(folder, 3).tolist()) == list(range(10))
    assert merge_shards(folder, range(10), first_block=3)["row"].tolist() == list(range(10))

    capsys.readouterr()
    assert open_shards(folder, "b", 2, 2) == 0
    assert "the pool is embedded from the start" in capsys.readouterr().out
    assert not list(folder.glob("shard-*"))


def test_shards_of_an_earlier_version_are_embedded_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards(tmp_path, [[0], [1]])
    (tmp_path / "shards.json").write_text(json.dumps({"request": "a"}))
    assert open_shards(tmp_path, "a", 2, 1) == 0
    assert "has shards of other inputs, settings or versions" in capsys.readouterr().out
    assert standing_blocks(tmp_path, 2, 1) == []


def test_keys_that_differ_in_their_last_bits_are_stored_as_one(tmp_path: Path) -> None:
    keys, values = unit(30, 6, 0), unit(30, 4, 1)
    noise = 1e-7 * torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    keys[[5, 9, 17, 29]] = keys[3] + noise
    keys[20] = F.normalize(keys[3] + 1e-3, dim=0)
    store = write_index_artefact(tmp_path / "artefact", keys, values, items(30), UPSTREAM, {})
    assert (tmp_path / "artefact" / "equal_keys.safetensors").is_file()
    expected = keys.clone()
    expected[[5, 9, 17, 29]] = keys[3]
    assert torch.equal(store.keys, expected)
    assert len(store) == len(store.index) == 30
    similarity, position = store.search(keys[3:4], 6)
    assert position.tolist() == [[3, 5, 9, 17, 29, 20]]
    assert similarity[0, :5].unique().numel() == 1
    for placement in ("replicated", "sharded"):
        opened = XrayIndexArtefact.open(tmp_path / "artefact", "cpu", placement=placement)  # type: ignore[arg-type]
        for k in (1, 4, 30):
            for mine, theirs in zip(opened.search(keys, k), store.search(keys, k), strict=True):
                assert torch.equal(mine, theirs)


def _cut_table(folder: Path) -> None:
    content = (folder / "equal_keys.safetensors").read_bytes()
    (folder / "equal_keys.safetensors").write_bytes(content[:50])


def _table_of_others(folder: Path) -> None:
    keys = unit(30, 6, 0)
    keys[3:9] = keys[2]
    write_index_artefact(folder.parent / "other", keys, unit(30, 4, 1), items(30), UPSTREAM, {})
    other = (folder.parent / "other" / "equal_keys.safetensors").read_bytes()
    (folder / "equal_keys.safetensors").write_bytes(other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _remove("equal_keys.safetensors"),
            r"parts of the index do not match .*model.safetensors 30 x 6, index.faiss 29 x 6",
        ),
        (_cut_table, "equal_keys.safetensors: not a readable table"),
        (_table_of_others, "has 24 distinct keys, but index.faiss has 29"),
    ],
)
def test_a_damaged_table_of_equal_keys_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    keys = unit(30, 6, 0)
    keys[4] = keys[2]
    write_index_artefact(tmp_path / "artefact", keys, unit(30, 4, 1), items(30), UPSTREAM, {})
    damage(tmp_path / "artefact")
    with pytest.raises(InputError, match=message):
        XrayIndexArtefact.open(tmp_path / "artefact")


def test_an_artefact_without_a_table_of_equal_keys_is_searched_alike(tmp_path: Path) -> None:
    """As written before there were such tables: the index holds every key."""
    keys = unit(60, 6, 0)
    keys[10:50] = keys[2]
    store = write_index_artefact(tmp_path / "artefact", keys, unit(60, 4, 1), items(60), UPSTREAM, {})
    shutil.copytree(tmp_path / "artefact", tmp_path / "old")
    (tmp_path / "old" / "equal_keys.safetensors").unlink()
    flat = faiss_module().IndexFlatIP(6)
    flat.add(keys.numpy())
    XrayIndex(flat, "exact", "cpu").save(tmp_path / "old" / "index.faiss")
    old = XrayIndexArtefact.open(tmp_path / "old", "cpu")
    assert old.fingerprint == store.fingerprint
    for k in (1, 8, 45, 60):
        for mine, theirs in zip(old.search(keys, k), store.search(keys, k), strict=True):
            assert torch.equal(mine, theirs)
