"""`lmd-bench evaluators train` and `evaluators test`."""

from __future__ import annotations

from pathlib import Path

from helpers.commands import lmd_bench

from lmd_bench.evaluators.files import CLASSIFIER_FILE, checked_file, read_metadata


def test_an_evaluator_is_trained_written_and_measured(tmp_path: Path) -> None:
    tiny = ("--steps", 10, "--batch-size", 8, "--num-scenes", 32, "--num-held-out", 20, "--device", "cpu")
    ran = lmd_bench("evaluators", "train", "classifier", "--out", tmp_path, *tiny)
    assert ran.code == 0, ran.err
    assert "step 10 of 10: loss" in ran.out
    assert f"written: classifier in {tmp_path}: class named for" in ran.out
    command = read_metadata(checked_file(tmp_path, CLASSIFIER_FILE).path)["command"]
    assert command == (
        "lmd-bench evaluators train classifier --out DIR --steps 10 --batch-size 8 --num-scenes 32 --num-held-out 20"
    )
    measured = lmd_bench("evaluators", "test", "--folder", tmp_path, "--num-scenes", 20, "--device", "cpu")
    assert measured.code == 0, measured.err
    assert "classifier: class named for" in measured.out
    assert f"made by: {command}" in measured.out
    assert "clip" not in measured.out


def test_what_ships_is_measured_without_options() -> None:
    measured = lmd_bench("evaluators", "test", "--num-scenes", 50, "--device", "cpu")
    assert measured.code == 0, measured.err
    assert "of 50 held-out scenes (0.58 MiB)" in measured.out
    assert "clip: true caption first among 10 for" in measured.out


def test_words_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    for words, message in (
        (("train", "gan", "--out", tmp_path), "evaluators train gan: train classifier or clip"),
        (("train", "clip", "--out", tmp_path, "--precision", "fp8"), "--precision fp8: use bf16 or fp32"),
        (("test", "--folder", tmp_path), f"--folder {tmp_path}: no evaluator"),
    ):
        ran = lmd_bench("evaluators", *words)
        assert ran.code == 2
        assert message in ran.err
