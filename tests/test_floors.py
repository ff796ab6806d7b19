"""The house has floors: a file of the package imports only from lower floors, and from outside only torch."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "bssn_kernels"

# From the ground up. "" is the package itself; a folder's name is its __init__.py, "folder/*" its other files, and
# "folder/_*" those that only their siblings use. The top of the house: tools that see the package as its users do.
FLOORS = (
    ("_build_info", "_cpu"),
    ("views", "variants", "sharding"),
    ("algebra",),
    ("plan",),
    ("backends/_geometry", "backends/_tables"),
    ("backends/_order",),
    ("backends/_schedule",),
    ("backends/_triton_kernels/*",),
    ("backends/_*",),
    ("backends/*",),
    ("backends",),
    ("ops",),
    ("functional",),
    ("run",),
    ("frame",),
    ("rule",),
    ("parametrizations", "parts"),
    ("keeper",),
    ("convert",),
    ("spectral_group",),
    ("group",),
    ("",),
    ("bench/_*", "bench/*"),
    ("bench",),
    ("__main__",),
)
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
# Compiled or generated, so not always there to be parsed.
NOT_SOURCE = {"_build_info", "_cpu"}
# The files of such a folder are one program in pieces: they may use each other, without a circle.
KERNELS = "backends/_triton_kernels/"
ONE_FLOOR = ("bench/", KERNELS)

FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(file.relative_to(PACKAGE)) for file in FILES]


def module_name(file: Path) -> str:
    """The file's module below the package, with slashes: "plan", "backends/cpu", "backends", "" for the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES} | NOT_SOURCE


def height(module: str) -> int | None:
    folder, slash, leaf = module.rpartition("/")
    if module in HEIGHT:
        return HEIGHT[module]
    return HEIGHT.get(f"{folder}{slash}{'_*' if leaf.startswith('_') else '*'}" if slash else module)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that the file imports, wherever in it, relative imports made absolute.
    `from a import b` gives a.b where that is a module of ours, else a."""
    package = ["bssn_kernels", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                yield node.lineno, full if own_module(full) in MODULES else origin


def own_module(name: str) -> str | None:
    """The dotted name as a module of the package, or None for one from outside."""
    top, _, rest = name.partition(".")
    return rest.replace(".", "/") if top == "bssn_kernels" else None


def own_imports(file: Path) -> list[tuple[int, str]]:
    found = ((line, own_module(name)) for line, name in imports(file))
    return [(line, module) for line, module in found if module is not None]


def test_the_package_is_seen():
    assert {"", "plan", "backends", "__main__"} <= MODULES


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_imports_go_down(file):
    module = module_name(file)
    assert height(module) is not None, f"{module} has no floor yet: give it one in FLOORS"
    for line, other in own_imports(file):
        where = f"{file.name}:{line} imports {other or 'the package'}"
        assert other in MODULES, f"{where}, which does not exist"
        together = any(module.startswith(folder) and other.startswith(folder) for folder in ONE_FLOOR)
        lower = height(other) is not None and height(other) < height(module)
        assert lower or together, f"{where}, which is not on a lower floor"


def test_imports_make_no_circle():
    graph = {module_name(file): {other for _, other in own_imports(file)} for file in FILES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_only_torch_from_outside(file):
    """numpy and the rest are for tests and benchmarks; triton is for the kernels."""
    allowed = {"torch", "bssn_kernels", *sys.stdlib_module_names}
    if module_name(file).startswith(KERNELS):
        allowed.add("triton")
    strangers = [f"line {line}: {name}" for line, name in imports(file) if name.partition(".")[0] not in allowed]
    assert not strangers


def test_floors_see_every_kind_of_import(tmp_path, monkeypatch):
    """The parser itself: relative, renamed and lazily placed imports all count."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "backends" / "cpu.py"
    file.parent.mkdir()
    file.write_text(
        "import torch.nn as nn\n"
        "from ..plan import LayerSpec\n"
        "from .. import group\n"
        "def f():\n"
        "    from bssn_kernels import views as v\n"
        "    from . import _triton_kernels\n"
    )
    monkeypatch.setitem(globals(), "MODULES", {"plan", "group", "views", "backends/_triton_kernels"})
    names = [name for _, name in imports(file)]
    assert sorted(names) == [
        "bssn_kernels.backends._triton_kernels",
        "bssn_kernels.group",
        "bssn_kernels.plan",
        "bssn_kernels.views",
        "torch.nn",
    ]
    assert height("backends/_triton_kernels") < height("backends/cpu") < height("backends") < height("group")
