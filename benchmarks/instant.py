"""A stand-in for the model in vLLM that answers at once: what is left is the time of Python on the way.

It stands at the model runner's border (vllm.v1.executor.Executor): vLLM's scheduler, cache manager and stop checks are
the real ones, and the tokens spell real programs. `--instant` of benchmarks/generate.py.
"""

import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

CACHE_BYTES = 8 << 30  # that it says to have; none is allocated
LOGPROB = -0.25


class Instant(Executor):
    """Each request gets one of the token sequences in `additional_config["answers"]`, chosen by its prompt and seed.

    `additional_config["step_s"]`: seconds that a step takes, 0 if not given.
    """

    supported_tasks = ("generate",)

    def _init_executor(self) -> None:
        self._answers: list[list[int]] = self.vllm_config.additional_config["answers"]
        self._step_s = float(self.vllm_config.additional_config.get("step_s", 0.0))
        self._prompt_left: dict[str, int] = {}  # tokens of the prompt not read yet
        self._left: dict[str, Iterator[int]] = {}  # of the answer
        self._output: ModelRunnerOutput | None = None

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        return [{"layer": FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)}]

    def determine_available_memory(self) -> list[int]:
        return [CACHE_BYTES]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["NHD"]]

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Asks workers, of which there are none: set-up and caches."""
        return []

    def check_health(self) -> None: ...

    def shutdown(self) -> None: ...

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        for new in scheduler_output.scheduled_new_reqs:
            self._prompt_left[new.req_id] = len(new.prompt_token_ids or ()) - new.num_computed_tokens
            seed = new.sampling_params.seed if new.sampling_params else None
            place = zlib.crc32(repr((new.prompt_token_ids, seed)).encode()) % len(self._answers)
            self._left[new.req_id] = iter(self._answers[place])
        for name in scheduler_output.finished_req_ids:
            self._prompt_left.pop(name, None)
            self._left.pop(name, None)
        time.sleep(self._step_s)
        names, tokens = list(scheduler_output.num_scheduled_tokens), []
        for name, count in scheduler_output.num_scheduled_tokens.items():
            left = self._prompt_left[name] = max(0, self._prompt_left[name] - count)
            tokens.append([] if left else [next(self._left[name], 0)])  # one more may be asked for behind the end
        taken = np.array([[one[0] if one else 0] for one in tokens], dtype=np.int32).reshape(-1, 1)
        logprobs = np.full(taken.shape, LOGPROB, dtype=np.float32)
        self._output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=tokens,
            logprobs=LogprobsLists(taken, logprobs, np.zeros(len(names), dtype=np.int32)),
        )
        return _answer(None if names else self._output, non_block)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        return _answer(self._output, non_block)


def _answer(value: Any, non_block: bool) -> Any:
    if not non_block:
        return value
    future: Future[Any] = Future()
    future.set_result(value)
    return future
