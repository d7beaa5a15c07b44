"""Pattern: what looks like a telephone number, an address or a name is declared private."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from fedkd.errors import ConfigError
from fedkd.options import options
from fedkd.privacy.scorers.base import Fitted, Sequences, TokenScorer, scorers
from fedkd.privacy.scorers.rarity import as_rows


@scorers.register("pattern")
@options
class Pattern(TokenScorer):
    """1 for every token that a match of a regular expression reaches into, 0 for all others.

    A sequence is read as the text of its tokens put together, with nothing between them: the
    characters of a string, or words that carry their own spaces.
    """

    ranked: ClassVar[bool] = False

    expression: Annotated[
        str, Field(description="regular expression; the default finds numbers of 4 digits and more")
    ] = r"\d{4,}"

    def fit(self, sequences: Sequences = ()) -> Fitted:
        """Return itself: a pattern learns nothing.

        Raises:
            ConfigError: the expression is none.
        """
        try:
            re.compile(self.expression)
        except re.error as error:
            raise ConfigError(
                f"scorer 'pattern': expression = {self.expression!r} is no regular expression: "
                f"{error}; an example of one is '[0-9]{{4,}}'"
            ) from None
        return self

    def score(self, sequences: Sequences) -> Tensor:
        """Return 1 for tokens within a match and 0 for others, (N, L) float64.

        Raises:
            ConfigError: tokens are no text.
            DataError: the sequences have different lengths.
        """
        return as_rows([self._marks(list(sequence)) for sequence in sequences])

    def _marks(self, tokens: list[str | int]) -> list[float]:
        words = [token for token in tokens if isinstance(token, str)]
        if len(words) != len(tokens):
            raise ConfigError(
                "scorer 'pattern' reads text, but was given token numbers; give it the tokens as "
                "strings, or use scorer = 'rarity'"
            )
        spans = [m.span() for m in re.finditer(self.expression, "".join(words))]
        marks, start = [], 0
        for word in words:
            end = start + len(word)
            marks.append(float(any(a < end and start < b for a, b in spans)))
            start = end
        return marks
