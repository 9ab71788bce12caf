"""A strict stand-in for CUDA and NCCL: tensors that lie in the host's memory, say that they are on `cuda`, and refuse what CUDA refuses.

Inside `accelerated()` torch seems to have CUDA devices. Their tensors hold true values, so code whose course depends on them (routing)
really runs. Refused with a DeviceMix: an operation on tensors of two devices, but for what CUDA allows (a CPU scalar in an element-wise
operation, CPU indices, copies). Counted by place: what makes the host wait for the device (`syncs`), and copies to it (`uploads`).
Memory that `torch.empty` or a collective has yet to write is NaN, and backward runs in another thread, as on CUDA.

Inside `nccl(here)` messages of such tensors go as NCCL sends them: each process group does one after the other, in the order in which they
were asked for, beside the host; tensors of the host, strided ones and foreign types are refused. What is sent may not change before the
message has been waited for.

What it cannot show: numbers and rules of CUDA's own kernels (grouped products' strides are checked), streams, time, memory.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # which modes would import in every child
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quintet.parallel import collectives

aten = torch.ops.aten
PACKAGE = str(Path(collectives.__file__).parent.parent)
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
}
"""Operations whose result, or its size, the host must know before it can go on."""
TAKES_INDICES = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
TAKES_SCALARS = {aten.fill_, aten.masked_fill, aten.masked_fill_}
SENDABLE = {getattr(torch, name) for name in "int8 uint8 int32 int64 float16 bfloat16 float32 float64 bool".split()}


class DeviceMix(RuntimeError):
    """What CUDA or NCCL would refuse."""


class OnDevice(torch.Tensor):
    """A tensor on `cuda`; `held` is one on the CPU over the same memory."""

    held: Tensor
    _index: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, index: int) -> OnDevice:
        assert type(held) is Tensor or type(held) is torch.nn.Parameter, type(held)
        held = held.detach()
        made: OnDevice = torch.Tensor._make_subclass(
            cls, held, False, dispatch_device=True, device_for_backend_keys=torch.device("cuda", index)
        )
        made.held, made._index = held, index
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self._index)

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, OnDevice):
            raise DeviceMix(f"the data of a tensor on {self.device} set to one on {value.device}")
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held, self._index = value.held, value._index

    def numpy(self, *args: Any, **named: Any) -> Any:
        raise DeviceMix(f"can't convert {self.device} device type tensor to numpy; copy it to the host first")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **named: Any) -> str:  # type: ignore[override]
        return f"{self.held} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else object.__format__(self, spec)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        assert _here is not None, "a tensor of a device that is no more"
        return _here.run(func, args, kwargs or {})


class _Generator(torch.Generator):
    """Random numbers of the host or of a device."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made: _Generator = super().__new__(cls, "cpu")
        made.kind = torch.device(device)  # type: ignore[attr-defined]
        return made

    device = property(lambda self: self.kind)


_here: Accelerator | None = None


