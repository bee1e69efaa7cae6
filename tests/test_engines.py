"""What the offline engines promise: a sample is its seed's, whatever the batch; one step down; stopped, none is lost."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.errors import InputError, OutsideError
from fractal.generate.engine import Request, Sampling, Server
from fractal.generate.prompts import build_requests, load_tokenizer
from fractal.problems.sets import load
from tests.conftest import ROOT

torch = pytest.importorskip("torch")
TOKENS = 12


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=9), st.floats(0.01, 1.0))
@settings(deadline=None)
def test_the_nucleus_is_the_smallest_set_with_its_probability(logits: list[float], top_p: float) -> None:
    from fractal.generate.transformers import nucleus

    kept = torch.isfinite(nucleus(torch.tensor([logits, logits]), top_p))[0].tolist()
    shares = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    mass = sum(s for s, k in zip(shares, kept, strict=True) if k)
    least = min(s for s, k in zip(shares, kept, strict=True) if k)
    assert mass >= top_p - 1e-5
    assert mass - least < top_p + 1e-5, "one fewer would not do"
    assert all(s <= least + 1e-6 for s, k in zip(shares, kept, strict=True) if not k)


def asked(path: Path, count: int = 5, problems: int = 2) -> list[Request]:
    chosen = load("starter", "test", problems).problems
    return list(build_requests(chosen, load_tokenizer(str(path)), 4096, Sampling(count, max_tokens=TOKENS), {}))


@pytest.fixture(scope="module")
def decoder(small_model: Path) -> Any:
    from fractal.generate.transformers import TransformersEngine

    return TransformersEngine(small_model, Sampling(max_tokens=TOKENS), "float32", 200, 4)


def draw(
    engine: Any, requests: Iterable[Request], size: int, **more: Any
) -> dict[tuple[int, int], tuple[str, int, float]]:
    engine.batch, engine._halved = size, False
    found = [c for done in engine.generate(requests, **more) for c in done]
    keys = {(c.request.task_id, c.request.sample_id): (c.text, c.tokens, round(c.sum_logprob, 3)) for c in found}
    assert len(keys) == len(found)
    return keys


@pytest.mark.model
def test_the_batch_does_not_change_the_samples(decoder: Any, small_model: Path) -> None:
    requests = asked(small_model)
    alone, together = draw(decoder, iter(requests), 1), draw(decoder, requests[::-1], 8)
    assert alone == together
    assert len({text for text, _, _ in alone.values()}) > 2, "seeds make a difference"
    assert all(0 < tokens <= TOKENS and logprob < 0 for _, tokens, logprob in alone.values())


@pytest.mark.model
def test_one_step_down_and_then_one_line(decoder: Any, small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    requests, decode = asked(small_model, 3, 1), type(decoder)._decode
    sizes: list[int] = []

    def limited(self: Any, part: list[Request], stopped: Any) -> Any:
        sizes.append(len(part))
        if len(part) > most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return decode(self, part, stopped)

    monkeypatch.setattr(type(decoder), "_decode", limited)
    most = 2
    assert len(draw(decoder, requests, 4)) == 3
    assert sizes == [3, 2, 1]
    assert "out of memory; goes on with 2 samples at once" in capsys.readouterr().err
    most = 1
    with pytest.raises(OutsideError, match=r"out of memory with 2 samples at once .*--batch"):
        draw(decoder, requests, 4)


@pytest.mark.model
def test_stopped_in_mid_batch_the_rows_that_ended_are_kept(
    decoder: Any, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row's stop text comes early; the engine is stopped after a few more steps."""
    monkeypatch.setattr(decoder, "_sampling", Sampling(max_tokens=80))
    requests, steps = asked(small_model, 6, 1), [0]
    whole = draw(decoder, requests, 6)
    first, *_, last = sorted(tokens for _, tokens, _ in whole.values())
    assert first < last

    def stopped() -> bool:
        steps[0] += 1
        return steps[0] > first  # once before the batch, then once a step: it ends after `first` tokens

    kept = draw(decoder, requests, 6, should_stop=stopped)
    assert kept
    assert kept == {key: one for key, one in whole.items() if one[1] <= first}


VLLM = """
import json, sys
from pathlib import Path
from fractal.generate.vllm import VllmEngine
from fractal.generate.engine import Sampling
from tests.test_engines import TOKENS, asked
path = Path(sys.argv[1])
requests = asked(path)
engine = VllmEngine(path, Sampling(max_tokens=TOKENS), "float32", 400, 4)

def draw():
    return sorted((c.request.task_id, c.request.sample_id, c.text) for d in engine.generate(requests) for c in d)

before = draw()
core, calls = engine._llm.llm_engine.engine_core, []
real = core.get_output

def step():
    calls.append(1)
    if len(calls) == 20:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")
    return real()

core.get_output = step
after = draw()
print("RESULT", json.dumps([len(before), before == after, engine.batch, len(calls)]))
count = []
few = [c for d in engine.generate(requests, lambda: len(count) > 3) for c in d if not count.append(1)]
print("RESULT", json.dumps([len(few)]))
"""


@pytest.mark.model
@pytest.mark.long
def test_vllm_steps_down_and_draws_the_same(small_model: Path) -> None:
    """Memory runs out in mid-run: the engine is made anew with half as many at once, and every sample is its seed's."""
    pytest.importorskip("vllm")
    import json

    done = subprocess.run([sys.executable, "-c", VLLM, str(small_model)], cwd=ROOT, capture_output=True, text=True, timeout=500)  # fmt: skip
    first, second = (json.loads(x.partition(" ")[2]) for x in done.stdout.splitlines() if x.startswith("RESULT")) if not done.returncode else ([done.stderr[-2000:]], [])  # fmt: skip
    assert first == [10, True, 2, 20]
    assert 4 <= second[0] < 10


def test_settings_of_a_server_are_checked() -> None:
    for wrong in ({"base_url": ""}, {"base_url": "ftp://x"}, {"base_url": "http://x", "concurrency": 0}):
        with pytest.raises(InputError, match=r"--base-url|--concurrency"):
            Server(**wrong)  # type: ignore[arg-type]
    assert dataclasses.asdict(Server("http://x/v1"))["concurrency"] == 32
