"""The table for the eye and the JSON for the record."""

from __future__ import annotations

import os
import platform
import subprocess
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import bssn_kernels
from bssn_kernels.bench.measure import NOISY, MemoryMeter, Samples
from bssn_kernels.bench.session import CLONE, Row

FORMAT = "bssn_kernels bench 1"
HEADER = (
    *("workload", "layers", "MiB", "variant", "provider", "f ms", "f+b ms", "native/f", "native/f+b", "f/clone"),
    *("extra f", "extra f+b", "kept MiB"),
)
NUMBERS = slice(5, None)


def baselines(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Per workload the rows that others are divided by: native SN and the clone."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        of_workload = found.setdefault(row.workload, {})
        if row.provider in ("native", CLONE):
            of_workload[row.provider] = row
    return found


def ratios(row: Row, base: Mapping[str, Row]) -> dict[str, float | None]:
    """Speed-ups over native SN, and the forward in units of the clone; None where a side was not timed."""

    def over(above: Samples | None, below: Samples | None) -> float | None:
        return above.median / below.median if above and below else None

    native, clone = base.get("native"), base.get(CLONE)
    return {
        "native_over_forward": over(native and native.forward, row.forward),
        "native_over_both": over(native and native.both, row.both),
        "forward_over_clone": over(row.forward, clone and clone.forward),
    }


def table(rows: Sequence[Row], meter: MemoryMeter) -> str:
    """All rows as one text table with its legend."""
    base = baselines(rows)
    lines: list[tuple[str, ...] | str] = []
    above = ""
    for row in rows:
        new = row.workload != above
        if new and above:
            lines.append("")
        above = row.workload
        head = (row.workload, str(row.layers), f"{row.nbytes / 2**20:.1f}") if new else ("", "", "")
        head += (row.variant.upper(), row.provider)
        if row.refused:
            lines.append((*head, row.refused))
            continue
        ratio = ratios(row, base[row.workload])
        clone = row.provider == CLONE
        numbers = (
            milliseconds(row.forward),
            milliseconds(row.both),
            "" if clone else times(ratio["native_over_forward"]),
            "" if clone else times(ratio["native_over_both"]),
            times(ratio["forward_over_clone"]),
            mebibytes(row.extra_forward),
            mebibytes(row.extra_both),
            mebibytes(row.kept),
        )
        lines.append((*head, *numbers))
    return "\n".join([*aligned([HEADER, *lines], NUMBERS), "", *wrapped(legend(meter))])


def aligned(lines: Sequence[tuple[str, ...] | str], numbers: slice) -> Iterable[str]:
    """Columns of equal width, numbers to the right; a row that is too short has its last cell run on."""
    full = len(lines[0])
    cells = [line for line in lines if isinstance(line, tuple) and len(line) == full]
    widths = [max(len(line[i]) for line in cells) for i in range(full)]
    right = set(range(full)[numbers]) | {i for i in range(full) if lines[0][i] in ("layers", "MiB")}
    for line in lines:
        if isinstance(line, str):
            yield line
            continue
        free = len(line) - 1 if len(line) < full else full
        yield "  ".join(
            c if i >= free else c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(line)
        ).rstrip()


def legend(meter: MemoryMeter) -> list[str]:
    """What the columns mean."""
    return [
        "f: one forward of a root that reads every normalized weight; f+b: and the gradient of every weight, from given"
        f" ones. Medians of interleaved rounds; ~ where half of the samples spread by more than {NOISY:.0%}.",
        "native: torch's spectral_norm in the model's form. native/f, native/f+b: its time over the row's. Only SN has"
        " a native form, so native SN is the baseline of every variant.",
        "clone: a fresh copy of all weights, made in the same rounds.",
        "extra: MiB at the peak beyond normalized weights (f) and gradients (f+b). kept: MiB that stay taken between"
        f" calls, most of it to hold the results of the next. How: {meter.reason or meter.METHOD}.",
    ]


def wrapped(paragraphs: Iterable[str]) -> Iterable[str]:
    """Lines of a legend that fit a terminal."""
    for text in paragraphs:
        yield from textwrap.wrap(text, 110, subsequent_indent="  ", break_on_hyphens=False)


def milliseconds(samples: Samples | None) -> str:
    if samples is None:
        return ""
    return f"{'~' if samples.noisy else ''}{samples.median * 1e3:.2f}"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def mebibytes(nbytes: int | None) -> str:
    # "+ 0.0" turns a rounded -0.0 into 0.0.
    return "" if nbytes is None else f"{round(nbytes / 2**20, 1) + 0.0:.1f}"


def record(rows: Sequence[Row], settings: Mapping[str, Any], meter: MemoryMeter) -> dict[str, Any]:
    """Everything measured, with raw samples in seconds and sizes in bytes."""
    base = baselines(rows)
    return {
        "format": FORMAT,
        "machine": machine(),
        "settings": {**settings, "memory": meter.reason or meter.METHOD},
        "rows": [
            {
                "workload": row.workload,
                "layers": row.layers,
                "bytes": row.nbytes,
                "variant": row.variant or None,
                "provider": row.provider,
                "refused": row.refused or None,
                "errors": row.errors and row.errors._asdict(),
                "forward": of_samples(row.forward),
                "forward_backward": of_samples(row.both),
                "extra_forward_bytes": row.extra_forward,
                "extra_forward_backward_bytes": row.extra_both,
                "kept_bytes": row.kept,
                **ratios(row, base[row.workload]),
            }
            for row in rows
        ],
    }


def of_samples(samples: Samples | None) -> dict[str, Any] | None:
    if samples is None:
        return None
    return {"median": samples.median, "quartiles": list(samples.quartiles), "samples": samples.seconds}


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bssn_kernels": bssn_kernels.__version__,
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit that the package runs from, with "+" for changes since; None when it runs from no checkout."""
    home = Path(bssn_kernels.__file__).resolve().parents[1]
    if not (home / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(home)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "") if head.returncode == 0 else None