class Accelerator(TorchDispatchMode):
    """The devices of this process, of which one is current, and what it asked of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.current = count, 0
        self.within = False
        """Whether torch itself is at work on tensors of the device: what it makes then lies there."""
        self.pinned = 0
        """Tensors of pinned memory on the host."""
        self.generator = torch.Generator().manual_seed(0)
        self.syncs: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.host_messages: Counter[str] = Counter()
        """Collectives whose tensors lie on the host, by name."""
        self.num_messages: Counter[str] = Counter()

    def forget(self) -> None:
        """Count from 0."""
        for counter in (self.syncs, self.uploads, self.host_messages, self.num_messages):
            counter.clear()

    @contextmanager
    def active(self) -> Iterator[None]:
        """For this thread."""
        with self, _Indexed(self):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation, on the host's memory, by the rules of devices."""
        given = [each for each in _leaves((args, *kwargs.values())) if isinstance(each, Tensor)]
        indices = {each._index for each in given if isinstance(each, OnDevice)}
        wanted = kwargs.get("device")
        if kwargs.get("pin_memory"):
            self.pinned, kwargs = self.pinned + 1, {**kwargs, "pin_memory": False}
        if self.within and (indices or not given):
            wanted = None if indices else torch.device("cuda", self.current)
        if not indices and (wanted is None or torch.device(wanted).type != "cuda"):
            return func(*args, **kwargs)
        place = min(indices) if indices else self._index(wanted)
        self._check(func, args, kwargs, given, indices)
        to_host = wanted is not None and torch.device(wanted).type == "cpu"
        self._count(func, args, given, to_host=to_host)
        if func is aten._fused_sdp_choice.default:
            return 0  # as written: the fused kernels are CUDA's
        named = {name: torch.device("cpu") if name == "device" and value is not None else value for name, value in kwargs.items()}
        args, named = _map(_held, args), {name: _map(_held, value) for name, value in named.items()}
        with self._randomness(func, named):
            out = func(*args, **named)
        if func is aten._grouped_mm.default and out.ndim == 2:
            out[int(args[2][-1]) :] = torch.nan
        if "empty" in func.__name__:
            poison(out)
        originals = {id(each.held): each for each in given if isinstance(each, OnDevice)}

        def wrapped(each: Any) -> Any:
            if not isinstance(each, Tensor) or to_host or (func.overloadpacket is aten.copy_ and not isinstance(given[0], OnDevice)):
                return each
            known = originals.get(id(each))
            return OnDevice(each, place) if known is None else known

        return given[0] if func.overloadpacket is aten.copy_ else _map(wrapped, out)

    def _index(self, device: Any) -> int:
        index = torch.device(device).index
        index = self.current if index is None else index
        if index >= self.count:
            raise DeviceMix(f"CUDA error: invalid device ordinal {index} of {self.count}")
        return int(index)

    def _check(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], indices: set[int]) -> None:
        packet = func.overloadpacket
        if packet in (aten.copy_, aten._to_copy):
            return
        if func.namespace == "c10d":
            raise DeviceMix(f"{func}: a message that the emulated NCCL does not know")
        strangers = [each for each in given if not isinstance(each, OnDevice)]
        if packet in TAKES_INDICES:
            strangers = [each for each in strangers if each is args[0] or (len(args) > 2 and each is args[2] and each.ndim)]
        into_host = func._schema.name[-1] == "_" and not isinstance(given[0], OnDevice)
        if (torch.Tag.pointwise in func.tags or packet in TAKES_SCALARS) and not into_host:
            strangers = [each for each in strangers if each.ndim]
        if (strangers and indices) or len(indices) > 1:
            told = ", ".join(f"{each.device} {list(each.shape)}" for each in given)
            raise DeviceMix(f"Expected all tensors to be on the same device, but {func} got {told}")
        if func is aten._grouped_mm.default:
            _check_grouped(*args[:3])

    def _count(self, func: Any, args: Any, given: list[Tensor], *, to_host: bool) -> None:
        packet = func.overloadpacket
        is_copy = packet in (aten.copy_, aten._to_copy)
        source = given[-1] if is_copy and given else None
        down = to_host or (packet is aten.copy_ and not isinstance(given[0], OnDevice))
        by_mask = packet in TAKES_INDICES and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1])
        if packet in WAITING or (is_copy and down) or by_mask:
            self.syncs[f"{_place()} {packet.__name__}"] += 1
        elif is_copy and source is not None and not isinstance(source, OnDevice):
            self.uploads[_place()] += 1

    @contextmanager
    def _randomness(self, func: Any, named: dict[str, Any]) -> Iterator[None]:
        """The device's own random numbers, where an operation draws any and was not given a generator."""
        if torch.Tag.nondeterministic_seeded not in func.tags or named.get("generator") is not None:
            yield
            return
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generator.get_state())
        try:
            yield
            self.generator.set_state(torch.default_generator.get_state())
        finally:
            torch.default_generator.set_state(before)


