"""When the parts of a model wait for weights that other ranks hold: before each use (ZeRO stage 3), or after an update (1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

from quintet.parallel.bucket import Bucket


def part_of(name: str) -> str:
    """The part of the model that a parameter or module belongs to: `layers.3`, `mtp.0`, `embed`, `norm`, `head`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else parts[0]


def wait_at_first_use(model: nn.Module, buckets: Iterable[Bucket]) -> None:
    """Stages 1 and 2: weights arrive beside the forward behind an update; a part waits for its own.

    Any module with weights waits for those of its whole part, whoever calls it: a part's products may read weights directly (the ring),
    but a norm always runs before. The head's weight, or the embedding's that is also the head, is read by the loss, and so the last norm
    waits for it.
    """
    awaited: dict[str, list[Bucket]] = {}
    for bucket in buckets:
        for part in sorted({part_of(piece.name) for piece in bucket.pieces}):
            awaited.setdefault("norm" if part == "head" else part, []).append(bucket)
            if part == "embed":
                awaited.setdefault("norm", []).append(bucket)

    def wait(module: nn.Module, args: object, *, part: str) -> None:
        for bucket in awaited[part]:
            bucket.finish_gathering()

    for name, module in model.named_modules():
        if part_of(name) in awaited and next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(partial(wait, part=part_of(name)))


class Units:
    """Stage 3: each layer's weights are whole only while it computes, those of the next one on their way; embedding, last norm and head
    stay whole from the first forward after an update to the next update. MTP modules run where the forward has targets."""

    def __init__(self, model: nn.Module, buckets: dict[str, list[Bucket]]) -> None:
        self.names = [name for name in buckets if name != "root"][::-1]  # as forward goes
        self.buckets, self.in_backward = buckets, dict.fromkeys(self.names, False)
        self.num_running = len(self.names)
        model.register_forward_pre_hook(self._begin_forward, with_kwargs=True)
        for name in self.names:
            part = model.get_submodule(name)
            part.register_forward_pre_hook(self._before(name))
            part.register_forward_hook(self._behind(name))

    def _begin_forward(self, module: nn.Module, args: object, named: dict[str, object]) -> None:
        self.num_running = sum(named.get("targets") is not None or not name.startswith("mtp.") for name in self.names)
        self._whole("root")

    def _whole(self, name: str) -> None:
        buckets = self.buckets.get(name, [])  # not every model has a root
        for bucket in buckets:
            bucket.start_gathering()
        for bucket in buckets:
            bucket.finish_gathering()

    def _ask(self, name: str, *, step: int) -> None:
        place = self.names.index(name) + step
        if 0 <= place < self.num_running:
            for bucket in self.buckets[self.names[place]]:
                bucket.start_gathering()

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: object) -> None:
            self._whole(name)
            if not self.in_backward[name]:
                self._ask(name, step=1)

        return before

    def _behind(self, name: str) -> Callable[..., None]:
        def behind(module: nn.Module, args: object, output: tuple[Tensor, object]) -> None:
            if self.in_backward[name]:
                return  # recomputed: backward is about to need the weights
            if output[0].requires_grad:
                output[0].register_hook(lambda gradient: self._enter_backward(name))
            for bucket in self.buckets[name]:
                bucket.free()

        return behind

    def _enter_backward(self, name: str) -> None:
        self.in_backward[name] = True
        self._whole(name)
        self._ask(name, step=-1)

    def leave_backward(self, name: str) -> None:
        """The gradient of one of the part's buckets is full. A parameter's gradient comes from the operation that reads its weight, so
        when all have come no weight is needed any more."""
        if name in self.in_backward and all(bucket.is_full for bucket in self.buckets[name]):
            self._leave(name)

    def end_backward(self) -> None:
        """Behind a backward: also parts that got no gradient for some parameter have left."""
        for name in self.names:
            self._leave(name)

    def _leave(self, name: str) -> None:
        self.in_backward[name] = False
        for bucket in self.buckets[name]:
            bucket.free()
