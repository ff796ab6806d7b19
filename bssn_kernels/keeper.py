"""Who is in which frame: the hooks on a group's root, blocks of code, checkpointing, one frame per thread."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from bssn_kernels.frame import Frame, Replay, alone_key, distributed, frame_key, in_backward
from bssn_kernels.parts import Arrangement
from bssn_kernels.sharding import modules_of_nested_fsdp


class RootHook:
    """A hook on the root; an object, so that a copy of the root has hooks of its own group."""

    def __init__(self, keeper: FrameKeeper) -> None:
        self.keeper = keeper


class Begin(RootHook):
    """The root's forward begins."""

    def __call__(self, module: nn.Module, args) -> None:
        self.keeper._begin(module)


class Commit(RootHook):
    """It went well."""

    def __call__(self, module: nn.Module, args, output) -> None:
        frame = getattr(self.keeper._local, "frame", None)
        if frame is not None and not frame.held:
            self.keeper._commit(frame)


class End(RootHook):
    """It ended, well or not."""

    def __call__(self, module: nn.Module, args, output) -> None:
        self.keeper._end()


class FrameKeeper:
    """Makes, commits and ends the frames of a group of layers.

    Frames are per thread. ``_local`` holds this thread's ``frame``, the ``outer`` one of a block, the ``record`` that a
    recomputed checkpoint reads, and a ``stack`` of ``with`` blocks.

    Args:
        root: module whose forward makes a frame.
        layers: see convert.py.
        manual: training forwards do not move the vectors.
        backward_buckets: autograd nodes per device and dtype, or "auto".
    """

    def __init__(self, root: nn.Module, layers: Sequence, manual: bool, backward_buckets: int | str) -> None:
        self.root, self.layers = root, list(layers)
        self.manual, self.frozen, self.backward_buckets = manual, False, backward_buckets
        self._removed = False
        self._forget()
        for index, layer in enumerate(self.layers):
            layer.join(self, index)
        root.register_forward_pre_hook(Begin(self), prepend=True)  # before the root's own, if it is a layer itself
        root.register_forward_hook(Commit(self))
        root.register_forward_hook(End(self), always_call=True)

    def _forget(self) -> None:
        """What a copy or a pickle does not take along. ``_record`` is the last forward, for what is recomputed in a
        backward; ``_report`` the last call of any kind."""
        self._local = threading.local()
        self._arrangement: Arrangement | None = None
        self._record: Frame | None = None
        self._report: Frame | None = None
        self._told = False

    def __getstate__(self) -> dict:
        forgotten = ("_local", "_arrangement", "_record", "_report", "_told")
        return {name: value for name, value in self.__dict__.items() if name not in forgotten}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def still(self) -> bool:
        """Whether training forwards leave the vectors alone."""
        return self.frozen or self.manual

    def _detach_root(self) -> None:
        """Take the hooks off the root; the keeper ends."""
        for hooks in (self.root._forward_pre_hooks, self.root._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, RootHook) and hook.keeper is self]:
                del hooks[key]
                self.root._forward_hooks_always_called.pop(key, None)
        self._removed = True
        self._forget()

    def _frame(self, **how: bool) -> Frame:
        """Compute W_bar of all layers from what their modules hold now; ``how`` as in Part.run."""
        arrangement = self._arrangement
        weights = None if arrangement is None else arrangement.weights()
        if weights is None:
            arrangement = self._arrange()
            weights = arrangement.weights()
        return arrangement.frame(weights, **how)

    def _new_arrangement(self) -> Arrangement:
        return Arrangement(self.layers, self.manual, self.backward_buckets, modules_of_nested_fsdp(self.root))

    def _arrange(self) -> Arrangement:
        if self._removed:
            raise RuntimeError("this SpectralGroup was removed from its model")
        self._arrangement = self._new_arrangement()
        return self._arrangement

    # What torch.compiler.disable sets; the decorator itself would import all of dynamo with this package.
    _arrange._torchdynamo_disable = True

    def _enter(self) -> Frame:
        """The frame for what begins now."""
        local = self._local
        outer = getattr(local, "outer", None)
        if outer is not None and outer.keep:
            return outer
        recomputing = in_backward()
        record = getattr(local, "record", None) or (self._record if recomputing else None)
        if record is not None:
            return Replay(record, self.layers)
        frame = self._cached() or self._frame(still=self.frozen or recomputing)
        if frame.arrangement.left_out and not self._told:
            self._tell(frame.arrangement.left_out)
        return frame

    def _tell(self, left_out: Sequence) -> None:
        """Warn, once, of layers that are not fused."""
        self._told = True
        warnings.warn(
            f"bssn_kernels: {len(left_out)} of {len(self.layers)} layers compute one by one (the first: "
            f"{left_out[0].names[0]!r}), since FSDP puts their weights together only in the modules that it wraps. For "
            "one call each, fuse these by themselves, before fully_shard",
            stacklevel=2,
        )

    def _cached(self) -> Frame | None:
        """Under ``parametrize.cached()`` all forwards share one frame, as natively they share each weight. (torch's old
        hook knows nothing of it.)
        """
        if not parametrize._cache_enabled or True in self._forms():
            return None
        frame = parametrize._cache.get(frame_key(self))
        if frame is None:
            frame = parametrize._cache[frame_key(self)] = self._frame(still=self.frozen)
            frame.keep = True
        return frame

    def _forms(self) -> set[bool]:
        """Of the layers that are there: whether they are under torch's old hook."""
        return {layer.hooked for layer in self.layers if layer.weight() is not None}

    def _one_by_one(self) -> bool:
        """Whether layers have to compute by themselves under ``parametrize.cached()``: some of them iterate in every
        forward, or were read before this one, and torch has what they gave.
        """
        if not parametrize._cache_enabled or getattr(self._local, "outer", None) is not None:
            return False
        hooked = self._forms()
        if True in hooked:
            return False in hooked
        return frame_key(self) not in parametrize._cache and alone_key(self) in parametrize._cache

    def _begin(self, module: nn.Module) -> None:
        local = self._local
        local.frame = None  # an interrupted forward may have left one
        # Replicas of DataParallel compute layer by layer.
        if not (module.__dict__.get("_is_replica", False) or self._one_by_one()):
            local.frame = self._enter()

    def _commit(self, frame: Frame) -> None:
        if not frame.committed:
            frame.commit()
            self._record = frame.record()
            if not torch._C._are_functorch_transforms_active():  # whose tensors end with them
                self._report = self._record

    def _end(self) -> None:
        local = self._local
        frame, outer = getattr(local, "frame", None), getattr(local, "outer", None)
        local.frame = outer
        if frame is not None and frame is not outer and not frame.keep:  # the outer one, if a hook raised before Begin
            frame.release()

    @contextlib.contextmanager
    def _inside(self, frame: Frame) -> Iterator[None]:
        """A block in a frame of its own; the vectors are stored if it ends without an error."""
        local = self._local
        before = getattr(local, "frame", None), getattr(local, "outer", None)
        own = frame is not before[1]  # else it is that of a block around this one, which ends it
        local.frame = local.outer = frame
        try:
            yield
            if own:
                if distributed():  # which may have broadcast the vectors within the block, as they are
                    frame.forget_versions()
                self._commit(frame)
        finally:
            local.frame, local.outer = before
            if own and (frame.held or not frame.keep):
                frame.release()


