"""What a row's times are in units of others, and the design's targets."""

from __future__ import annotations

from benchmarks import LARGE, MB
from bssn_kernels.bench.report import over
from bssn_kernels.bench.session import CLONE, Measured, Row

# Forward over a copy on a GPU: Triton's limits were set by workload, CUDA's by whether the largest layer fits the L2
# cache.
TRITON_FORWARD = {"vit_b": 1.25, "paper_resnet": 1.4, "biggan128": 1.5}
BACKWARD = {"triton": 1.3, "cuda": 1.2}
HEADLINES = ("biggan128", "sngan32")
ERRORS = {"weight": 1e-5, "grad": 1e-5, "sigma": 1e-6}
HOST = 1.5
CPU_FORWARD, CPU_BOTH_LARGE, CPU_BOTH_SMALL, CPU_CLONE = 3.0, 5.0, 4.0, 1.5
NATIVES = ("parametrization", "hook")


def ratios_of(row: Row, measured: Measured, device: str = "cuda") -> dict[str, float]:
    """Only what was measured.

    ``*_over_copy``, ``*_over_clone`` and ``*_over_three_stream`` are device times (backward: both less forward;
    backward_alone: over a kept graph). ``share_*``: bytes that must move (a read and a write; two reads and a write)
    over the time, in units of the copy's bandwidth. ``native_over_*``: wall time of torch's parametrization, SN, over
    the row's. ``host_over_floor``: host time of the forward, which a CPU cannot tell from the rest.
    """
    if not row.variant or not row.times:
        return {}

    def of(label: str, what: str, clock: str) -> float | None:
        other = measured.row(label)
        return other and other.median(what, clock)

    copied, added = of("copy", "forward", "device"), of("three_stream", "backward", "device")
    forward, backward = row.median("forward", "device"), row.difference("device")
    found = {
        "forward_over_copy": over(forward, copied),
        "forward_over_clone": over(forward, of(CLONE, "forward", "device")),
        "backward_over_three_stream": over(backward, added),
        "backward_alone_over_three_stream": over(row.median("backward", "device"), added),
        "share_forward": over(copied, forward),
        "share_backward": over(copied and 1.5 * copied, backward),
        "host_over_floor": over(row.median("forward", "host"), of("floor", "forward", "host")),
    }
    if device == "cpu":
        del found["host_over_floor"]
    for what in ("forward", "both"):
        found[f"native_over_{what}"] = over(of("parametrization sn", what, "wall"), row.median(what, "wall"))
    return {name: value for name, value in found.items() if value is not None}


class Verdicts(list[dict]):
    """Targets with what was measured and whether it is met; what was not measured has none."""

    def most(self, name: str, value: float | None, limit: float | None) -> None:
        if value is not None and limit is not None:
            self.append({"target": name, "value": value, "limit": limit, "met": value <= limit})

    def least(self, name: str, value: float | None, limit: float) -> None:
        if value is not None:
            self.append({"target": name, "value": value, "limit": limit, "at_least": True, "met": value >= limit})


def targets_of(
    row: Row, measured: Measured, device: str = "cuda", *, fits_l2: bool = False, exact: bool = True
) -> list[dict]:
    """The design's targets for one of our rows.

    Args:
        fits_l2: the largest layer fits the L2 cache.
        exact: float32 weights, which have a target for errors.
    """
    found = Verdicts()
    if row.backend in ("", "reference") or not row.times:
        return found
    (on_cpu if device == "cpu" else on_gpu)(found, row, measured, fits_l2)
    if not row.graph:
        for what, words in (("forward", "forward"), ("both", "forward + backward")):
            extra = row.extra.get(what)
            limit = max(0.02 * measured.nbytes, 8 * MB) / MB
            found.most(f"extra memory, {words}, MB", None if extra is None else extra / MB, limit)
    if exact and row.errors:
        for what, limit in ERRORS.items():
            found.most(f"error, {what}", row.errors[what][0] if what in row.errors else None, limit)
    return found


def on_cpu(found: Verdicts, row: Row, measured: Measured, fits_l2: bool) -> None:
    large = measured.nbytes >= LARGE
    found.least("native / forward", row.ratios.get("native_over_forward"), CPU_FORWARD)
    limit = CPU_BOTH_LARGE if large else CPU_BOTH_SMALL
    found.least("native / (forward + backward)", row.ratios.get("native_over_both"), limit)
    if large:
        found.most("forward / clone", row.ratios.get("forward_over_clone"), CPU_CLONE)


def on_gpu(found: Verdicts, row: Row, measured: Measured, fits_l2: bool) -> None:
    ratios = row.ratios
    if measured.nbytes >= LARGE:
        limit = {"triton": TRITON_FORWARD.get(measured.workload), "cuda": 1.2 if fits_l2 else 1.3}.get(row.backend)
        found.most("forward / copy", ratios.get("forward_over_copy"), limit)
        found.most("backward / three-stream", ratios.get("backward_over_three_stream"), BACKWARD.get(row.backend))
    if not row.graph:
        launched = {what: counts["kernels"] + counts["memory"] for what, counts in row.launches.items()}
        found.most("launches, forward", launched.get("forward"), 2)
        found.most("launches, backward", launched.get("backward"), 1)
        found.most("host time / floor", ratios.get("host_over_floor"), HOST)
    if measured.workload in HEADLINES:
        ours = row.median("both")
        natives = [r for r in measured.rows if r.provider.startswith(NATIVES) and r.times]
        graphs = [t for r in natives if r.graph and (t := r.median("both")) is not None]
        compiled = [t for r in natives if r.compiled and (t := r.median("both")) is not None]
        if not row.graph:
            found.least("eager parametrization / ours", ratios.get("native_over_both"), 10)
        elif measured.workload == "sngan32" and graphs:
            found.least("native graph / our graph", over(min(graphs), ours), 10)
        if graphs and compiled:
            found.least("best of native graph and compile / ours", over(min(graphs + compiled), ours), 2)
