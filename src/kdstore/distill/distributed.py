"""The processes of one run: who they are, and the few things that they say to each other.

`torchrun` starts them, one per GPU or per few cores, on one host or many. A process alone is a world of one, in which all of this costs nothing. Features are
gathered and gradients summed here, without DistributedDataParallel (docs/decisions/004): a step that knows the gradients at its features needs one sum over
the processes, and no hooks. Numbers of the host (errors, signals, checkpoints) go through gloo, so that no step waits for a GPU to tell them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdstore.errors import ConfigError, KdstoreError, RunError
from kdstore.models.load import pick_device

T = TypeVar("T")
BUCKET = 1 << 24  # numbers that are summed at once, 64 MiB of float32


@dataclass(frozen=True)
class World:
    """One process among `size`. All of them must call the same methods in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, logs and reports."""
        return self.rank == 0

    def gather(self, part: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, of one shape and type, in order of rank; no gradient goes through."""
        if self.size == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with _talk():
            dist.all_gather(parts, part.contiguous())
        return parts

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes: the same bits on each."""
        if self.size == 1:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with _talk():
                dist.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def check_same(self, tensors: Iterable[Tensor], what: str) -> None:
        """Raise RunError on all processes unless all of them hold the same bits, by a sum over the bits of each of these float32 tensors."""
        if self.size == 1:
            return
        sums = torch.stack([tensor.detach().contiguous().view(-1).view(torch.int32).sum(dtype=torch.int64) for tensor in tensors])
        others = self.gather(sums)
        with self.together():
            if not all(torch.equal(sums, other) for other in others):
                raise RunError(f"The processes of this run hold different {what}.", "Give them GPUs of one kind and one version of PyTorch.")

    def agree(self, error: KdstoreError | None, signum: int = 0) -> int:
        """Raise on all processes the error that one of them brings, else return the largest of their signal numbers."""
        if self.size == 1:
            if error is not None:
                raise error
            return signum
        told = torch.tensor([error is not None, signum], dtype=torch.int64)
        errors: list[KdstoreError | None] = [None] * self.size
        with _talk():
            dist.all_reduce(told, dist.ReduceOp.MAX)
            if told[0]:
                dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise found
        return int(told[1])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that every process runs for itself; an error of one is raised on all."""
        error = None
        try:
            yield
        except KdstoreError as e:
            error = e
        self.agree(error)

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on all processes what `make` returns on the first, or raise what it raises there."""
        if self.size == 1:
            return make()
        outcome: list[Any] = [None]
        if self.first:
            try:
                outcome = [make()]
            except KdstoreError as e:
                outcome = [e]
        with _talk():
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], KdstoreError):
            raise outcome[0]
        return cast(T, outcome[0])


@dataclass(frozen=True)
class Share:
    """Which pairs of every global batch a process encodes: pieces of `piece` pairs, dealt to the processes in turn.

    So what one piece holds does not depend on the number of processes, and several of them do what one does piece after piece.
    """

    batch_size: int
    world: World
    piece: int

    @classmethod
    def of(cls, batch_size: int, world: World, micro_batch: int | None) -> Share:
        """Deal out a batch; raises ConfigError if it has no equal parts."""
        piece = micro_batch or batch_size // world.size
        if piece == 0 or batch_size % (world.size * piece):
            parts = f"{world.size} processes" + (f" in pieces of {micro_batch}" if micro_batch else "")
            raise ConfigError(f"A batch of {batch_size} pairs cannot be dealt to {parts}.", "Choose a batch_size that divides, or another micro_batch.")
        return cls(batch_size, world, piece)

    @property
    def rounds(self) -> int:
        """Pieces of each process."""
        return self.batch_size // (self.world.size * self.piece)

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """The places in the global batch of this process's pairs, piece after piece."""
        return np.arange(self.batch_size).reshape(self.rounds, self.world.size, self.piece)[:, self.world.rank].reshape(-1)

    def start(self, i: int) -> int:
        """The place in the global batch at which the i-th piece of this process begins."""
        return (i * self.world.size + self.world.rank) * self.piece

    def mine(self, whole: Tensor) -> Tensor:
        """Take this process's rows of a global batch, piece after piece."""
        return whole.unflatten(0, (self.rounds, self.world.size, self.piece))[:, self.world.rank].flatten(0, 1)

    def whole(self, mine: Tensor) -> Tensor:
        """Gather the rows of all processes in the order of the global batch; no gradient goes through."""
        if self.world.size == 1:
            return mine.detach()
        return torch.stack([part.unflatten(0, (self.rounds, self.piece)) for part in self.world.gather(mine.detach())], 1).flatten(0, 2)


@contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started with this one, if it did; yields the world and the device of this process, and leaves at the end.

    Processes that joined before stay together, so that several runs can follow one another.
    Raises ConfigError for a device that cannot be used, or fewer GPUs than processes on a host.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(), pick_device(device)
        return
    here, local = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    chosen = pick_device(device)
    if chosen.type == "cuda":
        if chosen.index is not None or here > torch.cuda.device_count():
            found = f"{here} processes of this host have {torch.cuda.device_count()} GPUs and device={device}"
            raise ConfigError(f"Each process needs a GPU of its own: {found}.", "Start one process per GPU with --device cuda, or use --device cpu.")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    joins = not dist.is_initialized()
    if joins:
        with _talk():
            dist.init_process_group("gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield World(dist.get_rank(), dist.get_world_size()), chosen
    finally:
        if joins:
            dist.destroy_process_group()


def synchronised(student: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Let batch norm take its statistics over the pieces that all processes encode at the same time; raises ConfigError where that cannot be.

    timm's conversion, since PyTorch's own would lose the activation that timm's batch norm contains.
    """
    if world.size == 1 or not any(isinstance(module, _BatchNorm) for module in student.modules()):
        return student
    if device.type == "cpu":
        raise ConfigError("This student has batch norm, which PyTorch cannot synchronise between processes on a CPU.", "Use GPUs, or one process.")
    return cast(nn.Module, convert_sync_batchnorm(student))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors in their order by type, at most BUCKET numbers at once unless one has more."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


@contextmanager
def _talk() -> Iterator[None]:
    """Tell in one line that a process is gone: what the others see is a closed connection, or a wait without end."""
    try:
        yield
    except (dist.DistError, RuntimeError) as e:
        if not isinstance(e, dist.DistError) and not any(sign in str(e) for sign in ("Connection", "onnect", "Timed out", "Broken pipe")):
            raise
        reason = str(e).splitlines()[0][-120:]
        raise RunError(f"Another process of this run has ended or cannot be reached ({reason}).", "Its own message says why; then go on with --resume.") from e
