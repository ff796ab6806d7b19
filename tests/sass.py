"""A reader of SASS as ``cuobjdump -sass`` prints it: instructions, and the loops that they form."""

import re
from typing import NamedTuple

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*([^;]*);", re.MULTILINE
)


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


def instructions(text: str) -> list[Instruction]:
    return [Instruction(int(at, 16), name, operands) for at, name, operands in _LINE.findall(text)]


def _spans(every: list[Instruction]) -> list[tuple[int, int]]:
    """Loops, from the target of a backward branch to the branch."""
    spans = set()
    for instruction in every:
        if instruction.name.startswith("BRA"):
            target = re.search(r"0x([0-9a-f]+)", instruction.operands)
            if target and int(target.group(1), 16) < instruction.address:
                spans.add((int(target.group(1), 16), instruction.address))
    return sorted(spans)


def innermost_loops(text: str) -> list[list[Instruction]]:
    """The bodies of loops that hold no other loop."""
    every = instructions(text)
    spans = _spans(every)
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[i for i in every if begin <= i.address <= end] for begin, end in inner]


def loops_around(text: str, name: str) -> list[list[Instruction]]:
    """The smallest loops that hold an instruction of this name, without the loops within them."""
    every = instructions(text)
    spans = _spans(every)
    found = {}
    for instruction in every:
        if instruction.name.split(".")[0] == name:
            around = [s for s in spans if s[0] <= instruction.address <= s[1]]
            if around:
                begin, end = min(around, key=lambda s: s[1] - s[0])
                within = [s for s in spans if begin < s[0] and s[1] < end]
                body = [i for i in every if begin <= i.address <= end]
                found[begin, end] = [i for i in body if not any(a <= i.address <= b for a, b in within)]
    return [found[span] for span in sorted(found)]


def count(body: list[Instruction], name: str, width: str = "") -> int:
    """Instructions of this name, and width if one is given: count(body, "LDG", "128")."""
    return sum(i.name.split(".")[0] == name and (not width or width in i.name.split(".")) for i in body)
