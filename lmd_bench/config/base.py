"""What all parts of a suite are made of: immutable values that refuse unknown keys. Imports no torch."""

from __future__ import annotations

import difflib
import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Json = dict[str, Any]
ImageSize = Annotated[int, Field(ge=8, le=4096)]
"""Side of square images, px."""


def near(word: str, words: typing.Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the closest of `words`, or what there is."""
    candidates = list(words)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is: {', '.join(sorted(candidates))}" if candidates else ""


class Values(BaseModel):
    """Base of all values: immutable, finite, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
