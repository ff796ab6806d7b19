"""What a row's times are in units of others, and the design's targets."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu import LARGE, MB
from benchmarks.gpu.cases import Row

# DESIGN section 4. Forward over a copy: Triton's limits were set by workload, CUDA's by whether the largest layer fits
# the L2 cache.
TRITON_FORWARD = {"vit_b": 1.25, "paper_resnet": 1.4, "biggan128": 1.5}
BACKWARD = {"triton": 1.3, "cuda": 1.2}
HEADLINES = ("biggan128", "sngan32")
ERRORS = {"weight": 1e-5, "grad": 1e-5, "sigma": 1e-6}


def over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def ratios_of(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """Only what was measured.

    ``*_over_copy`` and ``*_over_three_stream`` are device times (backward: both less forward; backward_alone: over a
    kept graph). ``share_*``: bytes that must move (a read and a write; two reads and a write) over the time, in units
    of the copy's bandwidth. ``native_over_*``: wall time of torch's parametrization, SN, over the row's.
    ``host_over_floor``: host time of the forward.
    """
    if not row.variant or row.refused:
        return {}
    usable = {r.label: r for r in rows if not r.refused}

    def of(label: str, what: str, clock: str) -> float | None:
        return usable[label].median(what, clock) if label in usable else None

    copied, added = of("copy", "forward", "device"), of("three_stream", "backward", "device")
    forward, backward = row.median("forward", "device"), row.difference("device")
    found = {
        "forward_over_copy": over(forward, copied),
        "backward_over_three_stream": over(backward, added),
        "backward_alone_over_three_stream": over(row.median("backward", "device"), added),
        "share_forward": over(copied, forward),
        "share_backward": over(copied and 1.5 * copied, backward),
        "host_over_floor": over(row.median("forward", "host"), of("floor", "forward", "host")),
    }
    for what in ("forward", "both"):
        found[f"native_over_{what}"] = over(of("parametrization sn", what, "wall"), row.median(what, "wall"))
    return {name: value for name, value in found.items() if value is not None}


def targets_of(
    row: Row, rows: Sequence[Row], workload: str, nbytes: int, *, fits_l2: bool = False, exact: bool = True
) -> list[dict]:
    """The design's targets for one of our rows, each with what was measured and whether it is met.

    Args:
        fits_l2: the largest layer fits the L2 cache.
        exact: float32 weights, which have a target for errors.
    """
    if row.backend in ("", "reference") or row.refused:
        return []
    found: list[dict] = []

    def most(name: str, value: float | None, limit: float | None) -> None:
        if value is not None and limit is not None:
            found.append({"target": name, "value": value, "limit": limit, "met": value <= limit})

    def least(name: str, value: float | None, limit: float) -> None:
        if value is not None:
            found.append({"target": name, "value": value, "limit": limit, "at_least": True, "met": value >= limit})

    if nbytes >= LARGE:
        limit = {"triton": TRITON_FORWARD.get(workload), "cuda": 1.2 if fits_l2 else 1.3}.get(row.backend)
        most("forward / copy", row.ratios.get("forward_over_copy"), limit)
        most("backward / three-stream", row.ratios.get("backward_over_three_stream"), BACKWARD.get(row.backend))
    if not row.graph:
        launched = {what: counts["kernels"] + counts["memory"] for what, counts in row.launches.items()}
        most("launches, forward", launched.get("forward"), 2)
        most("launches, backward", launched.get("backward"), 1)
        most("host time / floor", row.ratios.get("host_over_floor"), 1.5)
        for what, words in (("forward", "forward"), ("both", "forward + backward")):
            extra = row.extra.get(what)
            most(f"extra memory, {words}, MB", extra and extra / MB, max(0.02 * nbytes, 8 * MB) / MB)
    if exact:
        for what, limit in ERRORS.items():
            most(f"error, {what}", row.errors.get(what), limit)
    if workload in HEADLINES:
        ours = row.median("both", "wall")
        natives = [r for r in rows if r.variant == "sn" and not r.refused and not r.backend and r.provider != "foreach"]
        graphs = [t for r in natives if r.graph and (t := r.median("both", "wall")) is not None]
        compiled = [t for r in natives if r.compiled and (t := r.median("both", "wall")) is not None]
        if not row.graph:
            least("eager parametrization / ours", row.ratios.get("native_over_both"), 10)
        elif workload == "sngan32" and graphs:
            least("native graph / our graph", over(min(graphs), ours), 10)
        if graphs and compiled:
            least("best of native graph and compile / ours", over(min(graphs + compiled), ours), 2)
    return found
