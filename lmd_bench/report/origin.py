"""Where the figures come from: machine, commit, command, dates, and what makes records unfit to be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lmd_bench.config import Suite
from lmd_bench.records import InferenceRecord, ProfileRecord, RunRecord
from lmd_bench.report.load import Results


def machine_text(environment: Mapping[str, Any]) -> str:
    """The machine in one line: GPU if one was used, CPU, memory, system."""
    gpu, cpu = environment.get("gpu") or {}, environment.get("cpu") or {}
    parts = []
    if gpu:
        parts.append(str(gpu.get("name", "a GPU without a name")))
        if driver := (gpu.get("nvml") or {}).get("driver"):
            parts.append(f"driver {driver}")
    if cpu.get("model"):
        parts.append(f"{cpu['model']}, {cpu.get('cores_available', 'an unknown number of')} cores")
    if environment.get("memory_bytes"):
        parts.append(f"{environment['memory_bytes'] / 2**30:.0f} GiB")
    if environment.get("system"):
        parts.append(str(environment["system"]))
    return ", ".join(parts) or "not recorded"


def commit_text(environment: Mapping[str, Any]) -> str:
    """The commit that ran, or why it is not known."""
    git = environment.get("git")
    if git and git.get("commit"):
        return str(git["commit"])[:12] + (" with uncommitted changes" if git.get("dirty") else "")
    reason = (environment.get("unknown") or {}).get("git", "not recorded")
    version = (environment.get("packages") or {}).get("lmd-bench")
    return f"unknown ({reason})" + (f", lmd-bench {version}" if version else "")


def software_text(environment: Mapping[str, Any]) -> str:
    """Versions that figures depend on."""
    versions = environment.get("packages") or {}
    named = [f"{name} {versions[name]}" for name in ("torch", "timm", "diffusers") if versions.get(name)]
    threads = (environment.get("switches") or {}).get("threads")
    return ", ".join(
        [str(environment["python"])] * bool(environment.get("python")) + named + [f"{threads} threads"] * bool(threads)
    ) or "not recorded"  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """What stands at the top of the page and at the foot of every file."""

    facts: tuple[tuple[str, str], ...]
    """(name, text) in reading order."""
    warnings: tuple[str, ...]
    """Why some records should not be compared."""

    @property
    def lines(self) -> list[str]:
        """The facts that every file carries, a line each."""
        wanted = ("Suite", "Machine", "Commit", "Command", "Report made by")
        return [f"{name}: {text}" for name, text in self.facts if name in wanted]


def origin(suite: Suite, results: Results, command: str) -> Origin:
    """Gather what the records say about themselves; `command` made the report."""
    runs = [run.record for run in results.all_runs]
    records: list[RunRecord | ProfileRecord | InferenceRecord] = [
        *runs,
        *(profile.record for profile in results.profiles),
        *(inference.record for inference in results.inferences),
    ]
    environments = [record.environment for record in records]
    machines, commits = _distinct(map(machine_text, environments)), _distinct(map(commit_text, environments))
    finished = sum(run.status == "finished" for run in runs)
    dates = sorted(record.started_at for record in records)
    facts = [
        ("Suite", f"{suite.name} ({suite.title})"),
        ("Machine", "; ".join(machines)),
        ("Software", "; ".join(_distinct(map(software_text, environments)))),
        ("Commit", "; ".join(commits)),
        ("Command", "; ".join(_distinct(record.command for record in records))),
        ("Report made by", command),
        ("Runs", f"{finished} finished, {len(runs) - finished} failed, {len(results.profiles)} speed runs"),
        ("Started", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"),
        ("Seeds", ", ".join(map(str, sorted({run.seed for run in runs}))) or "no run"),
        ("Steps", ", ".join(map(str, sorted({run.num_steps for run in runs if run.num_steps}))) or "no run"),
        ("Reference row", suite.reference or "none named in the suite"),
    ]
    return Origin(tuple(facts), tuple(_warnings(machines, commits, runs)))


def _warnings(machines: list[str], commits: list[str], runs: list[RunRecord]) -> list[str]:
    warnings = []
    if len(machines) > 1:
        warnings.append(f"Records come from {len(machines)} machines: times cannot be compared across them.")
    if len(commits) > 1:
        warnings.append(f"Records were made by {len(commits)} states of the code.")
    for what, key in (("precisions", "precision"), ("batch sizes", "batch_size"), ("numbers of steps", "steps")):
        trained = [run for run in runs if run.num_steps]
        found = [run.config.get(key, (run.config.get("recipe") or {}).get(key)) for run in trained]
        values = {str(value) for value in found if value is not None}
        if len(values) > 1:
            warnings.append(f"Rows were run with different {what}: {', '.join(sorted(values))}.")
    return warnings


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
