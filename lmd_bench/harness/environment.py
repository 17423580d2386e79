"""What a figure was measured on: machine, versions, switches. No host name, user name or path is recorded."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

Facts = dict[str, Any]
PACKAGES = ("lmd-bench", "torch", "torchvision", "timm", "diffusers", "numpy", "scipy", "pillow")
_GIT_TIMEOUT_S = 10


def environment(device: str) -> Facts:
    """Everything about machine and software that a record keeps, as plain JSON values. `device`: "cpu", "cuda:0", ...

    What cannot be found out is None, and `unknown` says why, by dotted name. Imports torch.
    """
    unknown: dict[str, str] = {}
    return {
        "device": device,
        **machine(),
        "packages": package_versions(),
        "git": git_state(unknown),
        "gpu": gpu_facts(device, unknown) if device.startswith("cuda") else None,
        "switches": torch_switches(),
        "unknown": unknown,
    }


def machine_name(facts: Facts) -> str:
    """A short slug of the machine in `environment()`: "cpu-2core-xeon", "nvidia-h200"."""
    gpu = facts.get("gpu")
    if gpu:
        name = str(gpu["name"])
        words = name if name.lower().startswith(("nvidia", "amd")) else f"nvidia {name}"
        return _slug(words)
    model = str(facts["cpu"]["model"])
    family = re.search(r"\b(xeon|epyc|ryzen|threadripper|core|apple m\d+|neoverse|graviton)\b", model.lower())
    return _slug(f"cpu {facts['cpu']['cores_available']}core {family.group(1) if family else platform.machine()}")


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


# -- without torch ----------------------------------------------------------------------------------------------------


def machine() -> Facts:
    """CPU, memory, system and load; needs no torch."""
    return {
        "cpu": {
            "model": cpu_model(),
            "cores_physical": psutil.cpu_count(logical=False),
            "cores_logical": psutil.cpu_count(logical=True),
            "cores_available": available_cores(),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "system": _system(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "variables": {
            name: os.environ.get(name)
            for name in (
                "OMP_NUM_THREADS",
                "OMP_WAIT_POLICY",
                "GOMP_SPINCOUNT",
                "MKL_NUM_THREADS",
                "CUBLAS_WORKSPACE_CONFIG",
            )
        },
    }


def _system() -> str:
    """Kernel and its version to two places: what follows names builds of a site, not behaviour."""
    version = re.match(r"\d+(\.\d+)?", platform.release())
    return f"{platform.system()} {version.group() if version else platform.release()}"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as its maker gives it, else its architecture."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine()


def available_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may use: its affinity, cut by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota.is_file():
        limit, _, period = quota.read_text(encoding="ascii", errors="replace").partition(" ")
        if limit.isdigit() and period.strip().isdigit():
            cores = min(cores, max(1, round(int(limit) / int(period))))
    return cores


def package_versions() -> dict[str, str | None]:
    """Installed version of each package that figures depend on; None where it is missing."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_state(unknown: dict[str, str], package: Path | None = None) -> Facts | None:
    """Commit of the checkout that the package runs from and whether tracked files differ from it; None elsewhere.

    Reports do not count: replacing old ones by the very run that asks is no change of what is measured.
    """
    folder = package or Path(__file__).resolve().parents[1]
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
        if (Path(top) / folder.name).resolve() != folder.resolve():
            unknown["git"] = "the package is not run from a checkout of its own"
            return None
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)reports")
        return {"commit": commit, "dirty": bool(changed)}
    except FileNotFoundError:
        unknown["git"] = "git is not installed"
    except subprocess.TimeoutExpired:
        unknown["git"] = f"git did not answer within {_GIT_TIMEOUT_S} s"
    except subprocess.CalledProcessError:
        unknown["git"] = "the package is not run from a checkout with a commit"
    return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S)
    return result.stdout.strip()


# -- with torch -------------------------------------------------------------------------------------------------------


def torch_switches() -> Facts:
    """Threads and the settings that decide precision and attention kernels."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "attention": {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        },
        "mkl": torch.backends.mkl.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
    }


def gpu_facts(device: str, unknown: dict[str, str]) -> Facts:
    """The GPU that `device` names; driver, clocks and foreign processes come from NVML where it is installed."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    facts: Facts = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "count": torch.cuda.device_count(),
    }
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        unknown["gpu.nvml"] = "nvidia-ml-py is not installed (pip install 'lmd-bench[gpu]')"
        return {**facts, "nvml": None}
    return {**facts, "nvml": nvml_facts(nvml, str(properties.uuid), unknown)}


def nvml_facts(nvml: Any, uuid: str, unknown: dict[str, str]) -> Facts | None:
    """Driver, clocks (MHz), power limit (W), temperature (C) and other compute processes of the GPU with this UUID."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        unknown["gpu.nvml"] = str(error)
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        readings: dict[str, Callable[[], Any]] = {
            "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "utilization_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "other_processes": lambda: _other_processes(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        return {name: _reading(nvml, f"gpu.nvml.{name}", read, unknown) for name, read in readings.items()}
    except nvml.NVMLError as error:
        unknown["gpu.nvml"] = str(error)
        return None
    finally:
        nvml.nvmlShutdown()


def _reading(nvml: Any, name: str, read: Callable[[], Any], unknown: dict[str, str]) -> Any:
    """One value; cards and containers differ in what they tell."""
    try:
        return read()
    except nvml.NVMLError as error:
        unknown[name] = str(error)
        return None


def _other_processes(processes: list[Any]) -> list[Facts]:
    """Memory of each compute process on the GPU that is not this one.

    In a container process numbers may differ from the driver's; this process then appears among the others.
    """
    return [{"memory_bytes": p.usedGpuMemory} for p in processes if p.pid != os.getpid()]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
