"""1. clip_model.py: the tokenizer, the two encoders, and how official weights come in."""

import random

import pytest
import torch

from clip_model import (
    CLIP,
    PIXEL_MEAN,
    PIXEL_STD,
    SIZES,
    Attention,
    Size,
    UserError,
    build_clip,
    fill_by_name,
    load_clip,
    padding,
    resize_positions,
    tokenize,
    tokenizer,
)
from official import read_weights

SMALL = Size(32, 64, (1, 1, 1, 1), 8, None, 64, 3, 20)
SMALL_VIT = Size(32, 64, 3, 64, 16, 64, 3, 20)


def small(size=SMALL):
    clip = CLIP(size)
    return build_clip(fill_by_name(clip.state_dict(), 0))


def awkward_strings():
    """200 strings that break naive tokenizers: emoji, accents, entities, Chinese, contractions, spaces, nothing."""
    parts = ["café", "naïve", "&amp;", "&lt;b&gt;", "&amp;amp;", "人在左边", "红色", "😀", "👨‍👩‍👧", "don't"]
    parts += ["it's", "I'LL", "we've", "  ", "\t", "\n", "", "3rd", "100%", "O'Neil", "--", "..."]
    parts += ["ﬁ", "Ünïcödé", "Москва", "العربية", "שלום"]
    parts += ["e\u0301", "ʼ", "a_b", "x²", "½", "#7", "@home", "(left)", "\u00a0", "’s", "“quote”", "schÃ¶n"]
    parts += ["ＦＵＬＬ", "₤", "'", "\u200b", "RED"]
    dice = random.Random(0)
    count = 200 - len(parts)
    return parts + [dice.choice(["", " ", "  "]).join(dice.choices(parts, k=dice.randint(1, 7))) for _ in range(count)]


def test_the_tokenizer_agrees_with_open_clip_on_200_awkward_strings():
    """The oracle is open_clip's tokenizer, which carries the same merge table."""
    oracle = pytest.importorskip("open_clip.tokenizer", reason="open_clip_torch is not installed").SimpleTokenizer()
    strings = awkward_strings()
    assert len(strings) == 200
    for text in strings:
        assert tokenizer().encode(text) == oracle.encode(text), text


def test_a_sentence_is_start_pieces_end_and_zeros():
    """ "a red cat" is three whole words; 49406 starts, 49407 ends, zeros fill."""
    assert tokenize("a red cat", 8).tolist() == [[49406, 320, 736, 2368, 49407, 0, 0, 0]]
    assert tokenizer().decode([320, 736, 2368]) == "a red cat "


def test_a_long_sentence_is_cut_and_still_ends():
    """Ten words into six tokens: start, four words, end."""
    row = tokenize("one two three four five six seven eight nine ten", 6)[0].tolist()
    assert row[0] == 49406 and row[-1] == 49407 and len(row) == 6


def test_padding_is_what_follows_the_end_not_id_zero():
    """Id 0 is the real word "!" before a space-less end; the original mistakes it for padding."""
    tokens = tokenize("hi!!x ! y", 12)
    tokens[0, 2] = 0
    assert padding(tokens)[0].tolist() == [i > tokens[0].argmax().item() for i in range(12)]
    assert not padding(tokens)[0, 2]


def test_text_is_text_even_if_it_spells_the_end_mark():
    """A user cannot forge the end mark by typing it."""
    assert 49407 not in tokenizer().encode("left <|endoftext|> right")


@pytest.mark.parametrize("name", SIZES)
def test_every_size_can_be_read_off_its_weights(name):
    """All nine official models and the two tiny ones, on the meta device: shapes alone say the sizes."""
    with torch.device("meta"):
        assert Size.of(CLIP(SIZES[name]).state_dict()) == SIZES[name]


ORACLES = {"RN50": "RN50-quickgelu", "RN101": "RN101-quickgelu", "ViT-B-16": "ViT-B-16-quickgelu"}


