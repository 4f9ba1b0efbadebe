"""The processes of a run: which of them this is, how they agree, and what became of one that is lost."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from ..utils.environment import is_of_a_lost_rank
from ..utils.errors import UserError
from .rng import random_state


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def is_main() -> bool:
    return rank() == 0


class Processes:
    """This process among those torchrun started: device, rank, number."""

    def __init__(self, device: str | None):
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if chosen.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {chosen!r} was asked for, but PyTorch sees no GPU. Use --device cpu.")
        info = init_distributed_device_so(chosen, dist_backend=None)
        self.device, self.rank, self.size = torch.device(info["device"]), info["global_rank"], info["world_size"]
        self.is_main = self.rank == 0

    def close(self) -> None:
        if is_distributed():
            dist.destroy_process_group()


def autocast_type(setting: str, device: torch.device | str) -> torch.dtype | None:
    """bfloat16 where it is asked for, or by default (``auto``) on GPUs that have it; None = float32."""
    cuda = torch.device(device).type == "cuda"
    if setting == "bf16" or (setting == "auto" and cuda and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return None


def agree(*values: int) -> list[int]:
    """The largest of each value over all processes, so that all of them do the same after a step."""
    if world_size() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(values, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def random_states() -> list[dict[str, Any]]:
    """The state of each process's random generators, by rank; every process must call it."""
    if world_size() == 1:
        return [random_state()]
    states: list[Any] = [None] * world_size()
    dist.all_gather_object(states, random_state())
    return states


@dataclass(frozen=True)
class _Peer:
    rank: int
    host: str
    process: int

    @property
    def is_dead(self) -> bool:
        """Whether its process is gone; never, as far as this machine knows, for a process on another."""
        if self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            return state in "ZX"
        except OSError:
            return True


@contextmanager
def naming_lost_ranks(resume_with: str) -> Iterator[None]:
    """Makes the failure of a collective operation a UserError that names the processes that are gone.

    Args:
        resume_with: the command that continues the run.
    """
    if world_size() == 1:
        yield
        return
    peers: list[Any] = [None] * world_size()
    dist.all_gather_object(peers, _Peer(rank(), socket.gethostname(), os.getpid()))
    try:
        yield
    except RuntimeError as error:
        lost = [peer for peer in peers if peer.rank != rank() and peer.is_dead]
        elsewhere = [peer for peer in peers if peer.host != socket.gethostname()]
        if not lost and not is_of_a_lost_rank(error):
            raise
        who = lost or elsewhere
        names = ", ".join(f"rank {peer.rank} (process {peer.process} on {peer.host})" for peer in who[:8])
        where = "was lost" if lost else "may be lost"
        raise UserError(
            f"{names or 'a process of the run'} {where}: {str(error).splitlines()[0][:200]}. The last checkpoint is "
            f"kept. Continue with: {resume_with}"
        ) from error
