"""What a program, and the container that runs it, may use. The defaults stand here and nowhere else."""

from dataclasses import dataclass

from fractal.sandbox.inside.protocol import CANDIDATE_THREADS, JUDGE_MEMORY

REFERENCE_FACTOR = 4.0  # a program may take this many times its reference's CPU time (EvalPlus: 4)
REFERENCE_CPU_S = 60.0  # for measuring a reference
MAX_SLOTS = 500  # a slot's second uid is 500 above its first: supervisor.py
GVISOR_THREADS = 4096  # gVisor's own on the host, several for each process inside


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use for all its tests together. Raises ValueError out of range."""

    cpu_s: float = 4.0  # decides; grows to REFERENCE_FACTOR x the reference's own time where that is more
    wall_s: float = 12.0  # for programs that sleep; confirmed with nothing beside it before it counts
    memory_mib: int = 512  # address space
    file_mib: int = 16

    def __post_init__(self) -> None:
        if not (0 < self.cpu_s <= 3600 and 0 < self.wall_s <= 36000 and self.memory_mib >= 64 and self.file_mib > 0):
            raise ValueError(f"limits out of range: {self}")


DEFAULT_LIMITS = Limits()


def container_memory(slots: int, limits: Limits) -> int:
    """Bytes for a container: in each slot a program's own process, a shared one and the judge; and the supervisor."""
    return (slots * (2 * limits.memory_mib + (JUDGE_MEMORY >> 20)) + 512) << 20


def container_processes(slots: int) -> int:
    """Processes and threads for a container: two candidates in each slot, with zygote and judge."""
    return slots * (2 * CANDIDATE_THREADS + 4) + 16
