"""How far the COCO scores without Java are from those of the whole COCO caption tools, on the reports of a CSV (needs Java).

The first half of the reports are the references, the second half the hypotheses.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
from pathlib import Path

import pandas as pd
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from ctx_distill.metrics.captions import caption_scores, caption_tokens


def main() -> None:
    """Print how many reports are cut alike, and the scores of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path)
    parser.add_argument("--column", default="report_text")
    parser.add_argument("--rows", type=int, default=600, help="an even number")
    asked = parser.parse_args()
    column = pd.read_csv(asked.reports)[asked.column].astype(str)[: asked.rows]
    texts = [" ".join(text.split()) for text in column]
    cut = PTBTokenizer().tokenize({place: [{"caption": text}] for place, text in enumerate(texts)})
    alike, words, places = 0, 0, 0
    for place, text in enumerate(texts):
        theirs, own = cut[place][0].split(), caption_tokens(text).split()
        alike, words = alike + (theirs == own), words + len(theirs)
        edits = difflib.SequenceMatcher(None, theirs, own, autojunk=False).get_opcodes()
        places += sum(kind != "equal" for kind, *_ in edits)
    print(f"{alike} of {len(texts)} reports are cut alike; {places} differences in {words:,} words")
    half = len(texts) // 2
    true, said = ({place: cut[start + place] for place in range(half)} for start in (0, half))
    with contextlib.redirect_stdout(io.StringIO()):
        bleu = Bleu(4).compute_score(true, said)[0]
    theirs_by_key = {f"coco_bleu{order}": value for order, value in enumerate(bleu, start=1)}
    theirs_by_key |= {
        "coco_rouge_l": Rouge().compute_score(true, said)[0],
        "cider": Cider().compute_score(true, said)[0],
    }
    scores, _ = caption_scores(texts[:half], texts[half : 2 * half])
    for key, value in theirs_by_key.items():
        print(f"{key:14}{value:.4f} the tools, {scores[key]:.4f} here")


if __name__ == "__main__":
    main()
