"""Pictures of a run: speed-up, roofline share, scaling curves, and what a whole step is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.report import label_of, median_of
from benchmarks.results import machine_line, ours, plain_cases

matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
COLORS = {"parametrization": "#8c8c8c", "hook": "#b8a46a", "foreach": "#d98c5f", "authors": "#9a6fb0"}
OURS = ("#1f6fb4", "#3fa34d", "#c44e52")
Record = dict[str, Any]


def draw(head: Record, records: Sequence[Record], folder: Path) -> list[Path]:
    """All pictures for which something was measured, as PNG files in the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    pictures: dict[Callable[[Sequence[Record]], Figure | None], str] = {
        speedup: "Speed-up over torch's parametrization (SN) of the same rounds",
        roofline: "Bytes that must move, over time, in units of the copy of the same rounds",
        scaling: "How the time of a call grows",
        steps: "A whole discriminator step: data, two forwards, loss, backward, Adam",
    }
    for make, title in pictures.items():
        figure, name = make(records), make.__name__
        if figure is not None:
            figure.suptitle(f"{title}\n{machine_line(head)}", fontsize=9)
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=110, metadata={"Software": None})
    return drawn


def color_of(provider: str, fused: list[str]) -> str:
    if provider not in fused and provider not in COLORS:
        fused.append(provider)
    return COLORS.get(provider) or OURS[fused.index(provider) % len(OURS)]


def bars(axes, groups: Sequence[str], series: dict[str, list[float | None]], colors: dict[str, str], form: str) -> None:
    """Grouped bars, each with its number above it."""
    width = 0.84 / max(len(series), 1)
    for i, (name, values) in enumerate(series.items()):
        at = [g + (i - (len(series) - 1) / 2) * width for g, v in enumerate(values) if v is not None]
        heights = [v for v in values if v is not None]
        look = {"color": colors[name], "hatch": "//" if name.endswith("bssn") else None, "edgecolor": "white"}
        drawn = axes.bar(at, heights, width * 0.94, label=name, linewidth=0, **look)
        turned = 90 if len(series) > 4 else 0
        axes.bar_label(drawn, [form.format(v) for v in heights], fontsize=6.5, padding=1, rotation=turned)
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axes.grid(axis="x", visible=False)


