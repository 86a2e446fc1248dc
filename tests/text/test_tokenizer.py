"""The WordPiece vocabulary: deterministic, readable both ways, loadable by transformers and open_clip."""

import subprocess
import sys
from pathlib import Path

import pytest

from ctx_distill.text.tokenizer import SPECIAL_TOKENS, train_wordpiece
from ctx_distill.types import InputError

REPORTS = [
    "The heart is enlarged. No pleural effusion.",
    "There is a small ground-glass nodule in the right upper lobe, 8.5 mm.",
    "",
    "The lungs are clear, no pneumothorax.",
] * 4


def test_special_tokens_come_first_and_ids_are_dense(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(REPORTS, 200, tmp_path, 32)
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id) == (
        0,
        2,
        3,
        4,
    )
    ids = tokenizer("heart")["input_ids"]
    assert ids[0] == 2
    assert ids[-1] == 3


def test_decoding_gives_the_text_back(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(REPORTS, 300, tmp_path, 64)
    for text in (REPORTS[0], REPORTS[1]):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text.lower()


def test_offsets_point_into_the_text(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(REPORTS, 300, tmp_path, 64)
    out = tokenizer(REPORTS[0], return_offsets_mapping=True)
    pieces = [REPORTS[0][a:b].lower() for a, b in out["offset_mapping"][1:-1]]
    tokens = [token.removeprefix("##") for token in tokenizer.convert_ids_to_tokens(out["input_ids"])[1:-1]]
    assert pieces == tokens


def test_the_same_texts_give_the_same_files_in_another_process(tmp_path: Path) -> None:
    train_wordpiece(REPORTS, 80, tmp_path / "a", 32)
    code = (
        "import sys; from pathlib import Path; from ctx_distill.text.tokenizer import train_wordpiece;"
        f"train_wordpiece({REPORTS!r}, 80, Path(sys.argv[1]), 32)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_loads_in_transformers_and_open_clip(tmp_path: Path) -> None:
    from open_clip.tokenizer import HFTokenizer
    from transformers import AutoTokenizer

    tokenizer = train_wordpiece(REPORTS, 200, tmp_path, 24)
    ids = tokenizer(REPORTS[1], padding="max_length", truncation=True, max_length=24)["input_ids"]
    assert AutoTokenizer.from_pretrained(str(tmp_path)).model_max_length == 24
    assert HFTokenizer(str(tmp_path), context_length=24)(REPORTS[1])[0].tolist() == ids


def test_characters_never_seen_become_unknown(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(REPORTS, 200, tmp_path, 24)
    assert tokenizer("Ω")["input_ids"] == [2, 1, 3]


def test_no_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no report has text"):
        train_wordpiece(["", "  "], 100, tmp_path, 32)
    with pytest.raises(InputError, match="vocab_size is 5"):
        train_wordpiece(REPORTS, 5, tmp_path, 32)