@pytest.mark.parametrize("name", ORACLES)
@torch.no_grad()
def test_embeddings_agree_with_open_clip(name):
    """From one random state dict, loaded strictly on both sides: max|Δ| / max|·| ≤ 1e-4."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    ours, oracle = load_clip(name, "random"), open_clip.create_model(ORACLES[name]).eval()
    extra = {n: x for n, x in oracle.state_dict().items() if n.endswith(("num_batches_tracked", "attn_mask"))}
    oracle.load_state_dict(ours.state_dict() | extra, strict=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(["the man in red", "second giraffe from the right"])
    pairs = [(ours.encode_image(images), oracle.encode_image(images)),
             (ours.encode_text(tokens), oracle.encode_text(tokens))]  # fmt: skip
    for mine, theirs in pairs:
        error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
        assert error <= 1e-4, f"{error:.1e}"


@pytest.mark.parametrize("size", [SMALL, SMALL_VIT], ids=["ResNet", "ViT"])
@torch.no_grad()
def test_stem_stages_head_is_the_whole_encoder_at_any_size_the_strides_divide(size):
    """96 × 64 is not the native 64 × 64: positions are resized, and stage maps have the strides they say."""
    clip, image = small(size), torch.randn(2, 3, 96, 64)
    v = clip.visual.stem(image)
    for stage, stride, channels in zip(clip.visual.stages, clip.visual.strides, clip.visual.channels, strict=True):
        v = stage(v)
        assert clip.visual.as_map(v).shape == (2, channels, 96 // stride, 64 // stride)
    assert torch.equal(clip.visual.pool(v), clip.encode_image(image))
    assert clip.visual.head(v).shape == (2, 32, 96 // clip.visual.stride, 64 // clip.visual.stride)


def test_positions_keep_their_class_row_and_stay_themselves_at_their_own_size():
    positions = torch.randn(1 + 16, 8)
    assert resize_positions(positions, 4, 4) is positions
    larger = resize_positions(positions, 6, 5)
    assert larger.shape == (31, 8) and torch.equal(larger[0], positions[0])


@torch.no_grad()
def test_a_word_never_sees_the_words_after_it():
    """Change the last word: the features of all earlier ones stay the same (the causal mask)."""
    clip = small()
    a, b = (clip.head(encode(clip, tokenize(text, 9)), tokenize(text, 9))[0] for text in ("a red cat", "a red dog"))
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 3], b[:, 3])


def encode(clip, tokens):
    t = clip.stem(tokens)
    for stage in clip.stages:
        t = stage(t)
    return t


@torch.no_grad()
def test_attention_is_a_weighted_mean_written_as_a_loop():
    """One query, one head at a time, against the module, plain and fast."""
    torch.manual_seed(0)
    module, x, y = Attention(8, 2), torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    ignore = torch.tensor([[False, False, True, False]])
    wq, wk, wv = module.in_proj_weight.chunk(3)
    rows = []
    for q in x[0]:
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = [((wq @ q)[h] @ (wk @ k)[h] / 2).exp() for k in y[0]]
            scores[2] = 0  # ignored
            heads.append(sum(s * (wv @ k)[h] for s, k in zip(scores, y[0], strict=True)) / sum(scores))
        rows.append(module.out_proj(torch.cat(heads)))
    for module.fast in (False, True):
        assert torch.allclose(module(x, y, ignore=ignore)[0], torch.stack(rows), atol=1e-6)


def test_random_weights_keep_the_size_of_what_passes_through():
    """N(0, 1/fan-in): 64 numbers in, so a standard deviation of 1/8; norms are the identity, biases 0."""
    state = fill_by_name({"a.weight": torch.empty(500, 4, 4, 4), "ln.weight": torch.empty(9), "b.bias": torch.ones(9)})
    assert state["a.weight"].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert state["ln.weight"].unique().tolist() == [1] and state["b.bias"].unique().tolist() == [0]
    assert load_clip("tiny", "random").identity["weights"] == "random, seed 0"


def test_random_weights_depend_on_name_and_seed_alone():
    a, b, c = (load_clip("tiny", "random", seed).state_dict() for seed in (0, 0, 1))
    name = "visual.layer2.0.conv2.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_a_plain_file_round_trips_and_half_precision_becomes_single(tmp_path):
    state = {n: x.half() if x.is_floating_point() else x for n, x in small().state_dict().items()}
    torch.save(state, tmp_path / "small.pt")
    read = read_weights(tmp_path / "small.pt")
    assert all(x.dtype in (torch.float32, torch.int64) for x in read.values())
    assert build_clip(read).size == SMALL


def test_loading_is_strict_and_says_what_is_wrong():
    state = small().state_dict()
    with pytest.raises(UserError, match="ln_final.bias"):
        build_clip({n: x for n, x in state.items() if n != "ln_final.bias"})
    with pytest.raises(UserError, match="stranger"):
        build_clip(state | {"stranger": torch.zeros(1)})
    with pytest.raises(UserError, match="unknown backbone 'RN99'"):
        load_clip("RN99")


def test_the_frozen_part_is_frozen_and_has_an_identity():
    clip = small()
    assert not any(p.requires_grad for p in clip.parameters()) and not clip.training
    assert len(clip.identity["sha256"]) == 64


def test_pictures_are_normalised_as_openai_did():
    """open_clip writes the same six numbers; a picture of one's own CLIP would not be what it was trained on."""
    constants = pytest.importorskip("open_clip.constants", reason="open_clip_torch is not installed")
    theirs = [*constants.OPENAI_DATASET_MEAN, *constants.OPENAI_DATASET_STD]
    assert [*PIXEL_MEAN, *PIXEL_STD] == pytest.approx(theirs)


@pytest.mark.parametrize("name", ["tiny", "tiny-vit"])
def test_a_clip_to_be_trained_starts_at_clips_own_scales(name):
    """Projections and the class token at 1/√width, text positions at 0.01, the temperature at 1/0.01: ln 100."""
    torch.manual_seed(0)
    clip, size = CLIP(SIZES[name]), SIZES[name]
    scales = {clip.text_projection: size.text_width**-0.5, clip.positional_embedding: 0.01}
    if size.patch:
        scales |= dict.fromkeys((clip.visual.proj, clip.visual.positional_embedding), size.width**-0.5)
        scales[clip.visual.class_embedding] = size.width**-0.5
    else:
        scales[clip.visual.attnpool.positional_embedding] = (32 * size.width) ** -0.5
    for tensor, scale in scales.items():
        assert tensor.std().item() == pytest.approx(scale, rel=0.2)
    assert clip.logit_scale.exp().item() == pytest.approx(100, rel=1e-3)
