"""Decoding by a server that speaks OpenAI's HTTP interface: vLLM's own, or any other. Needs no GPU and no torch.

With a tokenizer, prompts are rendered here, with the opened fence, and continued by `/v1/completions`: the samples are
those of the offline engines. Without one, the question goes to `/v1/chat/completions`: the server's chat template, no
fence, and no stop text, because the first fence of a chat reply opens the program.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import msgspec
import openai

from fractal.errors import InputError, OutsideError
from fractal.generate import prompts
from fractal.generate.engine import Completion, Request, Sampling, Server, never_stop

RETRIES = 8  # of 429, 5xx, timeouts and broken connections, with backoff; Retry-After is respected up to two minutes
INVALID_ANSWERS = 3  # in a row, to one request, before it fails
TIMEOUT_S = 600.0  # of one completion
SERVER_STOPS = 4  # OpenAI's limit, and vLLM's server's; the other stops cut the text here, after it was drawn
POLL_S = 0.2  # between two calls of should_stop


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] | None = None  # of /completions
    content: list[dict[str, Any]] | None = None  # of /chat/completions
    tokens: list[str] | None = None  # of /completions


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
    """One served model. Never more than `server.concurrency` requests are in flight."""

    def __init__(self, model: str, sampling: Sampling, server: Server, retries: int = RETRIES) -> None:
        self._model, self._sampling, self._server = model, sampling, server
        self._client = openai.OpenAI(
            base_url=server.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # the client needs one, a local server does not
            max_retries=retries,
            timeout=openai.Timeout(TIMEOUT_S, connect=10.0),
        )

    def check(self) -> None:
        """Ask the server for its models, before anything is drawn: does it answer, take the key and have the model?

        Raises OutsideError, or InputError for an unknown model. A server that has no list of models passes.
        """
        try:
            names = [m.id for m in self._client.with_options(max_retries=2, timeout=20.0).models.list().data]
        except openai.NotFoundError:
            return
        except Exception as error:
            raise self._convert_error(error) from error
        if names and self._model not in names:
            raise InputError(f"--model {self._model}: {self._server.base_url} serves {', '.join(names[:20])}.")

    def close(self) -> None:
        self._client.close()

    def generate(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]:
        waiting = iter(requests)
        in_flight: set[Future[Completion]] = set()
        pool = ThreadPoolExecutor(self._server.concurrency, "request")
        try:
            while True:
                while len(in_flight) < self._server.concurrency and (request := next(waiting, None)) is not None:
                    in_flight.add(pool.submit(self._draw, request))
                if not in_flight:
                    return
                ended, in_flight = wait(in_flight, timeout=POLL_S, return_when=FIRST_COMPLETED)
                if completions := _successful(ended):
                    yield completions
                for future in ended:
                    if (error := future.exception()) is not None:
                        raise self._convert_error(error) from error
                if should_stop():
                    if completions := _successful({future for future in in_flight if future.done()}):
                        yield completions
                    return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._client.close()  # ends the requests in flight

    def _draw(self, request: Request) -> Completion:
        for _ in range(INVALID_ANSWERS - 1):
            try:
                return self._send(request)
            except msgspec.MsgspecError:
                continue
        return self._send(request)

    def _send(self, request: Request) -> Completion:
        """One request. Raises openai.OpenAIError, or MsgspecError for an answer that is no completion."""
        sampling = self._sampling
        parameters: dict[str, Any] = {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": request.seed,
        }
        if not self._server.tokenizer:
            answer = self._client.chat.completions.with_raw_response.create(
                messages=[{"role": "user", "content": request.text}], logprobs=True, **parameters
            )
            return parse_answer(request, answer.content, cut=False)
        answer = self._client.completions.with_raw_response.create(
            prompt=request.text, stop=prompts.STOPS[:SERVER_STOPS], logprobs=1, **parameters
        )
        return parse_answer(request, answer.content, cut=True)

    def _convert_error(self, error: BaseException) -> InputError | OutsideError:
        """The error of the openai package as ours, with the remedy."""
        url, kept = self._server.base_url, "Finished samples are kept; the same command goes on."
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return OutsideError(f"{url} refuses the key ({error.status_code}). Set OPENAI_API_KEY. {kept}")
        if isinstance(error, openai.NotFoundError):
            path = "/completions" if self._server.tokenizer else "/chat/completions"
            return InputError(
                f"--model {self._model}: {url} does not know it, or has no {path}: {_line(error)}. See {url}/models."
            )
        if isinstance(error, openai.RateLimitError | openai.InternalServerError):
            return OutsideError(f"{url} keeps refusing ({error.status_code}: {_line(error)}). Wait a little. {kept}")
        if isinstance(error, openai.APIStatusError):
            return InputError(f"{url} refuses the request ({error.status_code}): {_line(error)}. {kept}")
        if isinstance(error, openai.APIConnectionError):  # timeouts are among these
            return OutsideError(f"{url} does not answer: {_line(error)} Is it running, and is --base-url right? {kept}")
        if isinstance(error, msgspec.MsgspecError):
            return OutsideError(
                f"{url} gives answers that are no completions ({error}). Is it OpenAI-compatible? {kept}"
            )
        return OutsideError(f"{url}: {type(error).__name__}: {_line(error)}. {kept}")


def _successful(futures: set[Future[Completion]]) -> list[Completion]:
    return [future.result() for future in futures if future.exception() is None]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def parse_answer(request: Request, data: bytes, *, cut: bool) -> Completion:
    """The completion in a server's answer of either form. Raises MsgspecError for one that is not as it should be.

    With `cut`, the text ends at the first of prompts.STOPS, also where the server does not know that stop. Tokens and
    log-probability are then those up to the token that completes the stop, as the offline engines count them. Where the
    answer does not show which tokens these are, the number is the server's and the log-probability None. It is None as
    well where a token has none.
    """
    answer = msgspec.json.decode(data, type=_Answer)
    if not answer.choices:
        raise msgspec.ValidationError("no choices")
    choice = answer.choices[0]
    text = choice.text if choice.message is None else choice.message.content or ""
    if text is None:
        raise msgspec.ValidationError("no text")
    logprobs = _logprobs(choice.logprobs)
    tokens = answer.usage.completion_tokens if answer.usage else len(logprobs or [])
    if logprobs is not None and len(logprobs) != tokens:
        logprobs = None
    stop = prompts.find_stop(text) if cut else None
    if stop is not None:
        kept = _tokens_through(text[: stop.end], choice.logprobs)
        logprobs = logprobs[:kept] if logprobs and kept else None
        tokens = kept or tokens
    return Completion(
        request=request,
        text=text if stop is None else text[: stop.start],
        stopped=stop is not None or choice.finish_reason == "stop",
        tokens=tokens,
        sum_logprob=None if logprobs is None else sum(logprobs),
    )


def _logprobs(answer: _Logprobs | None) -> list[float] | None:
    """Of every token; None if one is missing or is no number."""
    if answer is None:
        return None
    values = answer.token_logprobs or [token.get("logprob") for token in answer.content or []]
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return numbers if numbers and len(numbers) == len(values) else None


def _tokens_through(text: str, answer: _Logprobs | None) -> int | None:
    """How many tokens it takes to write all of `text`; None where the tokens' own texts do not show it."""
    written = ""
    for count, token in enumerate(answer.tokens if answer and answer.tokens else [], 1):
        written += token
        if len(written) >= len(text):
            return count if written.startswith(text) else None
    return None