class CheckpointForward:
    """Context of a checkpointed region's forward: remembers the frame that it read, and what the layers that are left
    out of it computed by themselves.
    """

    def __init__(self, keeper: FrameKeeper) -> None:
        self.keeper, self.record = keeper, None
        self.alone: list[tuple] = []

    def __enter__(self) -> CheckpointForward:
        return self

    def __exit__(self, *error) -> None:
        frame = getattr(self.keeper._local, "frame", None)
        self.record = self.keeper._record if frame is None else frame.record()
        if self.record is not None:
            self.alone = [(layer.rule, layer.rule._last) for layer in self.record.arrangement.left_out]


class CheckpointRecompute:
    """Context of the region's recomputation, once per backward: gives W_bar of that frame again."""

    def __init__(self, forward: CheckpointForward) -> None:
        self.forward = forward

    def __enter__(self) -> CheckpointRecompute:
        keeper, record = self.forward.keeper, self.forward.record
        local = keeper._local
        self.before = tuple(getattr(local, name, None) for name in ("frame", "outer", "record"))
        if record is not None:
            local.frame, local.outer, local.record = Replay(record, keeper.layers), None, record
        self.alone = [(rule, rule._last) for rule, _ in self.forward.alone]
        _set_last(self.forward.alone)
        return self

    def __exit__(self, *error) -> None:
        local = self.forward.keeper._local
        local.frame, local.outer, local.record = self.before
        _set_last(self.alone)


def _set_last(runs: Sequence[tuple]) -> None:
    """What layers computed by themselves last, and will give again."""
    for rule, run in runs:
        rule.__dict__["_last"] = run
