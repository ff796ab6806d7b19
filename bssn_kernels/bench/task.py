"""What is measured, and no garbage collector in between."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """``run`` is timed, its result is kept until the clock has stopped, then ``reset`` undoes what it left."""

    run: Callable[[], object]
    reset: Callable[[], None] = lambda: None


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now and not again until the end."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
