"""Last-token states of prompts, read by transformers in batches; what a problem's prompts begin with is run once."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, DynamicCache

from fractal import console
from fractal.critic.prompt import TokenizedPrompt
from fractal.errors import OutsideError
from fractal.generate.memory import is_out_of_memory
from fractal.generate.models import preferred_dtype
from fractal.install import gpu
from fractal.records import task_order

BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}  # padded tokens in one forward pass; out of memory, halved
HALVINGS = 4


def device() -> str:
    return "cuda" if gpu.usable() else "cpu"


def load_model(path: Path, dtype: str | None = None) -> Any:
    """The model without its output layer, for reading; bfloat16 where the hardware computes in it."""
    return AutoModel.from_pretrained(path, dtype=getattr(torch, dtype or preferred_dtype())).to(device()).eval()


@torch.inference_mode()
def read(
    model: Any,
    prompts: list[TokenizedPrompt],
    layers: list[int],
    pad: int,
    batch_tokens: int | None = None,
    across: bool | None = None,
) -> Iterator[tuple[list[TokenizedPrompt], torch.Tensor]]:
    """Yields batches of prompts with their last-token states (B, layers, D), float32 and after the model's last norm.

    The tokens that the prompts of one problem begin with are run once. `across`: problems share forward passes of
    `batch_tokens` padded tokens; by default on a GPU only, since a CPU would pay for the padding. When memory runs out,
    batches are halved, HALVINGS times. Raises OutsideError after that.
    """
    device_type = torch.device(model.device).type
    tokens = initial = batch_tokens or BATCH_TOKENS[device_type]
    across = device_type != "cpu" if across is None else across
    left = {prompt.key: prompt for prompt in prompts}
    while left:
        try:
            for batch, states in _passes(model, list(left.values()), layers, pad, tokens, across):
                for prompt in batch:
                    del left[prompt.key]
                yield batch, states
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if tokens <= initial >> HALVINGS:
                longest = max(len(prompt.token_ids) for prompt in left.values())
                raise OutsideError(
                    f"out of memory while reading programs of up to {longest} tokens, also with batches of {tokens} "
                    "tokens. Take a smaller --base, or a machine with more memory."
                ) from error
            tokens //= 2
            console.warn(f"out of memory: going on with batches of {tokens} tokens")


Prefixed = tuple[int, list[TokenizedPrompt]]  # a problem's prompts, and how many tokens all of them begin with


def _passes(
    model: Any, prompts: list[TokenizedPrompt], layers: list[int], pad: int, batch_tokens: int, across: bool
) -> Iterator[tuple[list[TokenizedPrompt], torch.Tensor]]:
    problems: list[Prefixed] = []
    ordered = sorted(prompts, key=lambda prompt: (task_order(prompt.task_id), len(prompt.token_ids)))
    for _, group in groupby(ordered, key=lambda prompt: prompt.task_id):
        of_problem = list(group)
        problems.append((_common(of_problem) if len(of_problem) > 1 else 0, of_problem))
    for block in blocks(problems, batch_tokens) if across else [[problem] for problem in problems]:
        yield from _block(model, block, layers, pad, batch_tokens)


def blocks(problems: list[Prefixed], batch_tokens: int) -> list[list[Prefixed]]:
    """Problems whose prefixes are run together: like lengths, `batch_tokens` padded tokens; those without one apart."""
    result: list[list[Prefixed]] = []
    for shared, prompts in sorted(problems, key=lambda problem: problem[0]):
        new = not result or (shared > 0 and (result[-1][0][0] == 0 or shared * (len(result[-1]) + 1) > batch_tokens))
        if new:
            result.append([])
        result[-1].append((shared, prompts))
    return result


def _block(
    model: Any, block: list[Prefixed], layers: list[int], pad: int, batch_tokens: int
) -> Iterator[tuple[list[TokenizedPrompt], torch.Tensor]]:
    """First all prefixes, padded on the right; then the rest of each prompt, with its problem's keys and values."""
    longest = max(shared for shared, _ in block)
    prefixes = DynamicCache()
    if longest:
        tokens = _padded([prompts[0].token_ids[:shared] for shared, prompts in block], pad).to(model.device)
        model(tokens, past_key_values=prefixes, use_cache=True)  # no mask: no token attends to what follows it
    rows = [(prompt, number, shared) for number, (shared, prompts) in enumerate(block) for prompt in prompts]
    rows.sort(key=lambda row: len(row[0].token_ids) - row[2])
    for part in batches([len(prompt.token_ids) - shared for prompt, _, shared in rows], batch_tokens):
        batch = [prompt for prompt, _, _ in rows[part]]
        tails = _padded([prompt.token_ids[shared:] for prompt, _, shared in rows[part]], pad)  # (B, T)
        last = torch.tensor([len(prompt.token_ids) - shared - 1 for prompt, _, shared in rows[part]])
        options: dict[str, Any] = {"past_key_values": DynamicCache(), "use_cache": False}
        if longest:
            begins = torch.tensor([shared for _, _, shared in rows[part]])[:, None]
            mask = [torch.arange(longest)[None] < begins, torch.arange(tails.shape[1])[None] <= last[:, None]]
            options = {
                "past_key_values": _rows_of(prefixes, torch.tensor([number for _, number, _ in rows[part]])),
                "use_cache": True,
                "attention_mask": torch.cat(mask, dim=1).long().to(model.device),
                "position_ids": (begins + torch.arange(tails.shape[1])[None]).to(model.device),
            }
        hidden = model(tails.to(model.device), output_hidden_states=True, **options).hidden_states
        top = len(hidden) - 1
        states = []
        for layer in layers:
            state = hidden[layer][torch.arange(len(batch)), last]  # (B, D)
            states.append(state if layer == top else model.norm(state))  # the last layer's is normalised already
        yield batch, torch.stack(states, dim=1).float()


def _padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    """(B, T), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)


def _rows_of(cache: DynamicCache, numbers: torch.Tensor) -> DynamicCache:
    """A new cache with the keys and values of some rows: the model appends to it."""
    result = DynamicCache()
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        rows = numbers.to(layer.keys.device)
        result.update(layer.keys[rows], layer.values[rows], number)
    return result


def _common(prompts: list[TokenizedPrompt]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left over."""
    shortest = min(len(prompt.token_ids) for prompt in prompts) - 1
    first = prompts[0].token_ids
    return next((i for i in range(shortest) if any(p.token_ids[i] != first[i] for p in prompts)), shortest)


def batches(lengths: list[int], batch_tokens: int) -> list[slice]:
    """Slices of rising `lengths`: each of at most `batch_tokens` padded tokens, and of at least one prompt."""
    result: list[slice] = []
    begin = 0
    for end, length in enumerate(lengths):
        if end > begin and length * (end + 1 - begin) > batch_tokens:
            result.append(slice(begin, end))
            begin = end
    return [*result, slice(begin, len(lengths))] if lengths else []
