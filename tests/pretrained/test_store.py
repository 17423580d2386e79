"""Where weights are found, and what is refused. No network: hosts answer as the tests say."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

import lmd_bench.pretrained.store as module
from lmd_bench.errors import MissingWeightsError, WeightsError
from lmd_bench.pretrained import WeightsStore
from lmd_bench.pretrained.store import reachable

from .conftest import REVISION, SINGLE, UNET, fill_folder, hub_snapshot, sha256

Make = Callable[..., WeightsStore]


def test_a_file_is_found_in_the_given_folder_flat_or_under_the_entrys_name(store_of: Make, given: Path) -> None:
    (given / "single").mkdir()
    nested = given / "single" / "single.pth"
    nested.write_bytes(SINGLE)
    assert store_of(given).find("single") == nested
    (given / "single.pth").write_bytes(SINGLE)
    assert store_of(given).find("single") == given / "single.pth"
    (given / "hubbed").mkdir()
    (given / "hubbed" / "model.safetensors").write_bytes(SINGLE)
    assert store_of(given).find("hubbed") == given / "hubbed" / "model.safetensors"


def test_the_environment_names_a_folder_where_the_option_does_not(
    store_of: Make, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (given / "single.pth").write_bytes(SINGLE)
    monkeypatch.setenv("LMD_BENCH_WEIGHTS", str(given))
    assert store_of().find("single") == given / "single.pth"
    other = tmp_path / "other"
    other.mkdir()
    (other / "single.pth").write_bytes(SINGLE)
    assert store_of(other).find("single") == other / "single.pth"
    monkeypatch.setenv("LMD_BENCH_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=r"LMD_BENCH_WEIGHTS=.*nowhere: no such folder"):
        store_of()


def test_then_the_libraries_own_caches_are_looked_at(store_of: Make, given: Path, caches: Path) -> None:
    cached = caches / "torch" / "checkpoints" / "single.pth"
    cached.write_bytes(SINGLE)
    assert store_of(given).find("single") == cached
    file = hub_snapshot(caches, "someone/hubbed") / "model.safetensors"
    file.write_bytes(SINGLE)
    assert store_of(given).find("hubbed") == file
    snapshot = fill_folder(hub_snapshot(caches, "someone/folder"))
    assert store_of(given).find("folder") == snapshot


def test_the_snapshot_of_its_own_commit_comes_before_the_one_that_main_names(store_of: Make, caches: Path) -> None:
    main = hub_snapshot(caches, "someone/hubbed")
    (main / "model.safetensors").write_bytes(SINGLE)
    own = main.with_name(REVISION)
    own.mkdir()
    assert store_of().find("hubbed") == main / "model.safetensors"
    (own / "model.safetensors").write_bytes(SINGLE)
    assert store_of().find("hubbed") == own / "model.safetensors"


def test_a_snapshot_that_lacks_files_is_as_good_as_none(store_of: Make, caches: Path) -> None:
    snapshot = fill_folder(hub_snapshot(caches, "someone/folder"))
    (snapshot / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no Folder weights"):
        store_of().find("folder")


def test_what_is_missing_says_what_to_put_where_and_downloads_nothing(store_of: Make, asked: list[str]) -> None:
    reason = "no Single weights: put single.pth into --weights DIR (lmd-bench doctor lists all)"
    assert store_of().obstacle("single") == reason
    with pytest.raises(WeightsError) as raised:
        store_of().find("single")
    assert str(raised.value) == reason
    assert "put the folder folder into --weights DIR" in (store_of().obstacle("folder") or "")
    assert asked == []


def test_a_given_folder_must_exist(store_of: Make, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"--weights .*nowhere: no such folder"):
        store_of(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match=r"--weights .*file: not a folder"):
        store_of(tmp_path / "file")


def test_an_unknown_name_is_answered_with_the_nearest(store_of: Make) -> None:
    with pytest.raises(WeightsError, match="no weights are named 'singel'; did you mean 'single'"):
        store_of().find("singel")


def test_a_wrong_hash_is_an_error_even_where_the_cache_holds_the_right_file(
    store_of: Make, given: Path, caches: Path
) -> None:
    (caches / "torch" / "checkpoints" / "single.pth").write_bytes(SINGLE)
    wrong = SINGLE[:-1] + b"!"
    (given / "single.pth").write_bytes(wrong)
    with pytest.raises(WeightsError) as raised:
        store_of(given).find("single")
    for part in ("single.pth: wrong hash", sha256(SINGLE), sha256(wrong), "download it again from https://"):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    for asked in (False, True):
        with pytest.raises(WeightsError, match="wrong hash"):
            store_of(given).obstacle("single", download=asked)
    assert not isinstance(raised.value, MissingWeightsError)
    assert store_of(given).locate("single", check=False) == given / "single.pth"


def test_a_file_of_another_size_is_refused_before_it_is_hashed(store_of: Make, given: Path, tmp_path: Path) -> None:
    (given / "single.pth").write_bytes(SINGLE[:5])
    with pytest.raises(WeightsError, match=rf"5 bytes, expected {len(SINGLE)}; it may be cut off"):
        store_of(given).find("single")
    assert not (tmp_path / "hashes.json").exists()


def test_where_only_first_digits_are_known_they_are_held(store_of: Make, given: Path) -> None:
    (given / "prefix.pth").write_bytes(SINGLE)
    store_of(given).find("prefix")
    (given / "prefix.pth").write_bytes(b"another")
    with pytest.raises(WeightsError, match=f"expected {sha256(SINGLE)[:8]}, found {sha256(b'another')}"):
        store_of(given).find("prefix")


def test_a_folder_must_hold_every_file_and_the_right_weights(store_of: Make, given: Path) -> None:
    place = fill_folder(given / "folder")
    assert store_of(given).find("folder") == place
    weights = place / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"other weights")
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model.safetensors: wrong hash"):
        store_of(given).find("folder")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=r"holds unet/diffusion_pytorch_model.bin .*; only safetensors are read"):
        store_of(given).find("folder")
    (place / "model_index.json").unlink()
    with pytest.raises(WeightsError, match=r"model_index.json is missing"):
        store_of(given).find("folder")


def test_the_text_encoders_other_format_has_a_name_of_its_own(store_of: Make, given: Path) -> None:
    place = fill_folder(given / "folder") / "text_encoder"
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"holds text_encoder/pytorch_model.bin in place of"):
        store_of(given).find("folder")


# -- hashes ---------------------------------------------------------------------------------------------------------


def test_a_file_is_hashed_once_and_again_only_when_it_changes(
    store_of: Make, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda path: hashed.append(path) or digest(path))
    file = given / "single.pth"
    file.write_bytes(SINGLE)
    store = store_of(given)
    assert store.find("single") == store.find("single") == file
    assert store.sha256_of("single") == sha256(SINGLE)
    store_of(given).find("single")
    assert hashed == [file], "another process reads what the first has remembered"
    os.utime(file, ns=(1, 1))
    store_of(given).find("single")
    assert hashed == [file, file]
    assert len(json.loads((given.parent / "hashes.json").read_text())) == 1, "what was known of the file is replaced"


def test_a_damaged_memory_of_hashes_is_no_obstacle(store_of: Make, given: Path, tmp_path: Path) -> None:
    (given / "single.pth").write_bytes(SINGLE)
    (tmp_path / "hashes.json").write_text("{damaged")
    assert store_of(given).sha256_of("single") == sha256(SINGLE)
    assert store_of(given, hash_cache=Path("/proc/nowhere/hashes.json")).find("single") == given / "single.pth"


def test_a_folders_hash_is_over_all_its_files(store_of: Make, given: Path) -> None:
    place = fill_folder(given / "folder")
    before = store_of(given).sha256_of("folder")
    (place / "text_encoder" / "model.safetensors").write_bytes(b"changed")
    assert store_of(given).sha256_of("folder") != before
    assert sha256(UNET) != before


# -- downloads ------------------------------------------------------------------------------------------------------


def test_a_host_that_does_not_answer_is_asked_once_and_said(store_of: Make, asked: list[str]) -> None:
    store = store_of()
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"no Single weights: weights.example cannot be reached; put single.pth"):
            store.find("single", download=True)
    assert "weights.example cannot be reached" in (store.obstacle("unknown", download=True) or "")
    assert asked == ["https://weights.example/single.pth"]
    assert "hub.example cannot be reached" in (store.obstacle("folder", download=True) or "")


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_never_tries(store_of: Make, asked: list[str], monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how != "--offline":
        monkeypatch.setenv(how, "1")
    store = store_of(answers=True, offline=how == "--offline")
    assert store.is_offline
    with pytest.raises(WeightsError, match=r"put single.pth into --weights DIR"):
        store.find("single", download=True)
    assert store.obstacle("folder", download=True) is not None
    assert asked == []


def test_a_download_is_checked_and_lands_where_the_library_keeps_it(
    store_of: Make, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[tuple[str, str | None]] = []

    def fetch(url: str, target: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        asked_for.append((url, hash_prefix))
        Path(target).write_bytes(SINGLE)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    said: list[str] = []
    store = store_of(answers=True, on_download=said.append)
    assert store.obstacle("single", download=True) is None
    assert store.locate("single", download=True) is None
    assert asked_for == said == [], "asking whether it can be had fetches nothing"
    assert store.find("single", download=True) == caches / "torch" / "checkpoints" / "single.pth"
    store.find("single", download=True)
    assert asked_for == [("https://weights.example/single.pth", sha256(SINGLE))]
    assert said == ["downloading Single weights, about 0 MiB, from https://weights.example/single.pth"]


def test_hub_entries_are_fetched_by_the_hubs_client(
    store_of: Make, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def one(repository: str, filename: str, *, revision: str | None) -> str:
        assert (repository, filename, revision) == ("someone/hubbed", "model.safetensors", REVISION)
        file = hub_snapshot(caches, repository) / filename
        file.write_bytes(SINGLE)
        return str(file)

    def many(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision is None
        assert "model_index.json" in allow_patterns
        return str(fill_folder(hub_snapshot(caches, repository)))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", many)
    store = store_of(answers=True)
    assert store.find("hubbed", download=True).name == "model.safetensors"
    assert (store.find("folder", download=True) / "model_index.json").is_file()


def test_a_download_that_fails_is_one_line(store_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object, **named: object) -> None:
        raise URLError("name or service\nnot known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(MissingWeightsError) as raised:
        store_of(answers=True).find("single", download=True)
    assert str(raised.value) == (
        "no Single weights: https://weights.example/single.pth cannot be fetched (<urlopen error name or service not "
        "known>); put single.pth into --weights DIR (lmd-bench doctor lists all)"
    )


def test_a_full_disk_is_found_before_the_download(store_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = store_of().manifest
    large = manifest.entry("single").model_copy(update={"about_mib": 2**40})
    manifest = manifest.model_copy(update={"weights": {"single": large}})
    with pytest.raises(WeightsError, match=r"MiB to download, \d+ MiB free"):
        store_of(answers=True, manifest=manifest).find("single", download=True)


def test_a_host_is_reachable_where_a_port_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reachable(f"http://127.0.0.1:{port}/file")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert reachable("http://nowhere.invalid/file"), "behind a proxy it is the proxy that must answer"
    assert not reachable("http://nowhere.invalid/file")


@pytest.mark.parametrize(
    ("variables", "addresses"),
    [
        ({}, [("hub.example", 443)]),
        ({"https_proxy": "proxy.corp:3128"}, [("proxy.corp", 3128)]),
        ({"https_proxy": "http://user:word@proxy.corp:3128/"}, [("proxy.corp", 3128)]),
        ({"https_proxy": "https://proxy.corp"}, [("proxy.corp", 443)]),
        ({"http_proxy": "proxy.corp:3128"}, [("hub.example", 443)]),
        ({"all_proxy": "socks5://proxy.corp"}, [("proxy.corp", 1080), ("hub.example", 443)]),
        ({"all_proxy": "other:1", "https_proxy": "proxy.corp:3128"}, [("proxy.corp", 3128)]),
        ({"https_proxy": "proxy.corp:3128", "no_proxy": ".example"}, [("hub.example", 443)]),
    ],
)
def test_proxies_are_read_as_the_libraries_read_them(
    variables: dict[str, str], addresses: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert module._addresses("https://hub.example/file") == addresses


def test_a_name_that_is_never_resolved_does_not_hold_up_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    blocked = threading.Event()

    def hang(*words: object, **named: object) -> None:
        blocked.wait(30)
        raise OSError("no such name")

    monkeypatch.setattr(module, "_addresses", lambda url: [("slow.example", 443)])
    monkeypatch.setattr(socket, "create_connection", hang)
    thread_count = threading.active_count()
    assert not reachable("https://slow.example/file", timeout_s=0.05)
    assert threading.active_count() == thread_count + 1, "the look-up is left behind, not waited for"
    blocked.set()
    for thread in threading.enumerate():
        if thread.daemon and thread.name.endswith("(connect)"):
            thread.join()


# -- doctor ---------------------------------------------------------------------------------------------------------


def test_status_says_found_missing_or_wrong_of_every_entry(store_of: Make, given: Path) -> None:
    (given / "single.pth").write_bytes(SINGLE)
    (given / "prefix.pth").write_bytes(b"another")
    (given / "u.pth").write_bytes(b"of unknown hash")
    fill_folder(given / "folder")
    states = {status.name: status for status in store_of(given).status()}
    found = {name: status.state for name, status in states.items()}
    assert found == {
        "single": "found",
        "prefix": "wrong",
        "unknown": "found",
        "hubbed": "missing",
        "folder": "found",
    }
    assert states["single"].detail == "hash right"
    assert states["unknown"].detail == f"hash not known here, yours is {sha256(b'of unknown hash')}"
    assert "wrong hash" in states["prefix"].detail
    assert "unet/diffusion_pytorch_model.safetensors: hash right" in states["folder"].detail
    assert f"text_encoder/model.safetensors: hash not known here, yours is {sha256(b'any')}" in states["folder"].detail


def test_large_files_are_hashed_only_when_asked_or_known(
    store_of: Make, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALL_BYTES", 3)
    (given / "prefix.pth").write_bytes(b"another")

    def state(hash_all: bool) -> str:
        return {s.name: s.state for s in store_of(given).status(hash_all=hash_all)}["prefix"]

    assert state(False) == "found"
    assert state(True) == "wrong"
    assert state(False) == "wrong", "what was computed once is not forgotten"


def test_a_store_can_be_sent_to_a_fresh_process(given: Path) -> None:
    (given / "x").touch()
    assert pickle.loads(pickle.dumps(WeightsStore(given))).folder == given
