"""A WordPiece vocabulary trained on reports, in the Hugging Face format, for text towers and the report decoder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ctx_distill.errors import InputError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In this order, so their ids are 0 to 4 in every vocabulary."""


def train_wordpiece(texts: Iterable[str], vocab_size: int, out_folder: Path, context_length: int) -> Any:
    """Train a lower-case WordPiece tokenizer and save it where AutoTokenizer and open_clip find it.

    The same texts in the same order give the same vocabulary. Texts become "[CLS] words [SEP]".

    Args:
        texts: reports; empty ones are passed over.
        vocab_size: largest vocabulary, special tokens included; small corpora give smaller ones.
        out_folder: where `tokenizer.json` and `tokenizer_config.json` are written.
        context_length: the tokenizer's `model_max_length`.

    Returns:
        The tokenizer as `AutoTokenizer.from_pretrained(out_folder)` gives it.

    Raises:
        InputError: there are no texts, or `vocab_size` leaves no room beside the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    corpus = [text for text in texts if text.strip()]
    if not corpus:
        raise InputError(
            "tokenizer: no report has any text, so no vocabulary can be trained. Expected text in the columns findings"
            " or impression of the train split."
        )
    if vocab_size <= len(SPECIAL_TOKENS):
        raise InputError(f"tokenizer: vocab_size is {vocab_size}, expected more than {len(SPECIAL_TOKENS)}.")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=1, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
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
