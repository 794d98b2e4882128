"""Several ranks of one run: which this one is, that rank 0 goes first, and what all of them agree on.

In: the environment that torchrun and `accelerate launch` set (RANK, WORLD_SIZE, LOCAL_RANK). Out: a joined process group, and small exchanges
over gloo beside the gradients'. Alone, every function answers at once without torch's distribution. Limits: ranks share the output folder; what a
rank waits for it waits for `training.rank_timeout_seconds` at most, and says who was missing. Each holds the whole model (DDP; zero.py divides what the
optimizer needs), or a part (sharding.py).
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Callable, TypeVar

from emergency_kit.errors import TrainingError

T = TypeVar("T")
# What torch's libraries say when the other end of a connection is gone or silent.
LOST = ("gloo", "nccl", "connection closed", "connection reset", "connection refused", "timed out", "broken pipe", "tcpstore", "remote server")
_control: Any = None


def world() -> int:
    """Number of ranks that this run was started with."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this rank writes, logs, prints and tracks."""
    return rank() == 0


def is_sharded() -> bool:
    """Whether the model is divided among the ranks (FSDP2): as `accelerate launch` says in the environment."""
    return world() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def uses_deepspeed() -> bool:
    """Whether DeepSpeed is to train: as `accelerate launch` says in the environment."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def join(device: str, timeout_seconds: float) -> None:
    """Make the process group, unless there is one or this process is alone; a rank's GPU is the one of its LOCAL_RANK. Raises TrainingError
    where the others are not reached in time."""
    global _control
    if world() == 1 or _control is not None:
        return
    import torch
    import torch.distributed as dist
    from accelerate import DistributedType, PartialState

    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=timeout_seconds)
    try:
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timeout)
        _control = dist.new_group(backend="gloo", timeout=timeout)
        state = PartialState(cpu=device == "cpu")
        if device == "cpu":
            state.device = torch.device("cpu")  # accelerate says cpu:0, to which torch.load brings nothing
            if is_sharded():
                state.distributed_type = DistributedType.MULTI_GPU  # the kind that accelerate makes FSDP of; torch shards a CPU's tensors just as well
            elif uses_deepspeed():
                state.distributed_type = DistributedType.DEEPSPEED
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"ranks: rank {rank()} of {world()} cannot join the others at {os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')} "
                            f"({str(error).splitlines()[0]}); look whether all were started, with one address, and whether a firewall is between them") from None


def open_store(timeout_seconds: float) -> Any:
    """A key-value store (torch's TCPStore) in rank 0's process, which all ranks must open together: the group's own is torch's to use. Raises TrainingError
    where rank 0 is not reached."""
    from torch.distributed import TCPStore

    host, timeout = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=timeout_seconds)
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if is_first() else None
    port = shared(store.port if store else 0)
    try:
        return store or TCPStore(host, port, is_master=False, timeout=timeout)
    except RuntimeError as error:
        raise TrainingError(f"ranks: rank {rank()} of {world()} does not reach rank 0 at {host}:{port} ({str(error).splitlines()[0]}); "
                            "look whether a firewall is between them, which must let through any port, as gloo and NCCL need it, too") from None


def wait(moment: str, timeout_seconds: float) -> None:
    """Until all ranks are here. Raises TrainingError that names the moment and the ranks that did not come."""
    if world() == 1:
        return
    import torch.distributed as dist

    try:
        dist.monitored_barrier(_control, timeout=timedelta(seconds=timeout_seconds), wait_all_ranks=True)
    except RuntimeError as error:
        raise TrainingError(f"ranks: {moment}: {str(error).splitlines()[0]}; each rank's own message says why it ended; training.rank_timeout_seconds is {timeout_seconds:g}") from None


def first_then_others(work: Callable[[], T], moment: str, timeout_seconds: float) -> T:
    """Rank 0's work, then the others', who find what rank 0 has written; all leave together."""
    if is_first():
        result = work()
        wait(moment, timeout_seconds)
    else:
        wait(moment, timeout_seconds)
        result = work()
    wait(moment, timeout_seconds)
    return result


def total(*values: float) -> list[float]:
    """Each value summed over the ranks."""
    if world() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums, group=_control)
    return sums.tolist()


def most(value: int) -> int:
    """The largest of the ranks' values."""
    if world() == 1:
        return value
    import torch
    import torch.distributed as dist

    number = torch.tensor(value)
    dist.all_reduce(number, op=dist.ReduceOp.MAX, group=_control)
    return int(number)


def shared(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def gathered(value: T) -> list[T]:
    """All ranks' values in order, on rank 0; elsewhere an empty list."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    box: list[Any] | None = [None] * world() if is_first() else None
    dist.gather_object(value, box, dst=0, group=_control)
    return box or []


def lost(error: BaseException, kept: str = "The checkpoints saved before are whole: the same command goes on from the last one") -> str | None:
    """What to say of an error that means that another rank is gone, and what was kept; None for any other error, or alone."""
    if world() == 1 or not isinstance(error, RuntimeError) or not any(word in str(error).lower() for word in LOST):
        return None
    return (f"the connection to the other ranks is lost ({str(error).strip().splitlines()[0][:200]}); the message of the rank that ended first says why. {kept}")
