"""Texts with owners: roles of plays, and the help topics of Python as public text.

Whatever the text, it is cut in one way: rows that follow each other, the last ones of each owner
kept for testing, so that no token that is tested is trained on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fedkd.data.dataset import Dataset, Source
from fedkd.data.hub import hint, open_tables
from fedkd.data.hub_sources import Folder
from fedkd.data.registries import sources
from fedkd.data.roles import from_windows, read_roles
from fedkd.data.text import public_topics
from fedkd.data.tokenizers import Tokenizer, tokenizers
from fedkd.errors import DataError
from fedkd.options import build, options

__all__ = ["PydocTopics", "Shakespeare", "TextSource", "cut", "divide_rows"]

SHAKESPEARE = "shakespeare"
HUB_NAME = "flwrlabs/shakespeare"
TOPICS = "pydoc-topics"


@options
class TextSource(Source):
    """What every text has: how it is written as tokens, cut into rows and divided."""

    tokenizer: Annotated[
        str, Field(description="what a token is: char, wordpiece, or a tokenizer of your own")
    ] = "char"
    tokenizer_options: Annotated[
        dict[str, Any],
        Field(
            description="options of the tokenizer, for instance size",
            json_schema_extra={"default": {}},
        ),
    ] = field(default_factory=dict)
    length: Annotated[
        int, Field(ge=1, description="tokens that a network reads at once; a row has one more")
    ] = 64
    test_share: Annotated[
        float, Field(gt=0, lt=1, description="share of each owner's rows, the last, to test on")
    ] = 0.2
    min_rows: Annotated[
        int, Field(ge=1, description="leave owners out whose text gives fewer rows")
    ] = 2

    @abstractmethod
    def texts(self) -> dict[str, str]:
        """Return the text of each owner."""

    def rows(self, name: str, keep: int, each: int) -> Dataset:
        """Return the text of all owners as rows of tokens.

        Args:
            name: name of the data set.
            keep: so many owners, those with most text (characters); 0: all.
            each: so many rows of each owner, the first, of which the last are test rows; 0: all.

        Raises:
            ConfigError: there is no such tokenizer, or its options are wrong.
            DataError: there is no text, or there are fewer owners, or nothing to test on.
        """
        tokenizer = self.make_tokenizer()
        texts = self.texts()
        chosen: dict[str, np.ndarray] = {}
        for owner in sorted(texts, key=lambda o: (-len(texts[o]), o)):
            if keep and len(chosen) == keep:
                break
            rows = cut(tokenizer.encode(texts[owner]), self.length)
            if len(rows) >= self.min_rows:
                chosen[owner] = rows[: each or len(rows)]
        self._check(name, chosen, keep, len(texts))
        train, test = divide_rows(chosen, self.test_share)
        return Dataset(
            name=name,
            train_x=train[0],
            train_y=np.zeros(len(train[0]), dtype=np.int64),
            test_x=test[0],
            test_y=np.zeros(len(test[0]), dtype=np.int64),
            classes=len(tokenizer.names),
            class_names=tokenizer.names,
            train_ids=train[1],
            test_ids=test[1],
            tokenizer=tokenizer,
        )

    def make_tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the options name."""
        return build(tokenizers.get(self.tokenizer), self.tokenizer_options, "tokenizer_options")

    def _check(self, name: str, chosen: dict[str, np.ndarray], keep: int, found: int) -> None:
        fix = f"lower length = {self.length} or min_rows = {self.min_rows}"
        if not chosen:
            raise DataError(
                f"{name}: no text left: none of {found} owners has min_rows = {self.min_rows} "
                f"rows of {self.length + 1} tokens; {fix}"
            )
        if len(chosen) < keep:
            raise DataError(
                f"{name}: {keep} owners are asked for, but {len(chosen)} of {found} have "
                f"{self.min_rows} rows or more; ask for 1 to {len(chosen)}, or {fix}"
            )
        if max(len(rows) for rows in chosen.values()) < 2:
            raise DataError(
                f"{name}: no owner has two rows, one to train and one to test on; "
                f"lower length = {self.length}, or keep more rows of each"
            )


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """Cut tokens into rows, int64 ``(n, length + 1)``, the last one filled up with 0.

    The last token of a row is the first of the next, so n is ``ceil((len(tokens) - 1) / length)``.

    >>> cut(np.arange(1, 7), 2)
    array([[1, 2, 3],
           [3, 4, 5],
           [5, 6, 0]])
    """
    n = -(-max(len(tokens) - 1, 0) // length)
    padded = np.zeros(n * length + 1, dtype=np.int64)
    padded[: len(tokens)] = tokens[: len(padded)]
    return padded[np.arange(n)[:, None] * length + np.arange(length + 1)]


Part = tuple[np.ndarray, np.ndarray]


def divide_rows(owned: Mapping[str, np.ndarray], test_share: float) -> tuple[Part, Part]:
    """Divide rows into training and test rows, each with the owner of every row.

    Of an owner's n rows the last ``test_share`` n are test rows, rounded, but at least 1 and at
    most n - 1; a single row is a training row. Owners come in alphabetical order.
    """
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    names: tuple[list[str], list[str]] = ([], [])
    for owner in sorted(owned):
        rows = owned[owner]
        test = min(max(1, round(test_share * len(rows))), len(rows) - 1)
        for place, some in enumerate(np.split(rows, [len(rows) - test])):
            parts[place].append(some)
            names[place].extend([owner] * len(some))
    train, held = (
        (np.concatenate(x), np.array(o, dtype=str)) for x, o in zip(parts, names, strict=True)
    )
    return train, held


@sources.register(SHAKESPEARE)
@options
class Shakespeare(TextSource):
    """Shakespeare: what each role of the plays says, by role; to predict the next token.

    Either your own file of roles (``path``), or the hub's ``flwrlabs/shakespeare``, which is LEAF's
    (Caldas et al., arXiv:1812.01097). The roles ("play/role", on the hub ``character_id``) are the
    owners for the partition ``natural``. An owner's rows of ``length`` + 1 tokens overlap by the
    one token that the first predicts last and the next reads first, so every token but the first
    is predicted once; the last row is filled up with 0. The last rows of each owner are the test
    rows: no token that is tested is trained on.

    The hub's card names windows of 80 characters ``x`` and the next character ``y``, a training
    split only, and calls the data temporal. That the rows follow the text, each one character
    further than the one before, is LEAF's way and unverified here; where they cannot be put
    together into running text they are refused. The hub's own file is CSV; ``folder`` takes it as
    parquet or Arrow.
    """

    path: Annotated[
        str,
        Field(description="a .jsonl or .jsonl.gz file, a role a line: play, role, text; or folder"),
    ] = ""
    folder: Folder = ""
    roles: Annotated[
        int, Field(ge=0, description="keep so many roles, those with most text; 0: all")
    ] = 0
    rows_per_role: Annotated[
        int, Field(ge=0, description="keep the first so many rows of each role; 0: all")
    ] = 0

    def read(self) -> Dataset:
        """Return the data.

        Raises:
            DataError: they are missing or damaged, or too little is left of them.
        """
        return self.rows(SHAKESPEARE, self.roles, self.rows_per_role)

    def texts(self) -> dict[str, str]:
        """Return what each role says."""
        if self.path and self.folder:
            raise DataError(
                f"shakespeare: path = {self.path!r} and folder = {self.folder!r} name two places; "
                "give one of them"
            )
        if self.path:
            return read_roles(self.path)
        return from_windows(open_tables(SHAKESPEARE, HUB_NAME, self.folder, ["train"])["train"])

    def missing(self) -> str:
        """Say what is missing, if anything."""
        if not self.path:
            text = hint(SHAKESPEARE, HUB_NAME, self.folder)
            return text and f"{text}; or a file of roles as path"
        return "" if Path(self.path).expanduser().is_file() else f"there is no file {self.path}"


@sources.register(TOPICS)
@options
class PydocTopics(TextSource):
    """Help topics: the texts about Python that come with CPython; public text, 0.46 MB in 3.11.

    For the public pool of a federation on other text, with the same tokenizer and length; or by
    itself, each topic an owner. Cut and divided as ``shakespeare``. The topics differ between
    versions of Python. Limits: ``wordpiece`` learned on these very texts writes them shorter than
    others.
    """

    topics: Annotated[
        int, Field(ge=0, description="keep so many topics, those with most text; 0: all")
    ] = 0
    rows_per_topic: Annotated[
        int, Field(ge=0, description="keep the first so many rows of each topic; 0: all")
    ] = 0

    def read(self) -> Dataset:
        """Return the data.

        Raises:
            DataError: this Python comes without them, or too little is left of them.
        """
        return self.rows(TOPICS, self.topics, self.rows_per_topic)

    def texts(self) -> dict[str, str]:
        """Return the text of each topic."""
        return public_topics()

    def missing(self) -> str:
        """Say what is missing, if anything."""
        try:
            public_topics()
        except DataError as error:
            return str(error)
        return ""
