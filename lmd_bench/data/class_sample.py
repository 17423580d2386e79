"""Some of many labelled images, with every class among them. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def with_every_class(labels: Sequence[int] | NDArray[np.int64], count: int) -> list[int]:
    """Rising positions of at most `count` images: the first of every class, then those that come first of the others.

    With fewer images than classes, of as many classes as there are images.
    """
    firsts = np.sort(np.unique(np.asarray(labels), return_index=True)[1])[:count]
    others = np.setdiff1d(np.arange(len(labels)), firsts, assume_unique=True)[: max(0, count - len(firsts))]
    chosen: list[int] = np.sort(np.concatenate([firsts, others])).tolist()
    return chosen