class _Indexed(TorchFunctionMode):
    """Translates devices: torch's C++, which has no CUDA here, takes tensors of the device for its own."""

    def __init__(self, here: Accelerator) -> None:
        super().__init__()
        self.here = here

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._to(func, *args, **named)
        if func is torch.Tensor.new_tensor:
            return self._to(torch.Tensor.to, torch.tensor(args[1], dtype=named.get("dtype", args[0].dtype)), args[0].device)
        on_device = any(isinstance(each, OnDevice) for each in _leaves((args, *named.values())))
        if named.get("generator") is not None and (named["generator"].device.type == "cuda") != on_device:
            raise DeviceMix(f"{func.__name__} with a generator of {named['generator'].device}: it must be of the tensor's device")
        before, self.here.within = self.here.within, on_device and named.get("device") is None
        try:
            if named.get("device") is not None:
                device = named["device"] = self._full(named["device"])
                if func in (torch.tensor, torch.as_tensor):
                    return self._to(torch.Tensor.to, func(*args, **{**named, "device": None}), device)
            return func(*args, **named)
        finally:
            self.here.within = before

    def _to(self, func: Any, tensor: Tensor, *args: Any, **named: Any) -> Tensor:
        if func is not torch.Tensor.to:
            args = ("cpu" if func is torch.Tensor.cpu else "cuda",)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **{name: value for name, value in named.items() if name != "copy"})
        if args and isinstance(args[0], Tensor):
            device, dtype = args[0].device, args[0].dtype
        device = self._full(tensor.device if device is None else device)
        if device == tensor.device and dtype in (None, tensor.dtype) and not named.get("copy"):
            return tensor
        before, self.here.within = self.here.within, False
        try:
            return aten._to_copy.default(tensor, device=device, dtype=dtype)  # type: ignore[no-any-return]
        finally:
            self.here.within = before

    def _full(self, device: Any) -> torch.device:
        device = torch.device(device)
        return torch.device("cuda", self.here._index(device)) if device.type == "cuda" else device


def poison(tensor: Tensor) -> None:
    """Make values that nobody has written known for what they are."""
    if tensor.dtype.is_floating_point and tensor.element_size() > 1:
        tensor.fill_(torch.nan)
    elif not tensor.dtype.is_floating_point and tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max // 3)


def _leaves(value: Any) -> Iterator[Any]:
    """What lies in lists and tuples."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(_map(change, each) for each in value) if isinstance(value, list | tuple) else change(value)


def _held(each: Any) -> Any:
    return each.held if isinstance(each, OnDevice) else each


def _check_grouped(*tensors: Tensor) -> None:
    """The strides and types that CUDA's kernel takes, by torch's own rule for tensors without values; and the addresses."""
    if tensors[0].dtype != torch.bfloat16:
        return  # a loop on the device
    meta = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta") for each in map(_held, tensors)]
    aten._grouped_mm.default(*meta)
    for each in tensors[:2]:
        if each.data_ptr() % 16:
            raise DeviceMix(f"grouped product of a tensor at an address that is no multiple of 16 bytes: {list(each.shape)}")


def _place() -> str:
    """Where in the package this is."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "outside" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_code.co_name}"


