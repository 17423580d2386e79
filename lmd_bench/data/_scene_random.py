"""Counter-based random numbers: a draw is a pure function of (seed, scene index, stream, position).

No generator state exists, so a scene is the same whatever batch it is drawn in and whatever device draws it: int64
arithmetic wraps alike everywhere, and the conversion to a fraction of 2^24 is exact in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 1 << 64


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant; torch has no complete uint64 arithmetic."""
    return word - _WORD if word >= _WORD >> 1 else word


# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): the increment and the
# "variant 13" finalizer's shifts and multipliers.
_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
_SHIFTS = (30, 27, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; `>>` on int64 copies the sign bit, which the mask removes."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, a bijection of 64-bit words; int64 in and out, any shape."""
    x = (x ^ _shift_right(x, _SHIFTS[0])) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, _SHIFTS[1])) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, _SHIFTS[2])


def scene_keys(seed: int, indices: Tensor) -> Tensor:
    """One 64-bit key for each scene: int64 (B,) -> int64 (B,). Distinct indices of a seed have distinct keys."""
    seed_word = mix(torch.tensor(_signed(seed % _WORD), dtype=torch.int64, device=indices.device))
    return mix(seed_word + indices * _GOLDEN_GAMMA)


def uniform(keys: Tensor, stream: int, count: int) -> Tensor:
    """`count` draws from [0, 1) for each key, multiples of 2^-24: int64 (B,) -> float32 (B, count).

    Draws of different streams are independent; `count` only cuts the stream off, it does not change the draws.
    """
    positions = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) + (stream << 32)
    words = mix(keys[:, None] + positions * _GOLDEN_GAMMA)
    return _shift_right(words, 40).float() * 2.0**-24
