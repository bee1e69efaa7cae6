"""Decoding by a server that speaks OpenAI's HTTP interface: vLLM's own, or anybody's. Needs no GPU and no torch.

With a tokenizer, prompts are rendered here, with the opened fence, and continued by `/v1/completions`: the samples are
those of the offline engines. Without one, the question goes to `/v1/chat/completions`: the server's chat template, no
fence, and no stop text, because the first fence of a chat reply opens the program.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import msgspec
import openai

from fractal.errors import InputError, OutsideError
from fractal.generate import prompts
from fractal.generate.stage import Completion, Request, Sampling, Served, never

RETRIES = 8  # of 429, 5xx, timeouts and broken connections, with backoff; a Retry-After up to two minutes is heard
GARBLED = 3  # answers in a row that are no completion
TIMEOUT_S = 600.0  # of one completion
MOST_STOPS = 4  # OpenAI's limit, and vLLM's server's; the rest is cut off here, after it was drawn
LOOK_S = 0.2  # between looks at whether to stop


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] | None = None  # of /completions
    content: list[dict[str, Any]] | None = None  # of /chat/completions


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    text: str | None = None
    message: _Message | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class OpenAiEngine:
    """One served model. Never more than `served.concurrency` requests are in flight."""

    def __init__(self, model: str, sampling: Sampling, served: Served, retries: int = RETRIES) -> None:
        self._model, self._sampling, self._served = model, sampling, served
        self._client = openai.OpenAI(
            base_url=served.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # a local server wants none, the client wants one
            max_retries=retries,
            timeout=openai.Timeout(TIMEOUT_S, connect=10.0),
        )

    def check(self) -> None:
        """Before anything is drawn: does the server answer, take the key and know the model?

        Raises OutsideError, or InputError for an unknown model. A server that has no list of models passes.
        """
        try:
            names = [m.id for m in self._client.with_options(max_retries=2, timeout=20.0).models.list().data]
        except openai.NotFoundError:
            return
        except Exception as error:
            raise self._explain(error) from error
        if names and self._model not in names:
            raise InputError(f"--model {self._model}: {self._served.base_url} serves {', '.join(names[:20])}.")

    def close(self) -> None:
        self._client.close()

    def generate(self, requests: list[Request], stopped: Callable[[], bool] = never) -> Iterator[list[Completion]]:
        waiting = iter(requests)
        flying: set[Future[Completion]] = set()
        pool = ThreadPoolExecutor(self._served.concurrency, "request")
        try:
            while True:
                while len(flying) < self._served.concurrency and (request := next(waiting, None)) is not None:
                    flying.add(pool.submit(self._draw, request))
                if not flying:
                    return
                ended, flying = wait(flying, timeout=LOOK_S, return_when=FIRST_COMPLETED)
                if good := [one.result() for one in ended if one.exception() is None]:
                    yield good
                for one in ended:
                    if (error := one.exception()) is not None:
                        raise self._explain(error) from error
                if stopped():
                    if late := [one.result() for one in flying if one.done() and one.exception() is None]:
                        yield late
                    return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._client.close()  # what is in flight ends

    def _draw(self, request: Request) -> Completion:
        for _ in range(GARBLED - 1):
            try:
                return self._ask(request)
            except msgspec.MsgspecError:
                continue
        return self._ask(request)

    def _ask(self, request: Request) -> Completion:
        """One request. Raises openai.OpenAIError, or MsgspecError for an answer that is no completion."""
        sampling = self._sampling
        shared: dict[str, Any] = {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": request.seed,
        }
        if self._served.tokenizer:
            raw = self._client.completions.with_raw_response.create(
                prompt=request.text, stop=prompts.STOPS[:MOST_STOPS], logprobs=1, **shared
            )
        else:
            raw = self._client.chat.completions.with_raw_response.create(
                messages=[{"role": "user", "content": request.text}], logprobs=True, **shared
            )
        return completion(request, raw.content, stops=prompts.STOPS if self._served.tokenizer else [])

    def _explain(self, error: BaseException) -> InputError | OutsideError:
        """One line: what happened, and what to do."""
        url, kept = self._served.base_url, "What was finished is kept; the same command goes on."
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return OutsideError(f"{url} refuses the key ({error.status_code}). Set OPENAI_API_KEY. {kept}")
        if isinstance(error, openai.NotFoundError):
            form = "/completions" if self._served.tokenizer else "/chat/completions"
            return InputError(
                f"--model {self._model}: {url} does not know it, or has no {form}: {_said(error)}. See {url}/models."
            )
        if isinstance(error, openai.RateLimitError | openai.InternalServerError):
            return OutsideError(f"{url} keeps refusing ({error.status_code}: {_said(error)}). Wait a little. {kept}")
        if isinstance(error, openai.APIStatusError):
            return InputError(f"{url} refuses the request ({error.status_code}): {_said(error)}. {kept}")
        if isinstance(error, openai.APIConnectionError):  # timeouts are among these
            return OutsideError(f"{url} does not answer: {_said(error)} Is it running, and is --base-url right? {kept}")
        if isinstance(error, msgspec.MsgspecError):
            return OutsideError(
                f"{url} gives answers that are no completions ({error}). Is it OpenAI-compatible? {kept}"
            )
        return OutsideError(f"{url}: {type(error).__name__}: {_said(error)}. {kept}")


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def completion(request: Request, data: bytes, stops: list[str]) -> Completion:
    """A server's answer, of either form. Raises MsgspecError for one that is not as it should be.

    The text is cut at the first of `stops`, also where the server did not. Without log-probabilities for every token
    their sum is None.
    """
    answer = msgspec.json.decode(data, type=_Answer)
    if not answer.choices:
        raise msgspec.ValidationError("no choices")
    choice = answer.choices[0]
    text = choice.text if choice.message is None else choice.message.content or ""
    if text is None:
        raise msgspec.ValidationError("no text")
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)
    logprobs = _logprobs(choice.logprobs)
    tokens = answer.usage.completion_tokens if answer.usage else len(logprobs or [])
    return Completion(
        request=request,
        text=text if cut < 0 else text[:cut],
        stopped=cut >= 0 or choice.finish_reason == "stop",
        tokens=tokens,
        sum_logprob=None if logprobs is None or len(logprobs) != tokens else sum(logprobs),
    )


def _logprobs(given: _Logprobs | None) -> list[float] | None:
    """Of every token; None if one is missing or is no number."""
    if given is None:
        return None
    values = given.token_logprobs or [token.get("logprob") for token in given.content or []]
    found = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return found if found and len(found) == len(values) else None