@contextmanager
def accelerated(count: int | None = None) -> Iterator[Accelerator]:
    """torch has CUDA devices: as many as this node has ranks, or `count`."""
    global _here
    here = Accelerator(count or int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1))
    about = SimpleNamespace(name="emulated", total_memory=64 << 30, major=9, minor=0, multi_processor_count=1)

    def set_device(device: Any) -> None:
        here.current = here._index(f"cuda:{device}" if isinstance(device, int) else device)

    def backward(*args: Any, **named: Any) -> Any:
        return _in_a_thread(lambda: real_backward(*args, **named), here)

    real_backward = torch.autograd._engine_run_backward
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: here.count,
            "set_device": set_device,
            "current_device": lambda: here.current,
            "synchronize": lambda device=None: here.syncs.update([f"{_place()} synchronize"]),
            "get_device_properties": lambda device=None: about,
            "max_memory_allocated": lambda device=None: 1 << 20,
            "manual_seed_all": lambda seed: here.generator.manual_seed(seed) and None,
            "get_rng_state": lambda device="cuda": here.generator.get_state(),
            "set_rng_state": lambda state, device="cuda": here.generator.set_state(state) and None,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.autograd, "_engine_run_backward", backward)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's data cannot change its kind
        _here, before = here, _here
        try:
            with here.active():
                yield here
        finally:
            _here = before
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def _in_a_thread(work: Callable[[], Any], here: Accelerator) -> Any:
    """What torch's own work returns, in a thread of its own."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with here.active():
                found.append(work())
        except BaseException as error:
            failed.append(error)

    before, thread = here.within, threading.Thread(target=run)
    here.within = True
    thread.start()
    thread.join()
    here.within = before
    if failed:
        raise failed[0]
    return found[0]


class _Work:
    """A message under way."""

    def __init__(self, what: str, sent: Sequence[OnDevice], seconds: float) -> None:
        self.what, self.seconds, self.sent = what, seconds, [(each, each._version) for each in sent]
        self.done = threading.Event()
        self.error: BaseException | None = None

    def wait(self, timeout: object = None) -> bool:
        if not self.done.wait(self.seconds):
            raise RuntimeError(f"NCCL: {self.what} timed out: the ranks ask for messages in different orders")
        if self.error is not None:
            raise self.error
        for tensor, version in self.sent:
            if tensor._version != version:
                raise DeviceMix(f"{self.what}: what was sent, {list(tensor.shape)}, was changed before it was waited for")
        self.sent.clear()
        return True

    def is_completed(self) -> bool:
        return self.done.is_set()


class _Stream:
    """The messages of a process group, one after the other, in a thread of its own over a gloo group of its own."""

    def __init__(self, group: dist.ProcessGroup, seconds: float) -> None:
        self.seconds = seconds
        store = PrefixStore(f"device/{group.group_name}", _get_default_store())
        self.gloo = dist.ProcessGroupGloo(store, group.rank(), group.size(), timedelta(seconds=seconds + 5))
        self._asked: queue.SimpleQueue[tuple[Callable[[Any], list[Any]], _Work]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self, what: str, call: Callable[[Any], list[Any]], sent: Sequence[OnDevice]) -> _Work:
        """`call` gets the gloo group and returns what to wait for, when it is its turn."""
        work = _Work(what, sent, self.seconds)
        self._asked.put((call, work))
        return work

    def _run(self) -> None:
        while True:
            call, work = self._asked.get()
            try:
                for each in call(self.gloo):
                    each.wait()
            except BaseException as error:
                work.error = error
            work.done.set()


class Messages:
    """The functions of torch.distributed that the package calls, with NCCL for tensors of the device."""

    def __init__(self, here: Accelerator, seconds: float) -> None:
        self.here, self.seconds = here, seconds
        self._streams: dict[str, _Stream] = {}

    def _start(
        self, what: str, call: Callable[[Any], list[Any]], group: dist.ProcessGroup, *, sent: list[Tensor], received: list[Tensor]
    ) -> _Work:
        own = int(os.environ.get("LOCAL_RANK", "0"))
        for each in (*sent, *received):
            if not isinstance(each, OnDevice):
                raise DeviceMix(f"NCCL: {what} of a tensor on {each.device}: no backend for it in a group of the device")
            if each.device.index != own:
                raise DeviceMix(f"NCCL: {what} of rank {own} from {each.device}: set_device comes before the first tensor")
            if not each.is_contiguous() or each.dtype not in SENDABLE:
                raise DeviceMix(f"NCCL: {what} of {each.dtype} {list(each.shape)}, strides {each.stride()}: a type or strides it has not")
        ours = [each for each in sent if isinstance(each, OnDevice)]
        taken = {each.untyped_storage().data_ptr() for each in ours}
        for each in received:
            if each.untyped_storage().data_ptr() not in taken:
                poison(_held(each))
        self.here.num_messages[what] += 1
        if group.group_name not in self._streams:
            self._streams[group.group_name] = _Stream(group, self.seconds)
        return self._streams[group.group_name].ask(what, call, ours)

    def _host(self, what: str, tensor: Tensor) -> bool:
        if isinstance(tensor, OnDevice):
            return False
        self.here.host_messages[what] += 1
        return True

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, *, group: Any = None, async_op: bool = False) -> Any:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        return self._ended(
            self._start("all_reduce", lambda gloo: [gloo.allreduce([_held(tensor)], options)], _of(group), sent=[tensor], received=[]),
            async_op,
        )

    def all_gather(self, out: Tensor, shard: Tensor, *, group: Any, async_op: bool = False) -> Any:
        def call(gloo: Any) -> list[Any]:
            return [gloo.allgather([[*_held(out).chunk(group.size())]], [_held(shard).clone()])]

        if out.numel() != group.size() * shard.numel() or out.dtype != shard.dtype:
            raise DeviceMix(f"NCCL: all_gather of {list(shard.shape)} into {list(out.shape)} over {group.size()} ranks")
        return self._ended(self._start("all_gather", call, group, sent=[shard], received=[out]), async_op)

    def reduce_scatter(self, out: Tensor, whole: Tensor, *, group: Any, async_op: bool = False) -> Any:
        terms = torch.empty_like(_held(whole))

        def call(gloo: Any) -> list[Any]:
            gloo.alltoall_base(terms, _held(whole), [], [], dist.AllToAllOptions()).wait()
            _held(out).copy_(terms.view(group.size(), *out.shape).sum(0))
            return []

        if whole.numel() != group.size() * out.numel() or out.dtype != whole.dtype:
            raise DeviceMix(f"NCCL: reduce_scatter of {list(whole.shape)} into {list(out.shape)} over {group.size()} ranks")
        return self._ended(self._start("reduce_scatter", call, group, sent=[whole], received=[out]), async_op)

    def all_to_all(
        self, out: Tensor, rows: Tensor, receive: Any = None, send: Any = None, *, group: Any = None, async_op: bool = False
    ) -> Any:
        for each in (*(receive or []), *(send or [])):
            if type(each) is not int:
                raise DeviceMix(f"all_to_all_single wants its sizes as ints of the host, not {type(each)}")
        if sum(receive or [len(out)]) != len(out) or sum(send or [len(rows)]) != len(rows):
            raise DeviceMix(f"NCCL: all_to_all of {len(rows)} rows as {send} into {len(out)} as {receive}")

        def call(gloo: Any) -> list[Any]:
            return [gloo.alltoall_base(_held(out), _held(rows), receive or [], send or [], dist.AllToAllOptions())]

        return self._ended(self._start("all_to_all", call, _of(group), sent=[rows], received=[out]), async_op)

    def batch(self, operations: list[dist.P2POp]) -> list[Any]:
        """One work for all, as NCCL has it."""
        group = operations[0].group
        assert group is not None and all(each.group is group for each in operations)
        if any(each.group_peer == group.rank() for each in operations):
            raise ValueError("a message to oneself")  # torch refuses it

        def call(gloo: Any) -> list[Any]:
            return [
                gloo.send([_held(each.tensor)], each.group_peer, 0)
                if each.op is dist.isend
                else gloo.recv([_held(each.tensor)], each.group_peer, 0)
                for each in operations
            ]

        sent, received = ([each.tensor for each in operations if each.op is op] for op in (dist.isend, dist.irecv))
        return [self._start("batch", call, group, sent=sent, received=received)]

    def _ended(self, work: _Work, async_op: bool) -> _Work | None:
        if async_op:
            return work
        work.wait()
        return None


def _of(group: Any) -> Any:
    return dist.group.WORLD if group is None else group


@contextmanager
def nccl(here: Accelerator, *, seconds: float = 60) -> Iterator[Messages]:
    """Messages of tensors of the device go by an emulated NCCL, which gives up after so many seconds; those of the host as torch sends
    them."""
    messages = Messages(here, seconds)

    def init(backend: str, **named: Any) -> None:
        if "nccl" not in backend:
            raise DeviceMix(f"process groups of {backend!r} take no tensors of CUDA")
        real_init("gloo", **named)

    def either(what: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tensor, *args, **named: (theirs if messages._host(what, tensor) else ours)(tensor, *args, **named)

    real_init = dist.init_process_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", init)
        patch.setattr(dist, "get_backend", lambda group=None: "cpu:gloo,cuda:nccl")
        patch.setattr(dist, "all_reduce", either("all_reduce", messages.all_reduce, dist.all_reduce))
        patch.setattr(dist, "all_to_all_single", either("all_to_all", messages.all_to_all, dist.all_to_all_single))
        patch.setattr(collectives, "_all_gather_single", either("all_gather", messages.all_gather, collectives._all_gather_single))
        patch.setattr(
            collectives, "_reduce_scatter_single", either("reduce_scatter", messages.reduce_scatter, collectives._reduce_scatter_single)
        )
        patch.setattr(dist, "batch_isend_irecv", messages.batch)
        yield messages
