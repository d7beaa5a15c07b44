"""Secret texts that differ in their gaps alone, so that only memory can tell one from another.

They come from addressed streams: a secret of the same number is the same whatever else is asked
for. The sequences of TensorFlow Privacy's ``generate_random_sequences`` are others, by design.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedkd.data.dataset import Dataset
from fedkd.data.tokenizers import UNKNOWN, Tokenizer
from fedkd.errors import ConfigError, DataError
from fedkd.privacy.canaries.options import Canaries
from fedkd.rng import Rng

GAP = "{}"
ENUMERABLE = 200_000
"""The largest space of secrets that is handled as a whole; of a larger one half can be drawn."""
BLOCK = 1024


@dataclass(frozen=True)
class Pattern:
    """Texts ``literals[0] words[c_1] literals[1] words[c_2] ...``: one for each choice of words."""

    literals: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def gaps(self) -> int:
        """How many words a text has."""
        return len(self.literals) - 1

    @property
    def size(self) -> int:
        """``|R| = words^gaps``, the number of texts."""
        return len(self.words) ** self.gaps

    @property
    def capacity(self) -> int:
        """How many of the texts can be drawn."""
        return self.size if self.size <= ENUMERABLE else self.size // 2

    def text(self, choice: Iterable[int]) -> str:
        """Return the text whose gaps hold these words.

        >>> Pattern(("pin ", "-", "!"), ("a", "b")).text([1, 0])
        'pin b-a!'
        """
        pairs = zip(choice, self.literals[1:], strict=True)
        return self.literals[0] + "".join(self.words[c] + after for c, after in pairs)


def secrets_wanted(options: Canaries) -> tuple[int, int]:
    """Return how many canaries there are, and how many secrets together with the references."""
    canaries = options.count * len(options.repetitions)
    return canaries, canaries + options.references


def check_kind(options: Canaries, dataset: Dataset) -> None:
    """Refuse canaries that a data set cannot hold.

    Raises:
        ConfigError: there are none to draw.
        DataError: texts for a data set of inputs, or images for one of texts.
    """
    if options.kind == "none":
        raise ConfigError(
            'canaries.kind = "none": there is nothing to plant; choose "text" for a source of '
            'text, else "random-image" or "mislabelled"'
        )
    holds = "inputs" if dataset.tokenizer is None else "texts"
    if (options.kind == "text") != (holds == "texts"):
        fix = '"text"' if holds == "texts" else '"random-image" or "mislabelled"'
        raise DataError(
            f'canaries.kind = "{options.kind}": {dataset.name} holds {holds}; set canaries.kind '
            f"to {fix}, or choose another data.source"
        )


def pattern_of(options: Canaries) -> Pattern:
    """Return the texts that ``pattern`` and ``alphabet`` describe.

    An alphabet of one string of several characters means its characters, any other its words.

    Raises:
        ConfigError: there is no gap; a word is empty or given twice; or two choices of words may
            give the same text, which would then be drawn more often than others.
    """
    literals = tuple(options.pattern.split(GAP))
    if len(literals) < 2:
        raise ConfigError(
            f"canaries.pattern = {options.pattern!r}: there is no gap to fill, so there is one "
            'text and no secret; write {} for each gap, as in "my number is {}{}{}{}"'
        )
    given = options.alphabet
    words = tuple(given[0]) if len(given) == 1 and len(given[0]) > 1 else given
    twice = sorted({word for word in words if words.count(word) > 1})
    if not words or "" in words or twice:
        problem = f"{twice[0]!r} is given twice" if twice else "there is no word, or an empty one"
        raise ConfigError(
            f"canaries.alphabet: {problem}; give characters as one string, or words, each once"
        )
    if not _unambiguous(literals, words):
        raise ConfigError(
            f"canaries.pattern = {options.pattern!r}: different words can give the same text, "
            "since some begin and end like others and nothing parts them; put a character "
            "between the gaps that is in no word, or give words of one length"
        )
    return Pattern(literals, words)


def draw_texts(options: Canaries, wanted: int, rng: Rng) -> tuple[list[str], int]:
    """Draw distinct texts, uniform without replacement: ``(texts, |R|)``.

    Fewer of the same ``rng`` are the first of more.

    Raises:
        ConfigError: the pattern is refused, or it has fewer texts than are wanted.
    """
    pattern = pattern_of(options)
    if wanted > pattern.capacity:
        canaries = wanted - options.references
        left = pattern.capacity - canaries
        fewer = f", lower canaries.references to at most {left}" if left >= 1 else ""
        words = len(pattern.words)
        need = next((g for g in itertools.count(1) if words**g >= wanted), 0) if words > 1 else 0
        more = f"give the pattern at least {need} gaps" if need else "give a larger alphabet"
        raise ConfigError(
            f"canaries: {canaries} canaries and {options.references} references are {wanted} "
            f"distinct secrets, but of the {pattern.size} texts of {options.pattern!r} at most "
            f"{pattern.capacity} can be drawn; {more}{fewer}, or lower canaries.count"
        )
    return [pattern.text(choice) for choice in _choices(pattern, wanted, rng)], pattern.size


def text_rows(texts: Sequence[str], dataset: Dataset) -> np.ndarray:
    """Return texts as rows of the data set: int64 ``(n, L + 1)``, padded with 0.

    Raises:
        DataError: the tokenizer cannot write one; one is longer than a row; or the first token,
            which a network reads but never predicts, would hold part of the secret.
    """
    tokenizer, length = dataset.tokenizer, dataset.train_x.shape[1]
    if tokenizer is None:
        raise DataError(f"{dataset.name}: there is no tokenizer that could write a canary")
    tokens = [_written(text, tokenizer, dataset.name) for text in texts]
    longest = max(len(row) for row in tokens)
    if longest > length:
        raise DataError(
            f"canaries: a canary has up to {longest} tokens, but the rows of {dataset.name} have "
            f"{length}; shorten canaries.pattern, or give the source rows of at least {longest}"
        )
    rows = np.zeros((len(texts), length), dtype=np.int64)
    for row, written in zip(rows, tokens, strict=True):
        row[: len(written)] = written
    if len(texts) > 1 and (rows[:, 0] != rows[0, 0]).any():
        raise DataError(
            "canaries.pattern: the first token differs from secret to secret, but networks "
            "predict from the second on, so part of every secret would never be scored; begin "
            'the pattern with a few words, as in "my number is {}{}{}{}"'
        )
    return rows


def enumerate_space(options: Canaries, dataset: Dataset) -> np.ndarray | None:
    """Return all of R as rows ``(|R|, L + 1)``, first gap slowest; none where |R| > 200,000.

    None for images too, of which there is no end.

    Raises:
        DataError: texts are asked of a data set of inputs or the reverse, or cannot be written.
        ConfigError: there are no canaries, or the pattern is refused.
    """
    check_kind(options, dataset)
    if options.kind != "text":
        return None
    pattern = pattern_of(options)
    if pattern.size > ENUMERABLE:
        return None
    choices = itertools.product(range(len(pattern.words)), repeat=pattern.gaps)
    return text_rows([pattern.text(choice) for choice in choices], dataset)


def space_of(size: int) -> float:
    """Return |R| as a float, infinity where none is large enough."""
    return float(size) if size < 2**1023 else math.inf


def _choices(pattern: Pattern, wanted: int, rng: Rng) -> list[tuple[int, ...]]:
    """Draw distinct choices of words; how they are drawn may depend on |R|, never on ``wanted``."""
    words, generator = len(pattern.words), rng.numpy()
    if pattern.size <= ENUMERABLE:
        numbers = generator.permutation(pattern.size)[:wanted]
        places = np.unravel_index(numbers, (words,) * pattern.gaps)
        return [tuple(choice) for choice in np.stack(places, axis=1).tolist()]
    found: dict[tuple[int, ...], None] = {}
    # At most half of the space is asked for, so at least half of the draws are new on average.
    while len(found) < wanted:
        block = generator.integers(words, size=(BLOCK, pattern.gaps)).tolist()
        found.update(dict.fromkeys(tuple(choice) for choice in block))
    return list(itertools.islice(found, wanted))


def _unambiguous(literals: tuple[str, ...], words: tuple[str, ...]) -> bool:
    """Whether the words can be read off every text; sufficient, and met by all usual patterns.

    No word begins another (read from the left), none ends another (from the right), or the words
    end where a character comes that none has.
    """
    backwards = tuple(word[::-1] for word in words)
    parted = all(
        literal and not any(literal[0] in word for word in words) for literal in literals[1:-1]
    )
    return parted or _prefix_free(words) or _prefix_free(backwards)


def _prefix_free(words: tuple[str, ...]) -> bool:
    """Whether no word begins another: of sorted words, the next one would."""
    return not any(b.startswith(a) for a, b in itertools.pairwise(sorted(words)))


def _written(text: str, tokenizer: Tokenizer, name: str) -> np.ndarray:
    tokens = np.asarray(tokenizer.encode(text), dtype=np.int64)
    back = tokenizer.decode(tokens)
    if back == text and UNKNOWN not in text and (tokens != 0).all():
        return tokens
    lost = sorted({c for c in text if c == UNKNOWN or c not in back})
    lost = lost or sorted({c for c in text if tokenizer.decode(tokenizer.encode(c)) != c})
    which = f"; it has no {', '.join(map(repr, lost))}" if lost else ""
    raise DataError(
        f"a canary that the tokenizer cannot write: {text!r} reads back as {back!r} with the "
        f"tokenizer of {name}{which}; change canaries.pattern or canaries.alphabet, or choose a "
        "tokenizer that has these characters"
    )
