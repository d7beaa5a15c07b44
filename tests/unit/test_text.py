"""Tokenizers: exact on ASCII, the same everywhere, and of nobody's private text."""

import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data import text as module
from fedkd.data.text import ALPHABET, Characters, Pieces, learn, public_topics
from fedkd.data.tokenizers import UNKNOWN, tokenizers
from fedkd.errors import ConfigError, DataError
from fedkd.options import build

ASCII = st.text(st.sampled_from([c for c in ALPHABET if len(c) == 1 and c.isascii()]))
WORDY = st.lists(
    st.sampled_from([" the", "the ", " dictionary", "--------", "\n\n  ", "3.14", "'tis", "_", " "])
).map("".join)
BOTH = [Characters(), Pieces(), Pieces(size=200)]


def test_both_are_registered_with_ranges_that_are_checked():
    assert {"char", "wordpiece"} <= set(tokenizers.names())
    assert tokenizers.get("char") is Characters and tokenizers.get("wordpiece") is Pieces
    assert tokenizers.summary("wordpiece").startswith("Pieces of words")
    with pytest.raises(ConfigError, match="size = 97: Input should be greater than or equal to 98"):
        build(Pieces, {"size": 97})
    with pytest.raises(ConfigError, match="unknown key 'size'"):
        build(Characters, {"size": 100})


@pytest.mark.parametrize("tokenizer", BOTH, ids=["char", "512", "200"])
def test_names_are_padding_then_all_of_printable_ascii_each_once(tokenizer):
    names = tokenizer.names
    assert names[0] == "" and "" not in names[1:]
    assert len(set(names)) == len(names)
    assert {*map(chr, range(32, 127)), "\n", UNKNOWN} <= set(names)
    assert names[: len(ALPHABET)] == ALPHABET
    assert names is tokenizer.names


def test_vocabularies_have_the_size_that_was_asked_for():
    assert len(Characters().names) == 98
    assert len(Characters(lowercase=True).names) == 72
    assert len(Pieces().names) == 512
    assert Pieces().names[:200] == Pieces(size=200).names


@given(text=ASCII | WORDY)
@settings(max_examples=60)
def test_ascii_comes_back_exactly(text):
    for tokenizer in BOTH:
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int64 and tokens.ndim == 1
        assert (tokens > 0).all()
        assert tokenizer.decode(tokens) == text
    assert len(BOTH[0].encode(text)) == len(text)
    assert len(BOTH[1].encode(text)) <= len(BOTH[2].encode(text)) <= len(text)


@given(text=st.text(max_size=30))
@settings(max_examples=40)
def test_each_foreign_character_becomes_one_unknown(text):
    expected = "".join(c if c in ALPHABET[1:] else UNKNOWN for c in text)
    for tokenizer in BOTH:
        assert tokenizer.decode(tokenizer.encode(text)) == expected


@given(text=ASCII)
def test_lower_case_is_what_is_said_it_is(text):
    tokenizer = Characters(lowercase=True)
    assert tokenizer.decode(tokenizer.encode(text)) == text.lower()
    # The Kelvin sign is a k for Unicode, and no letter of ours.
    assert tokenizer.decode(tokenizer.encode("K\N{KELVIN SIGN}")) == "k" + UNKNOWN


def test_lone_surrogates_and_nothing_at_all_are_written():
    for tokenizer in BOTH:
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == f"a{UNKNOWN}b"
        assert tokenizer.encode("").shape == (0,) and tokenizer.encode("").dtype == np.int64
        assert tokenizer.decode(np.zeros(0, dtype=np.int64)) == ""


def test_decoding_leaves_padding_out_and_refuses_what_is_no_token():
    for tokenizer in BOTH:
        tokens = tokenizer.encode("to be")
        assert tokenizer.decode(np.concatenate([tokens, np.zeros(3, dtype=np.int64)])) == "to be"
        for wrong in (-1, len(tokenizer.names)):
            with pytest.raises(DataError, match=rf"{wrong} is no token; allowed: 0 to"):
                tokenizer.decode(np.array([1, wrong]))


