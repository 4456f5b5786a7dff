"""CLIP's tokenizer: text to ids of 49,408 byte-pair pieces, and which ids are padding."""

import functools
import gzip
import html
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

from utils.common import ROOT

MERGES = ROOT / "weights" / "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's data: weights/README.md
MERGE_COUNT = 49152 - 256 - 2  # the vocabulary less the bytes and the two marks, as OpenAI cut it
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


class Tokenizer:
    """Byte-pair encoding with OpenAI's merge table."""

    def __init__(self, path=MERGES):
        lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : MERGE_COUNT + 1]]

        # every byte gets a printable letter, so that no piece holds a space or a control character
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = [chr(byte) for byte in printable]
        letters += [chr(256 + i) for i in range(len(others))]
        self.byte_to_letter = dict(zip(printable + others, letters, strict=True))
        self.letter_to_byte = {letter: byte for byte, letter in self.byte_to_letter.items()}

        # the vocabulary: letters, letters that end a word, merged pieces, the two marks
        pieces = letters + [letter + "</w>" for letter in letters]
        pieces += ["".join(pair) for pair in merges]
        self.sot = len(pieces)
        self.eot = len(pieces) + 1
        self.pieces = [*pieces, "<|startoftext|>", "<|endoftext|>"]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.encode_word = functools.lru_cache(maxsize=65536)(self.encode_word)

    def encode_word(self, word: str) -> tuple[int, ...]:
        """One word's ids: join the neighbors of the lowest rank until the table has none."""
        pieces = [self.byte_to_letter[byte] for byte in word.encode("utf-8")]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pairs = zip(pieces, pieces[1:], strict=False)
            best = min(pairs, key=lambda pair: self.ranks.get(pair, float("inf")))
            if best not in self.ranks:
                break
            pieces = merge(pieces, best)
        return tuple(self.ids[piece] for piece in pieces)

    def encode(self, text: str) -> list[int]:
        """Ids without marks. Repairs mojibake, unescapes HTML twice, joins spaces, lowers case."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split()).lower()
        ids = []
        for word in WORD.findall(text):
            ids.extend(self.encode_word(word))
        return ids

    def decode(self, ids) -> str:
        """The text of ids, marks included: the inverse of `encode` up to spaces and case."""
        text = "".join(self.pieces[i] for i in ids)  # the marks' own letters are plain bytes
        content = bytes(self.letter_to_byte[letter] for letter in text)
        return content.decode("utf-8", errors="replace").replace("</w>", " ")


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of `pair` in `pieces`, from left to right."""
    merged = []
    i = 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == pair:
            merged.append("".join(pair))
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return merged


@functools.cache
def tokenizer() -> Tokenizer:
    """The tokenizer, read once."""
    return Tokenizer()


def tokenize(sentences, max_tokens: int = 77) -> Tensor:
    """Sentences → (B, max_tokens) ids: start mark, pieces, end mark, zeros.

    A longer sentence loses its end; its last id is the end mark all the same.
    """
    sentences = [sentences] if isinstance(sentences, str) else list(sentences)
    bpe = tokenizer()
    tokens = torch.zeros(len(sentences), max_tokens, dtype=torch.long)
    for row, sentence in zip(tokens, sentences, strict=True):
        ids = [bpe.sot, *bpe.encode(sentence)[: max_tokens - 2], bpe.eot]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def padding_mask(tokens: Tensor) -> Tensor:
    """(B, L) ids → (B, L) bool, True after the end mark, which has the largest id.

    differs: not `tokens == 0`, as in the original: id 0 is the real word "!" (docs/differences.md).
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return positions > tokens.argmax(-1, keepdim=True)


def is_blank(sentence: str) -> bool:
    """Whether a sentence has only spaces, control characters and characters without width."""
    return not any(letter.isprintable() and not letter.isspace() for letter in sentence)


def count_truncated(sentences, max_tokens: int) -> int:
    """How many sentences have more than `max_tokens` tokens, marks included, and lose their end."""
    return int(tokenize(sentences, max_tokens + 1)[:, -1].count_nonzero())
