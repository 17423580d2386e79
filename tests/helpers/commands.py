"""Running `lmd-bench`: in this process, or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from lmd_bench.cli import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def lmd_bench(*words: object) -> Outcome:
    """Runs one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
        patched.setattr(sys, "argv", ["lmd-bench", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def own_process(*words: object, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs one command in a process of its own; on one thread, its numbers can be compared bit by bit."""
    environment = {**own_process_environment(), "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(own_process_words(*words), capture_output=True, text=True, check=False, env=environment)


def own_process_words(*words: object) -> list[str]:
    """What to start for a command in a process of its own."""
    return [sys.executable, "-m", "lmd_bench", *map(str, words)]


def own_process_environment() -> dict[str, str]:
    """The environment to start it in."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
