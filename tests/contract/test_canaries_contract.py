"""Every registered tokenizer writes the usual patterns, all of whose secrets are then scored."""

from __future__ import annotations

import numpy as np
import pytest

from fedkd.data.dataset import Dataset
from fedkd.data.tokenizers import tokenizers
from fedkd.errors import DataError
from fedkd.privacy.canaries.draw import draw
from fedkd.privacy.canaries.options import Canaries
from fedkd.rng import Rng

PATTERNS = {
    "my number is {}{}{}{}{}{}": ("0123456789",),
    "the password is {} {} {}": ("alpha", "bravo", "delta", "gamma"),
}


def empty(name: str) -> Dataset:
    tokenizer = tokenizers.get(name)()
    rows, zeros = np.ones((4, 61), dtype=np.int64), np.zeros(4, dtype=np.int64)
    names = tokenizer.names
    return Dataset(name, rows, zeros, rows, zeros, len(names), names, tokenizer=tokenizer)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", tokenizers.names())
def test_secrets_differ_in_tokens_that_are_predicted(name, pattern):
    data = empty(name)
    alphabet = PATTERNS[pattern]
    options = Canaries(kind="text", pattern=pattern, alphabet=alphabet, count=3, references=40)
    made = draw(options, data, None, (5, 5), Rng(0), Rng(0))
    predicted = np.concatenate([made.x, made.reference_x])[:, 1:]
    assert len(np.unique(predicted, axis=0)) == 18 + 40
    assert [data.tokenizer.decode(row) for row in made.x] == list(made.texts)


@pytest.mark.parametrize("name", tokenizers.names())
def test_what_it_cannot_write_is_refused(name):
    options = Canaries(kind="text", pattern="a {}{} é", count=1, references=2)
    with pytest.raises(DataError, match=r"that the tokenizer cannot write: .* no 'é'"):
        draw(options, empty(name), None, (5, 5), Rng(0), Rng(0))
