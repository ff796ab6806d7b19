"""Work in a process of its own: a kernel that kills its device or never ends costs that work alone."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

END_S = 20.0  # for a process to end that has nothing more to do

# Told what is known so far, and how many seconds may pass until more is.
Say = Callable[[dict[str, Any], float], None]


def apart(work: Callable[..., dict], args: tuple, nothing: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The record that ``work(*args, say)`` returns; whatever becomes of it, a record comes back.

    Args:
        work: of a module that a new process can import.
        nothing: the record of work that never said anything.
        seconds: for everything; ``say`` sets limits within.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, work, args))
    start = time.monotonic()
    process.start()
    there.close()
    record, limit, ended = {**nothing, "failed": "nothing was written"}, start + seconds, ""
    try:
        while here.poll(max(0.0, limit - time.monotonic())):
            record, step = here.recv()
            limit = min(start + seconds, time.monotonic() + step)
        ended = f"stopped after {time.monotonic() - start:.0f} s"
    except (EOFError, OSError):
        process.join(END_S)
        ended = f"exit status {process.exitcode}" if process.exitcode else ""
    finally:
        process.kill()
        process.join(END_S)
        here.close()
    if record.get("failed") and ended:
        record["failed"] += f" ({ended})"
    return record


def _child(there: Connection, work: Callable[..., dict], args: tuple) -> None:
    record = work(*args, lambda record, seconds: there.send((record, seconds)))
    there.send((record, END_S))
    there.close()
