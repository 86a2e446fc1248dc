"""The report decoder: it reads the CT tokens, and comes back from its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ctx_distill.models.decoder_artefact import load_decoder, save_decoder
from ctx_distill.models.decoder_sources import pretrained_decoder, small_decoder
from ctx_distill.models.report_decoder import ReportDecoder
from ctx_distill.types import InputError

TEXTS = ["there is a small nodule in the right upper lobe, 8.5 mm.", "no pleural effusion. the heart is enlarged."]


def loss_of(model: ReportDecoder, tokens: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits, targets = model(tokens, **batch)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def fit(model: ReportDecoder, tokens: torch.Tensor, steps: int = 120) -> float:
    batch = model.tokenize(TEXTS)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tokens, batch)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportDecoder, torch.Tensor]:
    torch.manual_seed(0)
    model = small_decoder(
        TEXTS * 3, tmp_path_factory.mktemp("tok"), token_dim=8, num_tokens=5, vocab_size=200, width=32, layers=1,
        max_length=48, dropout=0.0,
    )  # fmt: skip
    tokens = torch.randn(2, 5, 8)
    assert fit(model, tokens) < 0.1
    return model, tokens


def test_it_learns_to_say_what_the_tokens_show(trained: tuple[ReportDecoder, torch.Tensor]) -> None:
    model, tokens = trained
    model.train()
    assert model.generate(tokens, max_new_tokens=40) == TEXTS
    assert model.generate(tokens.flip(0), max_new_tokens=40) == TEXTS[::-1]
    assert model.generate(tokens, max_new_tokens=40, num_beams=3) == TEXTS
    assert model.training
    assert all(len(text.split()) <= 3 for text in model.generate(tokens, max_new_tokens=3))


def test_it_comes_back_from_its_folder(trained: tuple[ReportDecoder, torch.Tensor], tmp_path: Path) -> None:
    model, tokens = trained
    saved = save_decoder(model, tmp_path / "a", {"dual-encoder": "abc"})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    again, artefact = load_decoder(tmp_path / "b")
    assert artefact.fingerprint == saved.fingerprint
    for kwargs in ({}, {"num_beams": 2, "no_repeat_ngram_size": 3}):
        assert again.generate(tokens, 40, **kwargs) == model.generate(tokens, 40, **kwargs)
    batch = again.tokenize(TEXTS)
    assert torch.allclose(loss_of(again, tokens, batch), loss_of(model.eval(), tokens, batch))


def test_the_loss_is_the_mean_over_the_words(trained: tuple[ReportDecoder, torch.Tensor]) -> None:
    model, tokens = trained
    model.eval()
    both = model.tokenize(TEXTS)
    assert (both["labels"] == -100).sum() == (both["attention_mask"] == 0).sum() > 0
    single = [model.tokenize([text]) for text in TEXTS]
    losses = [loss_of(model, tokens[i : i + 1], batch) for i, batch in enumerate(single)]
    words = [batch["input_ids"].shape[1] - 1 for batch in single]
    expected = sum(loss * n for loss, n in zip(losses, words)) / sum(words)
    assert torch.allclose(loss_of(model, tokens, both), expected, atol=1e-5)
    assert model.tokenize(["heart " * 100])["input_ids"].shape == (1, 48)


def test_gradients_reach_the_ct_tokens(trained: tuple[ReportDecoder, torch.Tensor]) -> None:
    model, tokens = trained
    tokens = tokens.clone().requires_grad_()
    loss_of(model, tokens, model.tokenize(["the heart is enlarged.", "no nodule."])).backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_a_pretrained_language_model(tmp_path: Path) -> None:
    """GPT-2 and BERT folders gain cross-attention; the rest keeps its weights."""
    from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

    from ctx_distill.text.tokenizer import train_wordpiece

    tokenizer = train_wordpiece(TEXTS, 200, tmp_path / "gpt2", 32)
    tokenizer.save_pretrained(tmp_path / "bert")
    size = len(tokenizer)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    gpt2.save_pretrained(tmp_path / "gpt2")
    BertLMHeadModel(
        BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                   max_position_embeddings=32, is_decoder=True)
    ).save_pretrained(tmp_path / "bert")  # fmt: skip
    tokens = torch.randn(2, 3, 8)
    for name in ("gpt2", "bert"):
        model = pretrained_decoder(str(tmp_path / name), token_dim=8, max_length=32)
        assert loss_of(model, tokens, model.tokenize(TEXTS)).isfinite()
        texts = model.eval().generate(tokens, 8)
        save_decoder(model, tmp_path / f"{name}-artefact", {})
        assert load_decoder(tmp_path / f"{name}-artefact")[0].generate(tokens, 8) == texts
        if name == "gpt2":
            assert torch.equal(model.decoder.transformer.wte.weight, gpt2.transformer.wte.weight)


def test_refusals(trained: tuple[ReportDecoder, torch.Tensor], tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model, tokens = trained
    with pytest.raises(InputError, match=r"CT tokens of shape \(2, 4, 8\), expected \(B, 5, 8\)"):
        model.generate(tokens[:, :4])
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=6))
    with pytest.raises(InputError, match="GPT2LMHeadModel has no cross-attention, so the 5 CT tokens"):
        ReportDecoder(plain, model.tokenizer, 8, 5)
    with pytest.raises(InputError, match="no report-decoder artefact"):
        load_decoder(tmp_path)
