"""What the generation stage and the engines agree on: settings, requests, completions, and the Engine protocol.

The engines are vllm_processes.py (vllm.py in processes of their own), transformers.py and openai.py.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from fractal.errors import InputError

MOST_ENGINES = 1024  # in one cluster


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. Checked when made; raises InputError."""

    n: int = 8
    temperature: float = 0.8
    top_p: float = 1.0  # on a CPU anything below 1 costs vLLM more than the model does
    max_tokens: int = 320
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"--n {self.n}: must be at least 1.")
        if not 0 <= self.temperature <= 10:
            raise InputError(f"--temperature {self.temperature}: must lie between 0 and 10.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: must be above 0 and at most 1.")
        if self.max_tokens < 1:
            raise InputError(f"--max-tokens {self.max_tokens}: must be at least 1.")
        if not 0 <= self.seed < 1 << 31:
            raise InputError(f"--seed {self.seed}: must lie between 0 and {(1 << 31) - 1}.")


@dataclass(frozen=True, slots=True)
class Server:
    """A model behind an OpenAI-compatible server. Checked when made; raises InputError."""

    base_url: str  # as http://localhost:8000/v1
    tokenizer: str | None = None  # a folder or hub id: prompts are rendered here; None: the server's chat template
    concurrency: int = 32  # requests in flight at most

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(
                f"--base-url {self.base_url or '(none)'}: expected an address, as http://localhost:8000/v1."
            )
        if not 1 <= self.concurrency <= 4096:
            raise InputError(f"--concurrency {self.concurrency}: must be from 1 to 4096.")


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Where Ray runs engines, one on each GPU where there are any."""

    address: Literal["local", "auto"]  # started on this machine, or the cluster that this node belongs to
    engines: int | None = None  # None: as many as there are GPUs, without any as there are nodes
    gpus: bool = False  # a GPU is asked for each

    @classmethod
    def parse(cls, ray: str | None, gpus: str | None) -> Self | None:
        """Of --ray and --gpus; None without either. Raises InputError."""
        if ray is None and gpus is None:
            return None
        address: Literal["local", "auto"] = "local"
        count: str | None = gpus
        if ray == "auto":
            address = "auto"
        elif ray is not None:
            name, _, count = ray.partition(":")
            if name != "local" or gpus is not None:
                raise InputError(f"--ray {ray}: expected local:N, as local:2, or auto; with --gpus, auto alone.")
        if count in (None, "all") and ray in (None, "auto"):
            return cls(address, None, gpus is not None)
        option = f"--gpus {gpus}: expected all, or a number" if gpus is not None else f"--ray {ray}: expected a number"
        if not count or not count.isdecimal() or not 1 <= int(count) <= MOST_ENGINES:
            raise InputError(f"{option} from 1 to {MOST_ENGINES}.")
        return cls(address, int(count), gpus is not None)


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to draw."""

    task_id: str
    sample_id: int
    prompt: list[int]  # token ids; empty where the server has the tokenizer
    seed: int
    text: str = ""  # what the model continues; for a server with its own chat template, the user's message


class SizedRequests(Protocol):
    """A known number of requests, which may be made only as they are iterated."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion drawn."""

    request: Request
    text: str  # what the model added, without the stop text
    stopped: bool  # the model ended it: at a stop text or an end token
    tokens: int
    sum_logprob: float | None  # None: the server sent no log-probabilities
    code: str | None = None  # the program in it, where the engine's process has extracted it


def never_stop() -> bool:
    return False


class Engine(Protocol):
    """A model that decodes.

    `generate` yields completions as they finish, in batches, in any order. Once `should_stop` returns True, it yields
    what is finished and ends. It takes requests as it needs them, so that millions need no memory.
    """

    def generate(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]: ...

    def close(self) -> None: ...
