"""The table for the eye and the JSON for the record."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bssn_kernels.bench.machine import machine
from bssn_kernels.bench.measure import NOISY, Samples
from bssn_kernels.bench.memory import CudaMemoryMeter, MemoryMeter
from bssn_kernels.bench.session import CLONE, Measured, Row

FORMAT = "bssn_kernels bench 2"
HEADER = (
    *("workload", "layers", "MiB", "variant", "provider", "f ms", "f+b ms", "native/f", "native/f+b", "f/clone"),
    *("extra f", "extra f+b", "kept MiB"),
)
NUMBERS = slice(5, None)


def ratios(row: Row, measured: Measured) -> dict[str, float | None]:
    """Speed-ups over native SN, and the forward in units of the clone; None where a side was not timed."""

    def of(label: str, what: str) -> float | None:
        other = measured.row(label)
        return other and other.median(what)

    return {
        "native_over_forward": over(of("native sn", "forward"), row.median("forward")),
        "native_over_both": over(of("native sn", "both"), row.median("both")),
        "forward_over_clone": over(row.median("forward"), of(CLONE, "forward")),
    }


def over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def table(measured: Sequence[Measured], meter: MemoryMeter | CudaMemoryMeter) -> str:
    """All rows as one text table with its legend."""
    lines: list[tuple[str, ...] | str] = []
    for of_one in measured:
        lines += [""] if lines else []
        head = (of_one.workload, str(of_one.layers), f"{of_one.nbytes / 2**20:.1f}")
        for row in of_one.rows:
            lines.append((*head, row.variant.upper(), row.provider, *cells(row, of_one)))
            head = ("", "", "")
    return "\n".join([*aligned([HEADER, *lines], NUMBERS), "", *wrapped(legend(meter))])


def cells(row: Row, measured: Measured) -> tuple[str, ...]:
    """The numbers of a row, or why there are none."""
    if row.refused or row.left_out:
        return (row.refused or f"left out: {row.left_out}",)
    ratio, clone = ratios(row, measured), row.provider == CLONE
    return (
        milliseconds(row.samples("forward")),
        milliseconds(row.samples("both")),
        "" if clone else times(ratio["native_over_forward"]),
        "" if clone else times(ratio["native_over_both"]),
        times(ratio["forward_over_clone"]),
        mebibytes(row.extra.get("forward")),
        mebibytes(row.extra.get("both")),
        mebibytes(row.kept),
    )


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


def legend(meter: MemoryMeter | CudaMemoryMeter) -> list[str]:
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


def record(
    measured: Sequence[Measured],
    settings: Mapping[str, Any],
    meter: MemoryMeter | CudaMemoryMeter,
    device: str = "cpu",
) -> dict[str, Any]:
    """Everything measured, with raw samples in seconds and sizes in bytes."""
    return {
        "format": FORMAT,
        "machine": machine(device),
        "settings": {**settings, "memory": meter.reason or meter.METHOD},
        "rows": [
            {"workload": of_one.workload, "layers": of_one.layers, "bytes": of_one.nbytes}
            | row.record()
            | ratios(row, of_one)
            for of_one in measured
            for row in of_one.rows
        ],
    }
