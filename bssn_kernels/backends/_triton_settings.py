"""How the Triton kernels are compiled and launched: one set of settings for each kind of kernel and of device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from bssn_kernels.backends._geometry import COLS, ROWS, WHOLE_ROWS

REGISTERS = 65536  # of an SM


@dataclass(frozen=True)
class Config:
    """Launch settings of one kind of kernel on one kind of device.

    Attributes:
        registers: most per thread; programs: per SM, as many as those registers let reside. More would only wait.
        stages: of the loads of the products, through cp.async: all but one of them are on their way, 8 KiB each, 4 in
            half precision.
        whole_stages: the same of whole rows, 16 KiB each, 8 in half precision.
        step: bytes that the scale pass reads at once, and twice as many as the backward's flat passes do.
        warps: per program. 4 warps read a block of 8 x 256 numbers in four 16-byte accesses per thread.
    """

    registers: int
    programs: int
    stages: int
    whole_stages: int = 3
    step: int = 16384
    warps: int = 4


# By whether a kernel has products in two directions or in float64. Registers are the smallest bound under which
# Triton 3.9 spills nothing on sm_80, sm_90 and sm_100 (3.6 spills some), those of an SM shared among programs of 128
# threads. Stages: an SM of an H200 takes 33 KB from HBM in a microsecond and 45 from L2, which is about how long
# a read is on its way, and about half of the programs stream at once; they have 128 KB on their way, of whole rows
# too, and with two directions, which have no registers for more, 72, or 36 in half precision. Measured there, while
# HBM gave every read: one direction with three stages and steps of 8 KiB (64 KB) ran at the speed of a copy, and
# longer steps changed nothing (benchmarks/results/gpu_h200_tuning.jsonl); two directions had 24 KB, and took twice as
# long as one. tests/test_triton_compiled.py checks registers, memory and bytes.
HOPPER = {
    False: Config(registers=128, programs=4, stages=5),
    True: Config(registers=168, programs=3, stages=4),
}
# Less bandwidth; less shared memory too, 164 KiB of an SM and then 100; no cp.async.
AMPERE = {False: replace(HOPPER[False], stages=4), True: replace(HOPPER[True], stages=3)}
ADA = {False: replace(HOPPER[False], stages=3, whole_stages=2), True: replace(HOPPER[True], stages=3, whole_stages=2)}
TURING = {key: replace(config, stages=1, whole_stages=1) for key, config in HOPPER.items()}
ADA_DEVICES = ((8, 6), (8, 9), (12, 0), (12, 1))


def family_of(capability: tuple[int, int]) -> dict[bool, Config]:
    """The settings of devices of some compute capability."""
    if capability in ADA_DEVICES:
        return ADA
    return HOPPER if capability >= (9, 0) else AMPERE if capability >= (8, 0) else TURING


def config_of(capability: tuple[int, int], products: bool, general: bool, more: bool, itemsize: int) -> Config:
    """Launch settings of a kernel on a device of some compute capability.

    Args:
        products: it has products: forward, and backward through the iteration.
        general: it has two directions.
        more: something else that takes registers: vectors of another dtype, or the gradient through the iteration. Two
            directions in float64 take as many, and one in half precision.
        itemsize: of the weights. In half precision a stage has half the bytes.
    """
    large = products and (general or itemsize == 8)
    more = more or (products and itemsize == (8 if general else 2))
    return _adapted(family_of(capability)[large], large, more, itemsize == 2)


@cache
def _adapted(config: Config, large: bool, more: bool, half: bool) -> Config:
    if more and large:
        config = replace(config, registers=255, programs=2)
    elif more:  # a program less, with a stage more
        config = replace(config, registers=168, programs=3, stages=config.stages + (config.stages > 1))
    if half and config.stages > 1:
        config = replace(config, stages=max(config.stages, 4) if large else 2 * config.stages - 1)
        config = replace(config, whole_stages=2 * config.whole_stages - 1)
    return config


def settings_of(config: Config, forward: bool, itemsize: int) -> tuple[dict[str, int], dict[str, Any]]:
    """What a kernel is compiled with: its constants, and the compiler's options."""
    block = config.step // (1 if forward else 2) // itemsize
    constants = {"ROWS": ROWS, "COLS": COLS[itemsize], "STAGES": config.stages, "BLOCK": block}
    if forward:
        constants |= {"WHOLE": WHOLE_ROWS[itemsize][1], "WHOLE_STAGES": config.whole_stages}
    return constants, {"num_warps": config.warps, "maxnreg": config.registers, "enable_fp_fusion": False}
