"""The ranks that train together: one process group with a deadline, and what came of the launch.

    Launch (what was asked for) → joined → accelerator → wrapped, and compared with what was asked

On a CPU the ranks speak gloo. The group is made here, before accelerate looks, because accelerate
gives its own no deadline on a CPU, and none at all (two worlds of one) with DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ground.errors import InfraError, SetupError
from ground.launch import Kind, Launch, in_words, launch_of
from ground.roll import Roll

Value = TypeVar("Value")

_OF_GLOO = ("gloo/", "Gloo ")
"""What gloo's own errors name, which torch raises as any RuntimeError; others are DistErrors."""


class Ranks:
    """This process among those that train together.

    Example:
        ranks = join_ranks("sft");  ranks.any(pending.requested);  ranks.shared(plan)
    """

    def __init__(self, launch: Launch, seconds: float) -> None:
        self.launch, self.seconds = launch, seconds

    @property
    def is_main(self) -> bool:
        """Rank 0."""
        return self.launch.is_main

    @property
    def num_ranks(self) -> int:
        """How many there are."""
        return self.launch.num_ranks

    @property
    def backend(self) -> str | None:
        """The transport that accelerate has to be told, because it would take none on a CPU."""
        is_told = self.launch.kind != "single" and not torch.cuda.is_available()
        return "gloo" if is_told else None

    def accelerator(self) -> Accelerator:
        """accelerate over this group, as it was asked for.

        Raises:
            SetupError: accelerate has made another world of it.
        """
        on_cpu = not torch.cuda.is_available()
        handlers = [InitProcessGroupKwargs(backend=self.backend)] if self.backend else []
        is_plain = on_cpu and not self.launch.is_zero
        accelerator = Accelerator(cpu=is_plain, kwargs_handlers=list(handlers))
        self.check(accelerator.num_processes)
        return accelerator

    def any(self, flag: bool) -> bool:
        """Whether some rank says so: all ranks get the same answer, so that none goes on alone."""
        return self.greatest(int(flag)) == (1,)

    def greatest(self, *numbers: int) -> tuple[int, ...]:
        """The greatest that any rank says of each number."""
        if self.num_ranks == 1:
            return numbers
        told = torch.tensor(numbers)
        with lost_ranks(self.launch, "agree on going on", self.seconds):
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return tuple(map(int, told.tolist()))

    def shared(self, value: Value) -> Value:
        """What rank 0 has, on every rank."""
        if self.num_ranks == 1:
            return value
        box = [value]
        with lost_ranks(self.launch, "hear from rank 0", self.seconds):
            dist.broadcast_object_list(box)
        return cast(Value, box[0])

    def give(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make every other rank's tensors those of rank 0, in place."""
        if self.num_ranks == 1:
            return
        with lost_ranks(self.launch, "have rank 0's weights", self.seconds):
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def check(self, num_ranks: int, module: nn.Module | None = None) -> None:
        """Compare what the launcher asked for with what came of it.

        Raises:
            SetupError: another number of ranks, or another wrapper.
        """
        wanted = self.launch
        found = wanted.kind if module is None else wrapper_of(module)
        if (found, num_ranks) == (wanted.kind, wanted.num_ranks):
            return
        raise SetupError(
            f"the model must be trained by {wanted}, but it is {in_words(found, num_ranks)}",
            where="accelerate launch",
            why="accelerate takes something else in silence where it cannot do what it was asked",
            fix="look at the launch file; recipes/accelerate has one for each that works",
        )


def join_ranks(world: str, *, seconds: float = 1800.0) -> Ranks:
    """Join the process group that the launcher's environment speaks of.

    Args:
        world: names the group, so that one launch can make several, one after another.
        seconds: how long any rank may keep the others waiting.
    Raises:
        SetupError: this machine cannot do what the launch file asks for.
        InfraError: the other ranks did not come.
    """
    launch = launch_of(os.environ)
    require_possible(launch, has_gpu=torch.cuda.is_available())
    if launch.kind != "single" and not dist.is_initialized():
        with lost_ranks(launch, "find the other ranks", seconds):
            _initialise(launch, world, seconds)
    return Ranks(launch, seconds)


def require_possible(launch: Launch, *, has_gpu: bool) -> None:
    """Refuse what this machine cannot do before anything is loaded.

    Raises:
        SetupError: FSDP2 without a GPU, or DeepSpeed where it is not installed.
    """
    if launch.kind == "fsdp2" and not has_gpu:
        raise SetupError(
            "FSDP2 needs a GPU",
            where="accelerate launch",
            why="without one accelerate turns FSDP2 into DDP in silence",
            fix="use recipes/accelerate/ddp.yaml, zero2.yaml or zero3.yaml on this machine",
        )
    if launch.is_zero and importlib.util.find_spec("deepspeed") is None:
        raise SetupError(
            f"{launch.kind} needs DeepSpeed, which is not installed",
            where="accelerate launch",
            fix="pip install 'packtrain[deepspeed]', or use recipes/accelerate/ddp.yaml",
        )


def wrapper_of(module: nn.Module) -> Kind | Literal["data parallel"]:
    """What a model was wrapped in; `single` for a bare one.

    `data parallel` is one process over several GPUs, which nobody can ask for: it multiplies the
    rows of a step.
    """
    if isinstance(module, DistributedDataParallel):
        return "ddp"
    if isinstance(module, nn.DataParallel):
        return "data parallel"
    if isinstance(module, FSDPModule):
        return "fsdp2"
    if importlib.util.find_spec("deepspeed") is not None:
        from deepspeed import DeepSpeedEngine

        if isinstance(module, DeepSpeedEngine):
            return cast(Kind, f"zero{module.zero_optimization_stage()}")
    return "single"


@contextmanager
def lost_ranks(launch: Launch, purpose: str, seconds: float) -> Iterator[None]:
    """Turn torch's words for a rank that is gone, or silent, into ours.

    Raises:
        InfraError: with what was waited for.
    """
    try:
        yield
    except RuntimeError as error:
        if launch.num_ranks == 1 or not is_lost_rank(error):
            raise
        raise InfraError(
            f"rank {launch.rank} must {purpose} within {seconds:g} s, but another of the "
            f"{launch.num_ranks} ranks is gone or silent",
            where="accelerate launch",
            why=str(error).strip().splitlines()[0][:300],
            fix="look at the other ranks' logs, then continue with --resume",
        ) from error


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of a collective means that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_GLOO)


def _initialise(launch: Launch, world: str, seconds: float) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    elif launch.is_zero:
        _tame_deepspeed()
    roll = Roll(os.environ)
    roll.gather(world, seconds)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(world, roll.store),  # pyright: ignore[reportPrivateImportUsage]
        rank=launch.rank,
        world_size=launch.num_ranks,
        timeout=timedelta(seconds=seconds),
    )


def _tame_deepspeed() -> None:
    """Keep DeepSpeed on a CPU to the group's own collectives.

    It would compile a shared-memory all-reduce of its own (minutes, a C++ compiler), in which the
    ranks that are left spin without a deadline when one of them dies.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
