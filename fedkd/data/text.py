"""Tokenizers whose vocabulary nobody's private text had a part in: an alphabet, and learned pieces.

Both write every printable ASCII text exactly, so that what a client holds neither widens the
vocabulary nor can be told from it.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Annotated

import numpy as np
from pydantic import Field

from fedkd.data.tokenizers import UNKNOWN, tokenizers
from fedkd.errors import ConfigError, DataError
from fedkd.options import options

__all__ = ["ALPHABET", "Characters", "Pieces", "learn", "public_topics"]

ALPHABET = ("", "\n", *(chr(code) for code in range(32, 127)), UNKNOWN)
"""Padding, newline, the 95 printable characters of ASCII, and what stands for all others."""
FOREIGN = re.compile(r"[^\n -~]")
CAPITALS = re.compile(r"[A-Z]+")
# A word or a run of signs may take the space before it along; anything else stands alone. The
# lengths are bounded because merging takes quadratic time in them.
WORDS = re.compile(r" ?[A-Za-z]{1,32}| ?[!-/:-@\[-`{-~]{1,32}|.", re.DOTALL)
RARE = 2
"""A pair of pieces that occurs less often than this is not merged."""

Pair = tuple[str, str]


@tokenizers.register("char")
@options
class Characters:
    """One token a character: newline, the printable characters of ASCII, and one for all others.

    The vocabulary is fixed: 98 tokens, 72 in lower case. ``decode(encode(t)) == t`` for newlines
    and printable ASCII, in lower case where that was asked for.
    """

    lowercase: Annotated[bool, Field(description="write A to Z as a to z")] = False

    @property
    def names(self) -> tuple[str, ...]:
        """What each token stands for; ``names[0] == ""`` is padding."""
        return _alphabet(self.lowercase)

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, int64 (n,), one a character."""
        if self.lowercase:
            # Only A to Z: Unicode's rules would turn some foreign characters into ASCII.
            text = CAPITALS.sub(lambda found: found[0].lower(), text)
        table = _table(self.lowercase)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        return table[np.minimum(codes, len(table) - 1)]

    def decode(self, tokens: np.ndarray) -> str:
        """Return the text of tokens, padding left out; see :func:`_spell`."""
        return _spell(self.names, tokens)


@tokenizers.register("wordpiece")
@options
class Pieces:
    """Pieces of words: byte-pair merges learned on the help topics that come with CPython.

    The vocabulary is the 98 tokens of ``char`` and then one for each merge of the two neighbouring
    pieces that occur most often within words (Sennrich et al., ACL 2016, Algorithm 1); among
    equally frequent ones the first in code order. A text is written by the same merges in the same
    order. A word may carry the space before it; a digit, a newline and a further space are tokens
    of their own, so a number of n digits is n tokens. ``decode(encode(t)) == t`` for newlines and
    printable ASCII. Limits: ``size`` = 98 is ``char``.

    The topics differ between versions of Python, and the vocabulary with them: the same
    experiment under another version has another tokenizer, and rows of another fingerprint.

    Raises:
        ConfigError: the topics do not give so many pieces.
    """

    size: Annotated[
        int, Field(ge=len(ALPHABET), le=8192, description="tokens, padding and alphabet included")
    ] = 512

    @property
    def names(self) -> tuple[str, ...]:
        """What each token stands for; ``names[0] == ""`` is padding."""
        return _vocabulary(self.size).names

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, int64 (n,)."""
        words = WORDS.findall(FOREIGN.sub(UNKNOWN, text))
        written = (_write(self.size, word) for word in words)
        return np.fromiter(chain.from_iterable(written), dtype=np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        """Return the text of tokens, padding left out; see :func:`_spell`."""
        return _spell(self.names, tokens)


def public_topics() -> dict[str, str]:
    """Return the help topics that come with CPython: 79 texts of 0.46 MB in version 3.11.

    Raises:
        DataError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python comes without pydoc_data.topics, the public text that pieces of words are "
            "learned on; install the whole standard library, or take the tokenizer 'char' and "
            "another source"
        ) from error
    return dict(topics)


