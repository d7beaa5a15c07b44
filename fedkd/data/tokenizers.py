"""What a text is for a network: rows of token numbers of one length, and the way back.

A vocabulary comes from public text or a fixed alphabet, never from what clients hold: which words
are in it would say what they wrote.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fedkd.registry import Registry


class Tokenizer(Protocol):
    """Writes a text as token numbers; ``names[i]`` is what token i stands for, 0 is padding."""

    @property
    def names(self) -> tuple[str, ...]:
        """What each token stands for; ``names[0] == ""`` is padding."""

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, int64 (n,); what it cannot write becomes ``UNKNOWN``."""

    def decode(self, tokens: np.ndarray) -> str:
        """Return the text of tokens, padding left out."""


tokenizers: Registry[type[Tokenizer]] = Registry("tokenizer", "fedkd.data", "tokenizers")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What stands for a character that a vocabulary does not have."""
