"""How reports are written (beams, sampling, limits), and the decoders that can write them: GPT-2, Llama, with LoRA."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.models.decoder_artefact import load_decoder, save_decoder
from ctx_distill.models.decoder_sources import pretrained_decoder
from ctx_distill.models.lora import LoraSettings
from ctx_distill.models.report_decoder import ReportDecoder
from ctx_distill.models.sampling import GumbelNoise, SamplingSettings
from ctx_distill.text.tokenizer import train_wordpiece
from ctx_distill.types import InputError

TEXTS = ["there is a small nodule in the right upper lobe, 8.5 mm.", "no pleural effusion. the heart is enlarged."]
TOKENS = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights as the hub would hold it."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("hub") / str(request.param)
    words = len(train_wordpiece(TEXTS, 200, place, 64))
    torch.manual_seed(3)
    model = (
        GPT2LMHeadModel(GPT2Config(vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=64))
        if request.param == "gpt2"
        else LlamaForCausalLM(
            LlamaConfig(vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
        )
    )  # fmt: skip
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> ReportDecoder:
    torch.manual_seed(0)
    made = pretrained_decoder(str(folder), token_dim=8, num_tokens=3, max_length=40)
    for parameter in made.parameters():  # far from uniform, so that no choice hangs on a last bit
        parameter.data *= 3
    return made.eval()


@torch.no_grad()
def by_hand(model: ReportDecoder, tokens: Tensor, longest: int) -> str:
    """The likeliest next word, one at a time, without a cache."""
    ids = [model._start]
    while len(ids) <= longest and (len(ids) == 1 or ids[-1] != model._end):
        row = torch.tensor(
            [[*ids, model._pad]]
        )  # forward drops the last place: a word more, which nothing before it sees
        logits, _ = model(tokens[None], row, torch.ones_like(row))
        ids.append(int(logits[0, -1].argmax()))
    return str(model.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_one_beam_is_greedy_in_any_company(model: ReportDecoder) -> None:
    expected = [by_hand(model, tokens, 12) for tokens in TOKENS]
    assert len(set(expected)) > 1
    assert model.generate(TOKENS, 12, num_beams=1) == expected
    assert [model.generate(TOKENS[i : i + 1], 12)[0] for i in range(3)] == expected


def test_beams_find_the_likeliest_of_all(model: ReportDecoder) -> None:
    """With as many beams as words, two words are searched whole."""
    words = model.decoder.config.vocab_size
    pairs = torch.cartesian_prod(torch.arange(words), torch.arange(words))
    pairs = pairs[(pairs != model._end).all(1)]
    rows = torch.cat([torch.full((len(pairs), 1), model._start), pairs], dim=1)
    with torch.no_grad():
        logits, targets = model(TOKENS[:1].expand(len(rows), -1, -1), rows, torch.ones_like(rows))
    scores = -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
    best = model.tokenizer.decode(pairs[scores.argmax()], skip_special_tokens=True)
    found = model.generate(TOKENS[:1], 2, num_beams=words, min_new_tokens=2)
    assert found == [best.strip()]


@pytest.fixture
def written(model: ReportDecoder, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of every report that is written from now on, without start and padding."""
    rows: list[list[int]] = []
    decode = type(model.tokenizer).batch_decode

    def watch(self: object, ids: Tensor, **kwargs: object) -> object:
        new = ids if model.prefix else ids[:, 1:]
        rows.extend([number for number in row if number != model._pad] for row in new.tolist())
        return decode(self, ids, **kwargs)

    monkeypatch.setattr(type(model.tokenizer), "batch_decode", watch)
    return rows


@pytest.mark.parametrize("beams", [1, 3])
def test_no_group_of_words_comes_twice(model: ReportDecoder, written: list[list[int]], beams: int) -> None:
    def repeats(rows: list[list[int]]) -> int:
        groups = [list(itertools.pairwise(ids)) for ids in rows]
        return sum(len(group) - len(set(group)) for group in groups)

    model.generate(TOKENS, 38, num_beams=beams, min_new_tokens=38)
    model.generate(TOKENS, 38, num_beams=beams, min_new_tokens=38, no_repeat_ngram_size=2)
    assert len(written) == 6
    assert repeats(written[:3]) > repeats(written[3:]) == 0


def test_length_limits(folder: Path, model: ReportDecoder, written: list[list[int]]) -> None:
    model.generate(TOKENS, 7, min_new_tokens=7)
    model.generate(TOKENS, 500, min_new_tokens=20)
    lengths = [len(row) for row in written]
    assert lengths[:3] == [7, 7, 7]
    assert all(20 <= length <= model.max_length - 1 for length in lengths[3:])
    with pytest.raises(InputError, match="at least 9 tokens and at most 8"):
        model.generate(TOKENS, 8, min_new_tokens=9)
    if model.prefix:
        assert pretrained_decoder(str(folder), 8, 50, max_length=40).max_length == 14
        with pytest.raises(InputError, match="the 62 CT tokens stand in front"):
            pretrained_decoder(str(folder), 8, 62)


def test_a_sample_depends_on_its_own_seed_alone(model: ReportDecoder) -> None:
    hot = SamplingSettings(temperature=2.0, top_p=1.0)
    texts = model.generate(TOKENS, 12, sampling=hot, seeds=[5, 6, 7])
    assert model.generate(TOKENS[1:].flip(0), 12, sampling=hot, seeds=[7, 6]) == texts[:0:-1]
    assert model.generate(TOKENS, 12, sampling=hot, seeds=[8, 9, 10]) != texts
    assert model.generate(TOKENS, 12, sampling=SamplingSettings(top_p=1e-6), seeds=[1, 2, 3]) == model.generate(
        TOKENS, 12
    )
    with pytest.raises(InputError, match="2 beams"):
        model.generate(TOKENS, 12, num_beams=2, sampling=hot, seeds=[1, 2, 3])
    with pytest.raises(InputError, match="temperature 0"):
        model.generate(TOKENS, 12, sampling=SamplingSettings(temperature=0.0), seeds=[1, 2, 3])


def test_the_noise_samples_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(20_000, 4)
    drawn = GumbelNoise(range(20_000))(torch.empty(0), logits).argmax(1)
    shares = drawn.bincount(minlength=4) / 20_000
    assert torch.allclose(shares, logits[0].softmax(0), atol=0.02)  # 5 standard deviations: seeds are fixed
    assert shares[3] == 0


def test_lora_trains_adapters_alone_and_comes_back(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = pretrained_decoder(str(folder), 8, 3, max_length=40, lora=LoraSettings(rank=4, dropout=0.0))
    before = {name: value.clone() for name, value in made.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        logits, targets = made(TOKENS[:2], **made.tokenize(TEXTS))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    allowed = ("lora_", "crossattention", "ln_cross_attn", "projection.", "places")
    assert all(any(part in name for part in allowed) for name in moved), moved
    assert any("lora_B" in name for name in moved)
    saved = save_decoder(made, tmp_path / "artefact", {})
    assert not any("embed" in name or "wte" in name or "base_layer" in name for name in saved.weights())
    again, _ = load_decoder(tmp_path / "artefact")
    assert again.generate(TOKENS, 20) == made.generate(TOKENS, 20)
    other = tmp_path / "other"
    plain = pretrained_decoder(str(folder), 8, 3, max_length=40)
    plain.decoder.get_input_embeddings().weight.data.add_(1)
    plain.decoder.save_pretrained(other)
    plain.tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match="but the adapters of"):
        load_decoder(tmp_path / "artefact", source=str(other))