def speedup(records: Sequence[Record]) -> Figure | None:
    """Native time over each provider's, by workload."""
    found = plain_cases(records)
    if not found:
        return None
    figure = Figure((9.5, 6.2), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(2, 1, sharex=True), ("forward", "both"), ("forward", "forward + backward")
    ):
        fused: list[str] = []
        series: dict[str, list[float | None]] = {}
        colors: dict[str, str] = {}
        for g, record in enumerate(found):
            base = next((r for r in record["rows"] if label_of(r) == "parametrization sn" and r["times"]), None)
            for row in record["rows"]:
                kept = row.get("variant") and row["times"] and row["provider"] not in ("parametrization", "reference")
                if not (base and kept) or row.get("compiled") or row.get("graph"):
                    continue
                values = series.setdefault(label_of(row), [None] * len(found))
                values[g] = median_of(base, what) / median_of(row, what)
                colors[label_of(row)] = color_of(row["provider"], fused)
        bars(axes, [r["case"]["workload"] for r in found], series, colors, "{:.1f}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel(f"native / provider\n{title}")
        axes.margins(y=0.16)
    legend_below(figure)
    return figure


def legend_below(figure: Figure) -> None:
    """One legend for all axes, below them, so that it hides nothing."""
    found = {}
    for axes in figure.axes:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    columns = min(len(found), 8) if len(found) != 10 else 5
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def roofline(records: Sequence[Record]) -> Figure | None:
    """Share of the copy bandwidth of the same run that each provider reaches."""
    found = plain_cases(records)
    if not found:
        return None
    figure = Figure((9.5, 6.2), layout="constrained")
    titles = {"forward": "forward: read W, write W", "backward": "backward: read G and W, write dW"}
    for axes, (what, title) in zip(figure.subplots(2, 1, sharex=True), titles.items()):
        fused: list[str] = []
        series: dict[str, list[float | None]] = {}
        colors: dict[str, str] = {}
        for g, record in enumerate(found):
            rows = [r for r in record["rows"] if label_of(r) in ("parametrization sn", "foreach sn")] + ours(record)
            for row in rows:
                if f"share_{what}" in row.get("ratios", {}):
                    values = series.setdefault(label_of(row), [None] * len(found))
                    values[g] = 100 * row["ratios"][f"share_{what}"]
                    colors[label_of(row)] = color_of(row["provider"], fused)
        bars(axes, [r["case"]["workload"] for r in found], series, colors, "{:.0f}")
        axes.axhline(100, color="black", linewidth=0.8)
        axes.set_ylabel(f"% of the copy's bandwidth\n{title}")
        axes.margins(y=0.14)
    legend_below(figure)
    return figure


def scaling(records: Sequence[Record]) -> Figure | None:
    """Times against what each curve is drawn over."""
    curves = [r for r in records if r["kind"] == "scaling" and r.get("points")]
    if not curves:
        return None
    labels = {
        "layers": ("layers of 4 x 4", "host time, us", 1e6),
        "bytes": ("bytes of one layer", "ms", 1e3),
        "iterations": ("power iterations", "ms", 1e3),
        "threads": ("threads", "ms", 1e3),
    }
    rows = (len(curves) + 1) // 2
    figure = Figure((9.5, 0.8 + 3.2 * rows), layout="constrained")
    for axes, record in zip(figure.subplots(rows, 2).flat, curves):
        fused: list[str] = []
        x_label, y_label, unit = labels[record["curve"]]
        series: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for point in record["points"]:
            for row in point["rows"]:
                if row["provider"] in ("clone", "three_stream") or (row["provider"] == "floor") != (
                    record["curve"] == "layers" and not row.get("variant")
                ):
                    continue
                for what in ("forward", "both"):
                    clock = "host" if record["curve"] == "layers" else "device"
                    if (t := median_of(row, what, clock)) is not None:
                        series.setdefault((row["provider"], what), []).append((point["x"], t * unit))
        for (provider, what), pairs in series.items():
            known = {"floor": "black", "copy": "black"}
            color = known.get(provider) or color_of(provider, fused)
            style = {"forward": ("--", "forward"), "both": ("-", "forward + backward")}[what]
            name = f"{provider}, {style[1]}" if provider not in known else provider
            style = ":" if provider in known else style[0]
            axes.plot(*zip(*pairs), style, color=color, marker="o", markersize=3, linewidth=1.3, label=name)
        if record["curve"] in ("layers", "bytes"):
            axes.set_xscale("log", base=2 if record["curve"] == "layers" else 10)
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if record["curve"] == "threads":
            axes.set_xticks(sorted({point["x"] for point in record["points"]}))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(record["name"], fontsize=9)
    for axes in figure.axes[len(curves) :]:
        axes.set_visible(False)
    legend_below(figure)
    return figure


def steps(records: Sequence[Record]) -> Figure | None:
    """A whole step: the network without normalization, and what normalization adds."""
    found = [r for r in records if r["kind"] == "step" and r.get("share")]
    if not found:
        return None
    figure = Figure((9.5, 1 + 0.42 * sum(len(r["rows"]) for r in found)), layout="constrained")
    axes = figure.subplots()
    at, ticks = 0.0, []
    for record in found:
        ms = {r["provider"]: median_of(r, "step") * 1e3 for r in record["rows"] if r["times"]}
        plain = ms.get("plain")
        if plain is None:
            continue
        for name, value in ms.items():
            axes.barh(at, min(plain, value) / plain, 0.8, color="#bfc9d4")
            if value > plain:
                color = "#8c8c8c" if name.startswith("parametrization") else "#1f6fb4"
                axes.barh(at, (value - plain) / plain, 0.8, left=1, color=color)
            share = "" if name == "plain" else f", normalization {record['share'][name]:.1%}"
            axes.text(max(value, plain) / plain + 0.01, at, f"{value:.0f} ms{share}", va="center", fontsize=7.5)
            ticks.append((at, f"{record['model']}, batch {record['batch']}: {name}"))
            at += 1
        at += 0.6
    axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, in units of the step without normalization (grey blue)")
    axes.set_xlim(0, max(1.25, axes.get_xlim()[1] * 1.3))
    axes.margins(y=0.01)
    axes.grid(axis="y", visible=False)
    return figure
