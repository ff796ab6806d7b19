"""Compiles the Triton kernels ahead of time, without a GPU, and writes what came out.

    python compile_triton.py CAPABILITY FOLDER DTYPE...

A program of its own, since a process that interprets kernels cannot compile them. FOLDER gets index.json, a list of
kernels with their resources, and for each kernel its PTX and SASS: all kinds for the first DTYPE, the usual ones for
the others.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bssn_kernels.backends import _triton_kernels as kernels
from bssn_kernels.backends._triton_settings import config_of, settings_of

LAYERS = 16
ACCUMULATION = {"fp64": "fp64", "fp32": "fp32", "bf16": "fp32", "fp16": "fp32"}
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def signature(kernel, dtype: str, flags: dict[str, bool]) -> dict:
    accum, n = ACCUMULATION[dtype], LAYERS
    vector = ("fp32" if accum == "fp64" else "bf16") if flags.get("MIXED") else accum
    types = {
        **dict.fromkeys(("tile_ptr", "block_ptr", "counter_ptr"), "*i32"),
        **dict.fromkeys(("layer_ptr", "vectors_ptr", "address_ptr"), "*i64"),
        **dict.fromkeys(("float_ptr", "double_ptr"), "*fp64"),
        **dict.fromkeys(("gain_ptr", "saved_ptr", "grad_gain_ptr", "work_ptr"), f"*{accum}"),
        **dict.fromkeys(("out_ptrs", "grad_ptrs"), (f"*{dtype}",) * n),
        **dict.fromkeys(("n_tiles", "n_programs", "n_counters"), "i32"),
        "weight_ptr": f"*{dtype}",
        "vector_ptr": f"*{vector}",
    }
    return {name: types.get(name, "constexpr") for name in kernel.arg_names}


def compile_one(kernel, dtype: str, capability: int, general: bool, more: bool):
    forward = kernel is kernels.forward_kernel
    config = config_of(divmod(capability, 10), forward or more, general, more, BYTES[dtype])
    flags = {"GENERAL": general, "MIXED" if forward else "THROUGH": more}
    constants, options = settings_of(config, forward, BYTES[dtype])
    types = signature(kernel, dtype, flags)
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for i, kind in enumerate(types.values()):
        if isinstance(kind, tuple):
            attributes |= {(i, j): aligned for j in range(len(kind))}
        elif kind.startswith("*"):
            attributes[(i,)] = aligned
    source = ASTSource(kernel, types, constexprs={**constants, **flags}, attrs=attributes)
    return config, triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dump(cubin: bytes, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def main(capability: int, folder: Path, dtypes: list[str]) -> None:
    index = []
    for dtype in dtypes:
        for kernel in (kernels.forward_kernel, kernels.backward_kernel):
            for general in (False, True):
                for more in (False, True) if dtype == dtypes[0] else (False,):
                    config, compiled = compile_one(kernel, dtype, capability, general, more)
                    name = f"{kernel.fn.__name__}_{dtype}_{capability}_{int(general)}{int(more)}"
                    usage = dump(compiled.asm["cubin"], "-res-usage")
                    numbers = dict(pair.split(":") for pair in usage.split() if pair.startswith(("REG:", "STACK:")))
                    (folder / f"{name}.sass").write_text(dump(compiled.asm["cubin"], "-sass"))
                    (folder / f"{name}.ptx").write_text(compiled.asm["ptx"])
                    index.append(
                        {
                            "name": name, "kernel": kernel.fn.__name__, "dtype": dtype, "general": general,
                            "more": more, "capability": capability, "bound": config.registers,
                            "programs": config.programs, "stages": config.stages, "step": config.step,
                            "whole_stages": config.whole_stages,
                            "registers": int(numbers["REG"]), "stack": int(numbers["STACK"]),
                            "shared": compiled.metadata.shared,
                        }
                    )
    (folder / "index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
