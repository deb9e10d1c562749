"""What every benchmark shares: rounds in turn, medians, a table on the terminal and JSON in assets/bench/."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

BENCH_DIR = Path(__file__).parent.parent / "assets" / "bench"
T = TypeVar("T")
PACKAGES = ("torch", "transformers", "gradio", "tokenizers", "llama-cpp-python")


def in_turn(peers: Mapping[str, Callable[[], T]], rounds: int = 5) -> dict[str, list[T]]:
    """Run every peer once a round, one after another, so that a noisy minute hits all of them; give what each gave."""
    results: dict[str, list[T]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run in peers.items():
            results[name].append(run())
    return results


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median, over rounds, of ours by theirs in the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def report(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **more: Any) -> None:
    """Print a markdown table and write it, with the machine and anything else, to assets/bench/NAME.json."""
    cells = [list(columns), *([_show(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    BENCH_DIR.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "columns": list(columns), "rows": [list(row) for row in rows], **more}
    (BENCH_DIR / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
