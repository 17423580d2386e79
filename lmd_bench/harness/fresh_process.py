"""Work done in a process of its own, so that no earlier work has warmed, filled or fragmented anything."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar


@dataclass(frozen=True)
class Failed:
    """What a process has to say instead of an answer, on one line."""

    reason: str


Answer = TypeVar("Answer")


def in_fresh_process(work: Callable[..., Answer], *arguments: Any) -> Answer | Failed:
    """`work(*arguments)` in a newly started interpreter. Work, arguments and answer must be picklable.

    An exception, or the end of the process, comes back as `Failed`.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(there, work, arguments))
    process.start()
    there.close()
    try:
        answer: Answer | Failed = here.recv()
        process.join(timeout=30)
    except EOFError:
        process.join()
        answer = Failed(f"the process ended with code {process.exitcode} (out of memory?)")
    finally:
        if process.is_alive():
            process.kill()
        here.close()
    return answer


def _worker(channel: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends its children
    try:
        channel.send(work(*arguments))
    except Exception as error:  # told to the parent, which reports what is missing and why
        channel.send(Failed(reason_of(error)))


def reason_of(error: Exception) -> str:
    """An exception on one line, cut where it is long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
