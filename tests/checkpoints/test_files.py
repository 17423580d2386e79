"""One reader for all files of tensors: what it finds in them, and what it refuses in one line."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lmd_bench.checkpoints.files import read_checkpoint
from lmd_bench.errors import WeightsError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "b": torch.tensor(3)}
AVERAGE = {name: value + 1 for name, value in WEIGHTS.items()}
STATES = [WEIGHTS, {"state": {}, "param_groups": [{"lr": 1e-3}]}, 7, 1000, AVERAGE]
"""A checkpoint of the DDIM repository."""


def same(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("contents", "place"),
    [
        (WEIGHTS, "the whole file"),
        (OrderedDict(WEIGHTS), "the whole file"),
        ({"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 3}, "entry 'model'"),
        ({"state_dict": WEIGHTS, "global_step": 3}, "entry 'state_dict'"),
        (STATES, "first entry of the list"),
        (STATES[:4], "first entry of the list"),
        ({f"module.{name}": value for name, value in WEIGHTS.items()}, "the whole file"),
    ],
)
def test_tensors_are_found_where_training_scripts_put_them(contents: object, place: str, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "x.pth")
    file = read_checkpoint(tmp_path / "x.pth")
    assert same(file.tensors, WEIGHTS)
    assert file.place == place
    assert file.arguments == {}


def test_safetensors_and_the_old_format_of_torch_are_read(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    torch.save({"model": WEIGHTS}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / "x.safetensors").tensors, WEIGHTS)
    assert same(read_checkpoint(tmp_path / "old.pth").tensors, WEIGHTS)


def test_the_moving_average_of_a_list_is_taken_when_asked_for_and_else_named(tmp_path: Path) -> None:
    torch.save(STATES, tmp_path / "x.pth")
    taken = read_checkpoint(tmp_path / "x.pth", ema=True)
    assert same(taken.tensors, AVERAGE)
    assert taken.beside is None
    assert read_checkpoint(tmp_path / "x.pth").beside == "moving average, fifth entry of the list (--ema takes it)"
    for without in (STATES[:4], WEIGHTS, {"model": WEIGHTS}):
        torch.save(without, tmp_path / "x.pth")
        assert read_checkpoint(tmp_path / "x.pth").beside is None
        with pytest.raises(WeightsError, match=r"x\.pth: no moving average \(--ema\)"):
            read_checkpoint(tmp_path / "x.pth", ema=True)


def test_options_that_a_script_stored_beside_the_weights_are_read(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(norm_pix_loss=True, lr=1e-3)}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth").arguments == {"norm_pix_loss": True, "lr": 1e-3}


class Harmful:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


class Node(dict[str, int]):
    """A mapping of a class of its own, as SimMIM's script stores its configuration in."""


def test_pickled_objects_are_refused_unrun_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stranger, name in ((Harmful(), r"\S*print"), (Node(), r"\S*test_files\.Node")):
        torch.save({"model": WEIGHTS, "config": stranger}, tmp_path / "x.pth")
        message = rf"holds pickled objects \({name}\) .*README.*save_file\(tensors"
        with pytest.raises(WeightsError, match=message) as caught:
            read_checkpoint(tmp_path / "x.pth")
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    assert "run" not in capsys.readouterr().out


def cut(path: Path) -> None:
    """A whole checkpoint of which the second half did not arrive."""
    if path.suffix == ".safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x.pth", lambda path: None, "no such file"),
        ("x.pth", lambda path: path.mkdir(), "is a folder"),
        ("x.pth", written(b""), "is empty"),
        ("x.safetensors", written(b""), "is empty"),
        ("x.pth", written(b"\n<!DOCTYPE html><html><title>404</title></html>"), "is a web page or XML"),
        ("x.ckpt", written(b"<html>Sign in</html>"), "is a web page or XML"),
        ("x.safetensors", written(b"<?xml version='1.0'?><Error/>"), "is a web page or XML"),
        ("x.pth", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "run git lfs pull"),
        ("x.pth", cut, "is cut off or damaged"),
        ("x.safetensors", cut, "cannot be read as safetensors"),
        ("x.safetensors", written(b"12345678 not a header"), "cannot be read as safetensors"),
        ("x.safetensors", written(b"short"), "cannot be read as safetensors"),
        ("x.pth", written(b"hello world"), "is no checkpoint"),
        ("x.pth", written(b"no checkpoint"), "is no checkpoint"),
        ("x.pth", written(b"PK\x03\x04 broken"), "is cut off or damaged"),
        ("x.pth", written(bytes(range(256))), "is no checkpoint"),
        ("x.pth", written(b"\x80\x02."), "is no checkpoint"),
        ("x.pth", lambda path: torch.save({}, path), "holds no mapping .*; it is empty"),
        ("x.pth", lambda path: torch.save({"epoch": 3}, path), "holds no mapping .*; its entries are epoch"),
        ("x.pth", lambda path: torch.save({"model": {"x": 1}}, path), "holds no mapping .*; its entries are model"),
        ("x.pth", lambda path: torch.save({"model": {1: torch.zeros(1)}}, path), "holds no mapping"),
        ("x.pth", lambda path: torch.save([1, WEIGHTS], path), "holds no mapping .*; it holds a list"),
        ("x.pth", lambda path: torch.save(torch.zeros(2), path), "holds no mapping .*; it holds a Tensor"),
    ],
)
def test_what_is_no_checkpoint_ends_in_one_line(
    name: str, make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_weights_of_a_finished_cell_are_told_from_an_authors_checkpoint(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "weights.safetensors", {"format": "lmd-bench method 1"})
    with pytest.raises(WeightsError, match="weights of a finished cell, not an authors' checkpoint"):
        read_checkpoint(tmp_path / "weights.safetensors")
