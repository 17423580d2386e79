"""The record of the machine: complete, JSON-able, and silent on who and where."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmd_bench.harness.environment import (
    available_cores,
    cpu_model,
    environment,
    git_state,
    machine_name,
    nvml_facts,
    package_versions,
)


def test_the_record_is_json_and_holds_what_figures_depend_on() -> None:
    facts = environment("cpu")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]["cores_available"] >= 1
    assert facts["cpu"]["model"]
    assert facts["memory_bytes"] > 2**28
    assert facts["switches"]["threads"] == torch.get_num_threads()
    assert facts["switches"]["float32_matmul_precision"] == torch.get_float32_matmul_precision()
    assert facts["switches"]["attention"]["math"] is True
    assert facts["gpu"] is None
    assert "OMP_WAIT_POLICY" in facts["variables"]


def test_switches_are_read_at_the_time_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        facts = environment("cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    assert facts["switches"]["float32_matmul_precision"] == "high"
    assert facts["variables"]["OMP_WAIT_POLICY"] == "active"


def test_no_host_name_user_name_or_path_is_kept() -> None:
    text = json.dumps(environment("cpu"))
    strings = _strings(environment("cpu"))
    assert socket.gethostname() not in strings
    assert getpass.getuser() not in strings
    assert str(Path.home()) not in text
    assert os.getcwd() not in text
    assert sys.prefix not in text


def _strings(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set().union(*(_strings(inner) for inner in value.values())) if value else set()
    return set(str(value).split())


def test_the_module_imports_without_torch() -> None:
    code = (
        "import sys; from lmd_bench.harness import environment as e; e.machine(); e.package_versions(); "
        "e.git_state({}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("gpu", "model", "slug"),
    [
        (None, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu-2core-xeon"),
        (None, "AMD EPYC 9B14", "cpu-2core-epyc"),
        (None, "Intel(R) Core(TM) i7-1165G7", "cpu-2core-core"),
        ({"name": "NVIDIA H200"}, "AMD EPYC 9B14", "nvidia-h200"),
        ({"name": "Tesla V100-SXM2-16GB"}, "AMD EPYC 9B14", "nvidia-tesla-v100-sxm2-16gb"),
    ],
)
def test_machine_names_are_short_slugs(gpu: dict[str, str] | None, model: str, slug: str) -> None:
    assert machine_name({"gpu": gpu, "cpu": {"model": model, "cores_available": 2}}) == slug


def test_the_processor_is_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\n")
    assert cpu_model(cpuinfo) == "Some CPU @ 2 GHz"
    assert cpu_model(tmp_path / "missing")


def test_a_containers_quota_cuts_the_cores(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    assert available_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert available_cores(quota) == available_cores(tmp_path / "missing")


def test_missing_packages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmd_bench.harness.environment.PACKAGES", ("numpy", "no-such-package-at-all"))
    versions = package_versions()
    assert versions["numpy"]
    assert versions["no-such-package-at-all"] is None


def run_git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_commit_and_changes_of_a_checkout_are_found(tmp_path: Path) -> None:
    package = tmp_path / "lmd_bench"
    package.mkdir()
    (package / "a.py").write_text("a = 1\n")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "old.md").write_text("figures\n")
    run_git(tmp_path, "init")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-m", "first")
    unknown: dict[str, str] = {}
    clean = git_state(unknown, package)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "reports" / "old.md").unlink()
    assert git_state(unknown, package) == clean
    (package / "a.py").write_text("a = 2\n")
    assert git_state(unknown, package) == {**clean, "dirty": True}
    assert unknown == {}


def test_the_repository_around_a_virtual_environment_is_not_taken_for_ours(tmp_path: Path) -> None:
    package = tmp_path / "venv" / "lmd_bench"
    package.mkdir(parents=True)
    run_git(tmp_path, "init")
    unknown: dict[str, str] = {}
    assert git_state(unknown, package) is None
    assert "checkout of its own" in unknown["git"]


def test_outside_any_repository_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    unknown: dict[str, str] = {}
    assert git_state(unknown, tmp_path) is None
    assert "not run from a checkout" in unknown["git"]
    monkeypatch.setenv("PATH", "")
    assert git_state(unknown, tmp_path) is None
    assert unknown["git"] == "git is not installed"


class FakeNvmlError(Exception):
    """What NVML raises."""


def fake_nvml(**replaced: Any) -> SimpleNamespace:
    processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=1), SimpleNamespace(pid=-1, usedGpuMemory=2**30)]
    calls = {
        "NVMLError": FakeNvmlError,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-abc": "handle"}[uuid],
        "nvmlSystemGetDriverVersion": lambda: b"570.1",
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1000 * kind,
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetTemperature": lambda handle, kind: 40,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=3),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: processes,
    }
    return SimpleNamespace(**{**calls, **replaced})


def test_driver_clocks_and_foreign_processes_come_from_nvml() -> None:
    unknown: dict[str, str] = {}
    facts = nvml_facts(fake_nvml(), "abc", unknown)
    assert facts == {
        "driver": "570.1",
        "sm_clock_mhz": 1000,
        "sm_clock_max_mhz": 1980,
        "memory_clock_mhz": 2000,
        "power_limit_w": 700.0,
        "temperature_c": 40,
        "utilization_percent": 3,
        "other_processes": [{"memory_bytes": 2**30}],
    }
    assert unknown == {}


def test_what_nvml_will_not_tell_is_none_with_a_reason() -> None:
    def refuse(*_: Any) -> None:
        raise FakeNvmlError("Not Supported")

    unknown: dict[str, str] = {}
    facts = nvml_facts(fake_nvml(nvmlDeviceGetEnforcedPowerLimit=refuse), "abc", unknown)
    assert facts is not None
    assert facts["power_limit_w"] is None
    assert facts["temperature_c"] == 40
    assert unknown == {"gpu.nvml.power_limit_w": "Not Supported"}
    assert nvml_facts(fake_nvml(nvmlInit=refuse), "abc", unknown) is None
    assert unknown["gpu.nvml"] == "Not Supported"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_described() -> None:
    facts = environment("cuda:0")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["gpu"]["name"] == torch.cuda.get_device_name(0)
    assert (facts["gpu"]["nvml"] is None) == ("gpu.nvml" in facts["unknown"])
