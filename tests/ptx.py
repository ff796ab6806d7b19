"""The order of memory in PTX: what stands between stores and a release or reader, and between an acquire and loads."""

import re

BARRIER, STORE = re.compile(r"\b(bar|barrier)\.sync\b"), re.compile(r"\bst\.(volatile\.)?global\b")
RELEASE = re.compile(r"\batom\.(global\.gpu\.)?(acq_rel|release)\b")
ACQUIRE = re.compile(r"\b(ld\.global\.gpu\.acquire|ld\.acquire\.gpu\.global|atom\.global\.gpu\.acquire)\b")
LOAD = re.compile(r"\bld\.global\b(?!\.gpu\.acquire)")
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(.*)"', re.MULTILINE)
LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\b")


def unordered(ptx: str) -> list[str]:
    """Releasing atomics with a store since the last barrier, acquiring loads with no barrier before the next load."""
    stored, acquired, faults = "", "", []
    for line in ptx.splitlines():
        if BARRIER.search(line):
            stored = acquired = ""
        elif ACQUIRE.search(line):
            acquired = line
        elif RELEASE.search(line):
            if stored:
                faults.append(f"released without a barrier after {stored.strip()}")
        elif STORE.search(line):
            stored = line
        elif LOAD.search(line) and acquired:
            faults.append(f"{line.strip()} follows {acquired.strip()} without a barrier")
    return faults


def read_too_early(ptx: str, file: str, line_number: int) -> tuple[int, list[str]]:
    """Loads that a line of a source file became: how many, and those with a store since the last barrier, in the
    order of the text.
    """
    files = {number for number, path in FILE.findall(ptx) if path.endswith("/" + file)}
    stored, here, found, faults = "", False, 0, []
    for line in ptx.splitlines():
        if place := LINE.match(line):
            here = place[1] in files and int(place[2]) == line_number
        elif BARRIER.search(line):
            stored = ""
        elif STORE.search(line):
            stored = line
        elif LOAD.search(line) and here:
            found += 1
            if stored:
                faults.append(f"{line.strip()} follows {stored.strip()} without a barrier")
    return found, faults