def _spell(names: Sequence[str], tokens: np.ndarray) -> str:
    """Return the text of tokens, padding left out.

    Raises:
        DataError: a number is no token.
    """
    numbers = np.asarray(tokens, dtype=np.int64).ravel()
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(names)):
        wrong = int(numbers.min()) if numbers.min() < 0 else int(numbers.max())
        raise DataError(f"{wrong} is no token; allowed: 0 to {len(names) - 1}")
    return "".join([names[number] for number in numbers.tolist()])


@lru_cache(maxsize=2)
def _alphabet(lowercase: bool) -> tuple[str, ...]:
    return tuple(c for c in ALPHABET if not (lowercase and CAPITALS.fullmatch(c)))


@lru_cache(maxsize=2)
def _table(lowercase: bool) -> np.ndarray:
    """Return the token of each code point up to 127, the last one for all above."""
    number = {name: i for i, name in enumerate(_alphabet(lowercase))}
    tokens = [number.get(chr(code), number[UNKNOWN]) for code in range(128)]
    return np.array(tokens, dtype=np.int64)


@dataclass(frozen=True)
class _Vocabulary:
    """What was learned: the pieces, their numbers, and the merges in their order."""

    names: tuple[str, ...]
    numbers: dict[str, int]
    ranks: dict[Pair, int]


@lru_cache(maxsize=8)
def _vocabulary(size: int) -> _Vocabulary:
    topics = public_topics()
    text = (FOREIGN.sub(UNKNOWN, topics[name]) for name in sorted(topics))
    words = Counter(chain.from_iterable(WORDS.findall(topic) for topic in text))
    names, ranks = learn(words, size)
    return _Vocabulary(tuple(names), {name: i for i, name in enumerate(names)}, ranks)


def learn(words: Counter[str], size: int) -> tuple[list[str], dict[Pair, int]]:
    """Learn merges on counted words until there are ``size`` names: ``(names, rank of merges)``.

    A merge that spells an existing name again gets a rank but no name of its own.

    Raises:
        ConfigError: no pair occurs twice any more.
    """
    pieces = [list(word) for word in words]
    counts = list(words.values())
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(pieces):
        for pair in pairwise(word):
            pairs[pair] += counts[i]
            places[pair].add(i)
    # Counts only ever change together with a new entry, so an entry that disagrees is outdated.
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    names, known, ranks = list(ALPHABET), set(ALPHABET), dict[Pair, int]()
    while len(names) < size:
        found, best = heapq.heappop(heap) if heap else (0, ("", ""))
        if -found < RARE:
            raise ConfigError(
                f"wordpiece: size = {size}: the topics of this Python give {len(names)} tokens; "
                f"allowed: {len(ALPHABET)} to {len(names)}"
            )
        if pairs[best] != -found:
            continue
        # A pair can come back when another merge spells one of its pieces; its first rank stays.
        ranks.setdefault(best, len(ranks))
        if "".join(best) not in known:
            names.append("".join(best))
            known.add(names[-1])
        changed = set()
        for i in places.pop(best):
            before, pieces[i] = pieces[i], _merged(pieces[i], best)
            for pair in pairwise(before):
                pairs[pair] -= counts[i]
                changed.add(pair)
            for pair in pairwise(pieces[i]):
                pairs[pair] += counts[i]
                places[pair].add(i)
                changed.add(pair)
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return names, ranks


def _merged(pieces: Sequence[str], pair: Pair) -> list[str]:
    """Return the pieces with every occurrence of a pair, from the left, made one."""
    made: list[str] = []
    waiting = iter(range(len(pieces)))
    for i in waiting:
        if i + 1 < len(pieces) and pieces[i] == pair[0] and pieces[i + 1] == pair[1]:
            made.append(pieces[i] + pieces[i + 1])
            next(waiting)
        else:
            made.append(pieces[i])
    return made


@lru_cache(maxsize=1 << 16)
def _write(size: int, word: str) -> tuple[int, ...]:
    """Return the tokens of one word."""
    vocabulary = _vocabulary(size)
    pieces: Iterable[str] = word
    never = len(vocabulary.ranks)
    while True:
        now = list(pieces)
        ranked = [(vocabulary.ranks.get(pair, never), pair) for pair in pairwise(now)]
        rank, best = min(ranked, default=(never, ("", "")))
        if rank == never:
            return tuple(vocabulary.numbers[piece] for piece in now)
        pieces = _merged(now, best)
