"""Stands for the pipeline in tests of jobs: `run --run DIR --stage S --model M --n N [--seed HOW]`, resumable like it.

It writes N samples, a line each, 20 a second; HOW makes it fail as the real one may.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

words = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=False))
folder, n, how = Path(words["--run"]), int(words["--n"]), int(words.get("--seed", "0"))
print(
    "begin",
    os.getuid(),
    os.environ["FRACTAL_PRICE_USD_PER_HOUR"],
    os.path.exists(os.environ["FRACTAL_SOCKET"]),
    os.environ.get("LD_LIBRARY_PATH", "-"),
    flush=True,
)
token = Path(os.environ.get("HF_TOKEN_PATH", "/run/secrets/hf_token"))
print("token", hashlib.sha256(token.read_bytes()).hexdigest() if token.exists() else "none", flush=True)
for name in ("huggingface/weights", "kernels"):  # of the cache
    kept = Path("/cache", name)
    print(name, kept.read_text() if kept.exists() else "none", flush=True)
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
manifest = folder / "manifest.json"
if not manifest.exists():
    start_up = {"weights_seconds": 0.5, "load_seconds": 0.1, "first_sample_at": time.time() + 1}
    stages = {"generate": {"seconds": n / 20, "start_up": start_up}}
    manifest.write_text(json.dumps({"created": str(time.time()), "stages": stages}))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
samples = folder / "samples.jsonl"
done = len(samples.read_text().splitlines()) if samples.exists() else 0
for i in range(done, n):
    with samples.open("a") as file:
        file.write(json.dumps({"sample_id": i}) + "\n")
    print("sample", i, flush=True)
    time.sleep(0.05)
    if i == n // 2 and how == 1:
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", file=sys.stderr)
        sys.exit(1)
    if i == n // 2 and how == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if i == n // 2 and how == 3:
        print("ModuleNotFoundError: No module named 'vllm'", file=sys.stderr)
        sys.exit(1)
(folder / "critic/epoch-1").mkdir(parents=True, exist_ok=True)
(folder / "critic/epoch-1/head.safetensors").write_bytes(bytes(range(256)) * 64)
print("end", flush=True)
