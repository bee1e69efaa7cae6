"""Starts our engine or scorer in the CUDA image on a stand-in GPU, draws or scores, and prints what was compiled, as JSON.

    start.py 80|86|89|90|100 generate|pooling

Two things only a GPU can do and are left out: CUDA graphs, which compile nothing, and inductor's timing of its kernels.
"""

import collections
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
# What is compiled for the GPU cannot be kept and loaded on this machine by vLLM; Triton's and inductor's caches are on.
os.environ |= {"VLLM_DISABLE_COMPILE_CACHE": "1", "VLLM_USE_AOT_COMPILE": "0", "VLLM_USE_MEGA_AOT_ARTIFACT": "0"}
programs: collections.Counter[str] = collections.Counter()
sys.addaudithook(
    lambda event, arguments: programs.update([Path(str(arguments[0])).name]) if event == "subprocess.Popen" else None
)

import stand_in_gpu  # noqa: E402

CAPABILITY, RUNNER = int(sys.argv[1]), sys.argv[2]
stand_in_gpu.insert(CAPABILITY)

from fractal.install import gpu  # noqa: E402

gpu.usable = lambda: True  # NVML has no stand-in

import triton  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from vllm.v1.sample.ops.topk_topp_sampler import flashinfer_sampler_supported  # noqa: E402
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment  # noqa: E402

from fractal.critic import vllm_pooling  # noqa: E402
from fractal.generate.engine import Request, Sampling  # noqa: E402
from fractal.generate.vllm import VllmEngine  # noqa: E402

# Qwen2.5-Coder-1.5B's shape with one layer, since all are compiled alike.
SHAPE = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 1, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "hidden_act": "silu", "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "generate": {"architectures": ["Qwen2ForCausalLM"]},
    "pooling": {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1},
}


class StandInWorker(Worker):
    """vLLM's own, with its tensors in this machine's memory."""

    def init_device(self) -> None:
        self.device = stand_in_gpu.torch.device("cpu")
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        self._init_workspace_and_model_runner()

    def determine_available_memory(self) -> int:
        self.model_runner.profile_run()
        return 1 << 30


def model() -> str:
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(SHAPE | KINDS[RUNNER]))
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(folder)


def main() -> None:
    kernels: dict[str, Any] = {}

    def compiled(src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        cubin = any(name.endswith(".cubin") for name in metadata_group)
        kernels[src.name] = [metadata["target"].arch if isinstance(metadata, dict) else metadata.target.arch, cubin]

    triton.knobs.compilation.listener = compiled
    options: dict[str, Any] = {
        "load_format": "dummy",
        "worker_cls": "__main__.StandInWorker",
        "compilation_config": {"cudagraph_mode": "NONE", "inductor_compile_config": {"benchmark_combo_kernel": False}},
    }
    tokens = list(range(5, 25))
    if RUNNER == "generate":
        sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=4)
        engine = VllmEngine(Path(model()), sampling, "bfloat16", 1024, options=options)
        requests = [Request(1, i, tokens, i) for i in range(4)]
        outputs = sum(len(done) for done in engine.generate(requests))
    else:
        vllm_pooling.LLM = functools.partial(vllm_pooling.LLM, **options)  # type: ignore[misc]
        scorer = vllm_pooling.PoolingEngine(Path(model()), "bfloat16", 1000)
        outputs = len(list(scorer.logits([tokens] * 4)))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(
        json.dumps(
            {
                "uid": os.getuid(),
                "capabilities": int(status["CapEff"], 16),
                "outputs": outputs,
                "sampler": flashinfer_sampler_supported(),
                "kernels": kernels,
                "cubins": len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))),
                "precompiled": sorted(stand_in_gpu.asked),
                "programs": programs,
            }
        ),
        flush=True,
    )
    os._exit(0)  # what ends the engine would end a GPU


if __name__ == "__main__":
    main()
