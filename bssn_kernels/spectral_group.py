"""SpectralGroup: what a user does with the normalized layers of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bssn_kernels.convert import Layer
from bssn_kernels.frame import Frame
from bssn_kernels.keeper import CheckpointForward, CheckpointRecompute, FrameKeeper
from bssn_kernels.rule import Rule
from bssn_kernels.sharding import in_pieces, wraps
from bssn_kernels.variants import resolve_semantics, semantics_names


class SpectralGroup(FrameKeeper):
    """The normalized layers of a model; made by :func:`fuse` and :func:`normalize`.

    One fused call runs when the forward of the root begins, and every layer reads its part. As a context manager,
    ``with group:``, it does the same for any other code that uses the layers; the vectors are stored if the block ends
    without an error.

    Attributes:
        root: the model.
        layers: one per weight, in the order of the model's modules.
        native: names of layers under torch's spectral norm that were not adopted, with the reason.
        frozen: whether vectors rest, see :meth:`freeze`.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Sequence[Layer],
        *,
        update: str | None = None,
        backward_buckets: int | str = "auto",
        native: dict[str, str] | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__(root, layers, update == "manual", backward_buckets)
        self.native, self._fused = dict(native or {}), fused

    def __enter__(self) -> SpectralGroup:
        inside = self._inside(self._enter())
        inside.__enter__()
        self._local.__dict__.setdefault("stack", []).append(inside)
        return self

    def __exit__(self, *error) -> None:
        self._local.stack.pop().__exit__(*error)

    @contextlib.contextmanager
    def hold(self) -> Iterator[SpectralGroup]:
        """Compute W_bar once, without gradient, for all that runs inside in this thread.

        The user promises that the weights stay as they are. The vectors move as in one forward.
        """
        with torch.no_grad():
            frame = self._whole_frame("hold", still=self.frozen)
        frame.hold()
        with self._inside(frame):
            yield self

    def checkpoint_contexts(self) -> tuple[CheckpointForward, CheckpointRecompute]:
        """For ``torch.utils.checkpoint(..., use_reentrant=False, context_fn=group.checkpoint_contexts)``.

        What is recomputed gets W_bar of its own forward. Needed where several forwards precede one backward; without
        it, recomputed layers get W_bar of the last one.
        """
        forward = CheckpointForward(self)
        return forward, CheckpointRecompute(forward)

    def sigmas(self, directions: bool = False) -> dict[str, Tensor]:
        """Spectral norms at the last forward or :meth:`update`, by layer name: 0-dimensional tensors on the device.

        Before the first one they are computed as an eval forward would, and nothing moves.

        Args:
            directions: (directions,) numbers per layer, out before in, instead of their mean.
        """
        frame = self._report
        if frame is None:
            with torch.no_grad():
                frame = self._whole_frame("sigmas", still=True)
        by_layer = frame.arrangement.scatter([run.sigmas_of(directions) for run in frame.runs])
        for layer in frame.arrangement.left_out:
            if layer.rule._last is not None:
                (by_layer[layer.index],) = layer.rule._last.sigmas_of(directions)
        return {name: sigma for layer, sigma in zip(self.layers, by_layer) if sigma is not None for name in layer.names}

    def update(self) -> None:
        """Run the power iteration once on the present weights and store the vectors, whatever the semantics."""
        with torch.no_grad():
            frame = self._whole_frame("update", every=True)
            frame.commit()
        frame.release()
        self._report = frame

    def reset(self) -> None:
        """Draw all vectors anew and warm them up, as their semantics start."""
        layers = self._alive()
        _refuse("reset", [layer for layer in layers if in_pieces(layer.weight())])
        with torch.no_grad():
            for layer in layers:
                layer.draw()
        self._report = None

    def freeze(self) -> None:
        """From now on, training forwards follow the eval rule: nothing moves but by :meth:`update`."""
        self.frozen = True

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`."""
        self.frozen = False

    def remove(self, fold: bool = True) -> None:
        """Leave plain modules, and end the group.

        Args:
            fold: write W_bar, as an eval forward computes it, into the Parameters, which keep their identity; else
                leave the raw weights.

        Raises:
            RuntimeError: FSDP has the weights.
        """
        layers = self._alive()
        if any(map(wraps, self.root.modules())) or any(in_pieces(layer.weight()) for layer in layers):
            raise RuntimeError("remove() would give plain weights to modules whose weights FSDP keeps")
        if fold:
            for layer in layers:
                layer.rule.output_dtype = None
            with torch.no_grad():
                frame = self._frame(still=True)
                for layer in layers:
                    frame.weights[layer.index].copy_(frame.plain[layer.index])
        for layer in layers:
            layer.unwrap()
        self._detach_root()

    def restore(self) -> None:
        """After :func:`fuse`: give torch's native layers back, which continue from the present state.

        Raises:
            RuntimeError: the layers were never torch's, or FSDP wraps one by itself.
        """
        if not self._fused:
            raise RuntimeError("restore() undoes fuse(); this group was made by normalize(): use remove()")
        layers = self._alive()
        for layer in layers:
            if any(map(wraps, layer.modules())):
                raise RuntimeError(f"layer {layer.names[0]!r}: restore() cannot change a layer that FSDP itself wraps")
        for layer in layers:
            layer.leave()
        self._detach_root()

    def _whole_frame(self, caller: str, **how: bool) -> Frame:
        """A frame of all layers, outside of a forward."""
        frame = self._frame(**how)
        _refuse(caller, frame.arrangement.left_out)
        return frame

    def _alive(self) -> list[Layer]:
        if self._removed:
            raise RuntimeError("this SpectralGroup was removed from its model")
        return [layer for layer in self.layers if layer.weight() is not None]

    def __repr__(self) -> str:
        name = f"{type(self).__name__} of {type(self.root).__name__}"
        if self._removed:
            return f"{name}: removed"
        layers = self._alive()
        parameters = sum({id(w): w.numel() for w in (layer.weight() for layer in layers)}.values())
        lines = [f"{name}: {len(layers)} layers, {parameters:,} parameters"]
        lines += [f"  {rule}" for rule in dict.fromkeys(_describe(layer.rule) for layer in layers)]
        try:
            arrangement = self._new_arrangement()
        except RuntimeError as error:
            lines.append(f"  backend: {error}")
        else:
            for part in arrangement.parts:
                why = f" (not {'; not '.join(part.plan.why)})" if part.plan.why else ""
                kind = f"{len(part.indices)} layers of {part.plan.dtype} on {part.plan.device}"
                lines.append(f"  backend {part.plan.backend.name} for {kind}{why}")
            for layer in arrangement.left_out:
                what = "in pieces now" if layer in arrangement.in_pieces else "computes by itself"
                lines.append(f"  under FSDP: {layer.names[0]}, {what}")
        rests = [word for word, on in (("frozen", self.frozen), ("update manual", self.manual)) if on]
        lines += [f"  {word}: vectors move by update() only" for word in rests]
        lines += [f"  native: {layer}, {reason}" for layer, reason in self.native.items()]
        return "\n".join(lines)


def _refuse(caller: str, layers: Sequence[Layer]) -> None:
    """What FSDP has in pieces, or puts together for modules below the root alone."""
    if layers:
        raise RuntimeError(
            f"layer {layers[0].names[0]!r}: {caller}() expected its whole weight, which FSDP puts together only for "
            "the module that it wraps. Make a group of each such module, and call it between its unshard() and "
            "reshard()"
        )


def _describe(rule: Rule) -> str:
    gain = ", learnable gain" if getattr(rule, "learnable_gain", False) else ""
    semantics = next((n for n in semantics_names() if resolve_semantics(n) == rule.semantics), rule.semantics)
    return f"{rule.variant}{gain}, semantics {semantics}, n_power_iterations={rule.n_power_iterations}"
