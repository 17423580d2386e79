"""The one family of errors a user can cause. Raised anywhere, caught once, in `lmd_bench.cli`."""

from __future__ import annotations


class BenchError(Exception):
    """Something the user can put right. The message says where, what was wrong, and what would be right."""


class ConfigError(BenchError):
    """A suite, an option or a command-line value that cannot be used."""


class DataError(BenchError):
    """Images that are missing, unreadable or unfit for the suite."""


class WeightsError(BenchError):
    """A weight file or folder that is missing, of another model, or unsafe to load."""


class MissingWeightsError(WeightsError):
    """Weights of which nothing is there, and which could not or may not be downloaded. What needs them is left out."""


class RecordError(BenchError):
    """A record on disk that is damaged, of another schema, or made with other settings."""


class TrainingError(BenchError):
    """Training that cannot go on, such as a loss that is no longer finite."""
