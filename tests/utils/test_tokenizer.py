"""utils/tokenizer.py: sentences to ids and back, against open_clip's tokenizer."""

import random

import pytest

from utils.tokenizer import count_truncated, padding_mask, tokenize, tokenizer


def awkward_strings():
    """200 strings that break naive tokenizers: emoji, accents, entities, contractions, spaces."""
    parts = ["café", "naïve", "&amp;", "&lt;b&gt;", "&amp;amp;", "人在左边", "红色", "😀", "👨‍👩‍👧"]
    parts += ["don't", "it's", "I'LL", "we've", "  ", "\t", "\n", "", "3rd", "100%", "O'Neil", "--"]
    parts += ["...", "ﬁ", "Ünïcödé", "Москва", "العربية", "שלום", "e\u0301", "ʼ", "a_b", "x²", "½"]
    parts += ["#7", "@home", "(left)", "\u00a0", "’s", "“quote”", "schÃ¶n", "ＦＵＬＬ", "₤", "'"]
    parts += ["\u200b", "RED"]
    rng = random.Random(0)
    strings = list(parts)
    while len(strings) < 200:
        joint = rng.choice(["", " ", "  "])
        strings.append(joint.join(rng.choices(parts, k=rng.randint(1, 7))))
    return strings


def test_the_tokenizer_agrees_with_open_clip_on_200_awkward_strings():
    """The oracle is open_clip's tokenizer, which carries the same merge table."""
    oracle = pytest.importorskip(
        "open_clip.tokenizer", reason="open_clip_torch is not installed"
    ).SimpleTokenizer()
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


def test_sentences_over_the_limit_are_counted():
    """start + one + two + end = 4 tokens: fits into 4, not into 3."""
    assert count_truncated(["one two", "one"], 4) == 0
    assert count_truncated(["one two", "one"], 3) == 1


def test_padding_is_what_follows_the_end_not_id_zero():
    """Id 0 is the real word "!" before a space-less end; the original mistakes it for padding."""
    tokens = tokenize("hi!!x ! y", 12)
    tokens[0, 2] = 0
    assert padding_mask(tokens)[0].tolist() == [i > tokens[0].argmax().item() for i in range(12)]
    assert not padding_mask(tokens)[0, 2]


def test_text_is_text_even_if_it_spells_the_end_mark():
    """A user cannot forge the end mark by typing it."""
    assert 49407 not in tokenizer().encode("left <|endoftext|> right")
