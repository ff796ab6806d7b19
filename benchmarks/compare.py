"""Two runs side by side: two files, or two commits that are built and measured by turns.

What is compared are ratios to torch's parametrization of the same rounds, not times: the machine may have been another,
or busier.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import label_of, load, median_of, title_of
from bssn_kernels.bench.report import aligned
from bssn_kernels.bench.workloads import UsageError

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 2  # runs of each commit, by turns
CALLS = ("forward", "both")
Key = tuple[str, str, str]


def compare(old: str, new: str, workloads: Sequence[str]) -> str:
    """The table of two files of ``--json``, or of two commits, which are measured on ``workloads``.

    Raises:
        UsageError: neither files nor commits, a build or a run that failed, or nothing in common.
    """
    if Path(old).is_file() and Path(new).is_file():
        return table(old, new, [load(Path(old))], [load(Path(new))])
    commits = [resolve(name) for name in (old, new)]
    with tempfile.TemporaryDirectory() as folder:
        trees: list[Path] = []
        try:
            for commit, side in zip(commits, ("old", "new")):
                trees.append(Path(folder) / side)
                check_out(commit, trees[-1], [ROOT, *trees[:-1]])
            runs: list[list[Any]] = [[], []]
            for turn in range(ROUNDS):
                for side, tree in enumerate(trees):
                    runs[side].append(measure(tree, Path(folder) / f"{side}_{turn}.jsonl", workloads))
            return table(old, new, *runs)
        finally:
            for tree in filter(Path.exists, trees):
                git("worktree", "remove", "--force", str(tree))


def git(*words: str) -> str:
    """What git answers.

    Raises:
        UsageError: it failed.
    """
    answer = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if answer.returncode:
        raise UsageError(f"git {' '.join(words)}: {answer.stderr.strip()}")
    return answer.stdout.strip()


def resolve(name: str) -> str:
    try:
        return git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except UsageError as error:
        raise UsageError(f"--compare: {name!r} is neither a file nor a commit") from error


def check_out(commit: str, tree: Path, built: Sequence[Path]) -> None:
    """Make a tree of a commit with its compiled part, which is copied where a ``built`` tree has the same source."""
    git("worktree", "add", "--detach", str(tree), commit)
    if not (tree / "benchmarks" / "run.py").is_file():
        raise UsageError(f"--compare: {commit[:12]} has no benchmarks/run.py")
    for other in built:
        modules = list(other.glob("bssn_kernels/_c*.so"))
        sources = [other / "setup.py", *(path for path in (other / "csrc").rglob("*") if path.is_file())]
        newest = max(source.stat().st_mtime for source in sources)
        fresh = modules and all(module.stat().st_mtime >= newest for module in modules)
        if fresh and not git("-C", str(other), "diff", "--name-only", commit, "--", "csrc", "setup.py"):
            for module in modules:
                shutil.copy(module, tree / "bssn_kernels")
            return
    call([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, {"BSSN_CPU": "1"})


def measure(tree: Path, file: Path, workloads: Sequence[str]) -> tuple[dict, list[dict]]:
    words = ["-m", "benchmarks.run", "tables", "--json", str(file), "--workload", *workloads]
    # 1 where a provider was refused, whose row then is missing.
    call([sys.executable, *words], tree, {}, well=lambda status: status == 0 or (status == 1 and file.exists()))
    return load(file)


def call(
    words: Sequence[str], tree: Path, more: dict[str, str], well: Callable[[int], bool] = lambda status: status == 0
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree), **more}
    ended = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    if not well(ended.returncode):
        raise UsageError(f"--compare: {' '.join(words[1:4])} failed in {tree.name}: {ended.stderr.strip()[-500:]}")


def samples_of(records: Sequence[dict], clock: str = "wall") -> dict[Key, float]:
    """By case, provider and call: the time over that of torch's parametrization in the same rounds."""
    found = {}
    for record in records:
        if record["kind"] != "case":
            continue
        base = next((row for row in record["rows"] if label_of(row) == "parametrization sn"), None)
        for row in record["rows"]:
            for what in CALLS:
                own = median_of(row, what, clock)
                native = base and median_of(base, what, clock)
                if own and native and row is not base and row.get("variant"):
                    found[title_of(record), label_of(row), what] = own / native
    return found


def table(old: str, new: str, olds: Sequence[tuple[dict, list]], news: Sequence[tuple[dict, list]]) -> str:
    """Native over own of both sides, and how much faster the new one is; with several runs a side, their extremes.

    Raises:
        UsageError: nothing was measured in both.
    """
    sides = [[samples_of(records) for _, records in runs] for runs in (olds, news)]
    keys = [key for key in sides[0][0] if all(key in run for side in sides for run in side)]
    if not keys:
        raise UsageError("--compare: nothing was measured in both")
    lines: list[tuple[str, ...] | str] = [("case", "provider", "call", "native/old", "native/new", "new is faster by")]
    for key in keys:
        ratios = [[1 / run[key] for run in side] for side in sides]
        means = [sum(of_side) / len(of_side) for of_side in ratios]
        call = {"forward": "f", "both": "f+b"}[key[2]]
        lines.append((*key[:2], call, *map(shown, ratios), f"{means[1] / means[0]:.3f}x"))
    heads = [
        f"{side}: {name}, {head['machine']['cpu']}, {head['machine'].get('gpu') or 'no GPU'}, commit"
        f" {(head['machine']['commit'] or 'unknown')[:12]}, torch {head['machine']['torch']}, {head['machine']['time']}"
        for side, name, ((head, _), *_) in (("old", old, olds), ("new", new, news))
    ]
    return "\n".join([*heads, "", *aligned(lines, slice(3, None)), "", LEGEND])


LEGEND = (
    "Times of torch's parametrization (SN) over those of the row, in the same rounds; of several runs the lowest"
    " and the highest."
)


def shown(ratios: Sequence[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{low:.2f}x" if low == high else f"{low:.2f}-{high:.2f}x"
