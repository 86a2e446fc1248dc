"""Train a WordPiece tokenizer on reports, in Hugging Face format, for text towers and the report decoder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ctx_distill.errors import InputError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens, with ids 0 to 4 in every vocabulary."""

WORD = r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:-[^\W\d_]+)*|[^\w\s]|_"
"""Numbers with decimals, hyphenated words, and single marks, so that decoding restores "8.5 mm"."""


def train_wordpiece(texts: Iterable[str], vocab_size: int, out_folder: Path, context_length: int) -> Any:
    """Train a lower-case WordPiece tokenizer and save it for AutoTokenizer and open_clip.

    The same texts in the same order give the same vocabulary. Texts become "[CLS] words [SEP]".

    Args:
        texts: reports; empty ones are skipped.
        vocab_size: max vocabulary size including special tokens; small corpora give fewer.
        out_folder: folder for `tokenizer.json` and `tokenizer_config.json`.
        context_length: the tokenizer's `model_max_length`.

    Returns:
        The tokenizer from `AutoTokenizer.from_pretrained(out_folder)`.

    Raises:
        InputError: there is no text, or `vocab_size` does not exceed the number of special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    corpus = [text for text in texts if text.strip()]
    if not corpus:
        raise InputError(
            "tokenizer: no report has text to train a vocabulary; expected text in column findings or impression of"
            " the train split"
        )
    if vocab_size <= len(SPECIAL_TOKENS):
        raise InputError(f"tokenizer: vocab_size is {vocab_size}; expected more than {len(SPECIAL_TOKENS)}")
    normalizer = normalizers.BertNormalizer(lowercase=True)
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(WORD), behavior="isolated")]
    )

    def blank(vocabulary: dict[str, int]) -> Any:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, split
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
        return tokenizer

    # The trainer numbers inner characters ("##a") in the order of a randomly seeded hash map and breaks ties by number,
    # so equal runs would differ. Passing them as special tokens fixes their numbers.
    characters = sorted({c for text in corpus for c in normalizer.normalize_str(text) if not c.isspace()})
    fixed = [*SPECIAL_TOKENS, *(f"##{c}" for c in characters)]
    trained = blank({})
    trained.train_from_iterator(
        corpus,
        trainers.WordPieceTrainer(vocab_size=vocab_size, min_frequency=1, special_tokens=fixed, show_progress=False),
    )
    tokenizer = blank(trained.get_vocab())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    out_folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        clean_up_tokenization_spaces=True,
    ).save_pretrained(str(out_folder))
    return AutoTokenizer.from_pretrained(str(out_folder))