def test_a_number_has_as_many_tokens_as_digits_whatever_stands_around_it():
    tokenizer = Pieces()
    before, after = tokenizer.encode("The random number is "), tokenizer.encode(" thanks")
    for number in ("281265017", "000000000", "123456789"):
        tokens = tokenizer.encode(f"The random number is {number} thanks")
        assert np.array_equal(tokens[: len(before)], before)
        assert np.array_equal(tokens[-len(after) :], after)
        assert len(tokens) == len(before) + 9 + len(after)


def test_without_merges_pieces_are_characters():
    text = "\n".join(public_topics().values())
    assert np.array_equal(Pieces(size=98).encode(text), Characters().encode(text))


def test_learned_twice_it_is_the_same_and_the_order_of_words_does_not_matter(monkeypatch):
    names = Pieces(size=200).names
    backwards = dict(reversed(public_topics().items()))
    monkeypatch.setattr(module, "public_topics", lambda: backwards)
    assert module._vocabulary.__wrapped__(200).names == names


def slow_merges(words, n):
    """Byte-pair merges as they are defined: count all pairs anew, merge the best, repeat."""
    pieces = {word: list(word) for word in words}
    merges = []
    for _ in range(n):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(pieces[word], pieces[word][1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, old in pieces.items():
            new, i = [], 0
            while i < len(old):
                both = tuple(old[i : i + 2]) == best
                new.append("".join(best) if both else old[i])
                i += 1 + both
            pieces[word] = new
    return merges, pieces


def test_merges_are_those_of_the_definition():
    topics = public_topics()
    words = Counter(" ".join(topics[name] for name in sorted(topics)[:4]).split())
    merges, pieces = slow_merges(words, 40)
    names, ranks = learn(words, 98 + 35)
    assert list(ranks) == merges[: len(ranks)] and len(ranks) >= 35
    assert names[98:] == list(dict.fromkeys(map("".join, merges[: len(ranks)])))
    assert list(ranks.values()) == list(range(len(ranks)))
    assert any(len(p) < len(word) for word, p in pieces.items())


def test_a_text_is_written_by_the_merges_in_their_order(monkeypatch):
    # "ab" comes first, so "abc" is ab + c although bc is a piece too.
    made = module._Vocabulary(
        (*ALPHABET, "ab", "bc"),
        {name: i for i, name in enumerate((*ALPHABET, "ab", "bc"))},
        {("a", "b"): 0, ("b", "c"): 1},
    )
    monkeypatch.setattr(module, "_vocabulary", lambda size: made)
    module._write.cache_clear()
    try:
        names = [made.names[t] for t in Pieces(size=100).encode("abc bc aab")]
    finally:
        module._write.cache_clear()
    assert names == ["ab", "c", " ", "bc", " ", "a", "ab"]


def test_a_piece_that_is_spelled_twice_has_one_name():
    # ab + c and a + bc both spell abc.
    names, ranks = learn(Counter({"abc": 9, "ab": 5, "xbc": 40, "ybc": 40, "zab": 90}), 98 + 6)
    assert len(set(names)) == len(names) == 104
    assert sorted(ranks.values()) == list(range(len(ranks)))


def test_more_pieces_than_the_topics_have_are_refused_with_what_there_is(monkeypatch):
    with pytest.raises(ConfigError, match="give 100 tokens; allowed: 98 to 100"):
        learn(Counter({"aaaa": 2, "b": 7, "cd": 1}), 200)
    monkeypatch.setattr(module, "public_topics", lambda: {"a": "to be or not to be"})
    with pytest.raises(ConfigError, match=r"wordpiece: size = 512: .* give 101 tokens"):
        module._vocabulary.__wrapped__(512)


def test_a_python_without_topics_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"without pydoc_data\.topics.*'char'"):
        public_topics()


def test_what_is_written_leaves_the_vocabulary_as_it_is():
    before = Pieces(size=130).names
    Pieces(size=130).encode("zyzzyva " * 1000)
    assert module._vocabulary.__wrapped__(130).names == before
