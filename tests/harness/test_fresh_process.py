"""Work in a process of its own: answers, errors and sudden ends come back."""

from __future__ import annotations

import operator
import os

from lmd_bench.harness.fresh_process import Failed, in_fresh_process, reason_of


def test_the_answer_comes_from_another_process() -> None:
    answer = in_fresh_process(os.getpid)
    assert isinstance(answer, int)
    assert answer != os.getpid()


def test_an_error_comes_back_as_its_reason() -> None:
    answer = in_fresh_process(operator.truediv, 1, 0)
    assert answer == Failed("ZeroDivisionError: division by zero")


def test_a_process_that_ends_without_a_word_is_told_with_its_code() -> None:
    answer = in_fresh_process(os._exit, 3)
    assert isinstance(answer, Failed)
    assert "ended with code 3" in answer.reason


def test_long_reasons_are_one_short_line() -> None:
    reason = reason_of(ValueError("a\n  b " + "x" * 1000))
    assert reason.startswith("ValueError: a b x")
    assert len(reason) < 320
