"""A planned step as arrays: what the model computes, and how the next tokens are chosen."""

from array import array
from collections.abc import Collection

import numpy as np

from halve.engine.scheduler import Chunk, Step
from halve.engine.sequence import Sequence
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Ragged, SamplingBatch

_TINY, _HUGE = np.finfo(np.float32).tiny, np.finfo(np.float32).max


def token_batch(step: Step, block_size: int) -> tuple[TokenBatch, Array]:
    """The chunks of a step that was just planned, as one flat batch over the paged cache, and the rows to sample.

    Rows int32 [R]: the last token of each chunk that leaves nothing pending, once for each sequence that samples from
    it. A token that is still in flight is -1 - r, r its row in the step before; only a runner that has that step's
    tokens at hand can be given such a batch.
    """
    chunks = step.chunks
    counts = np.fromiter([chunk.num_tokens for chunk in chunks], np.int32, len(chunks))
    starts = np.fromiter([chunk.start for chunk in chunks], np.int32, len(chunks))
    cu_seqlens = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(counts, out=cu_seqlens[1:])
    widths = -(-(starts + counts) // block_size)
    block_tables = np.full((len(chunks), int(widths.max())), -1, np.int32)
    token_ids = array("i")
    rows = []
    for i, (chunk, width) in enumerate(zip(chunks, widths.tolist(), strict=True)):
        block_tables[i, :width] = chunk.sequence.blocks[:width]
        _append_tokens(token_ids, chunk)
        if chunk.sampled:
            rows += [len(token_ids) - 1] * len(chunk.sampled)
    positions = np.arange(len(token_ids), dtype=np.int32)
    positions += np.repeat(starts - cu_seqlens[:-1], counts)
    of = np.repeat(np.arange(len(chunks)), counts)
    slots = block_tables[of, positions // block_size] * np.int32(block_size) + positions % np.int32(block_size)
    batch = TokenBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        cu_seqlens=cu_seqlens,
        slot_mapping=slots,
        block_tables=block_tables,
    )
    return batch, np.array(rows, np.int32)


def _append_tokens(token_ids: "array[int]", chunk: Chunk) -> None:
    known = chunk.sequence.token_ids
    if chunk.num_tokens == 1 and chunk.start < len(known):
        token_ids.append(known[chunk.start])
        return
    token_ids.extend(known[chunk.start : chunk.end])
    if chunk.end > len(known):
        token_ids.append(-1 - chunk.source)


def sampling_batch(step: Step, eos_token_ids: Collection[int] = ()) -> SamplingBatch:
    """How each row of a step is sampled. eos_token_ids: what `min_tokens` forbids, with a request's stop tokens.

    Penalties count the tokens that are known; a token in flight is not among them.
    """
    rows = [(sequence, chunk.end - sequence.num_prompt_tokens) for chunk in step.chunks for sequence in chunk.sampled]
    if all(_is_plain(sequence, generated) for sequence, generated in rows):
        return SamplingBatch.greedy(len(rows))
    params = [sequence.request.sampling for sequence, _ in rows]
    columns = np.array([(p.temperature, p.top_p, p.min_p, p.typical_p) for p in params])
    penalties = np.array([(p.presence_penalty, p.frequency_penalty, p.repetition_penalty) for p in params])
    penalized = [_is_penalized(sequence) for sequence, _ in rows]
    prompts, answers = _histories([sequence for sequence, _ in rows], penalized) if any(penalized) else (None, None)
    bias_tokens, bias_values = _biases(rows, eos_token_ids)
    return SamplingBatch.of(
        len(rows),
        temperature=np.minimum(columns[:, 0], _HUGE),
        top_k=[p.top_k for p in params],
        top_p=np.maximum(columns[:, 1], _TINY),
        min_p=columns[:, 2],
        typical_p=np.maximum(columns[:, 3], _TINY),
        seed=np.array([sequence.seed for sequence, _ in rows], np.uint64),
        step=[generated for _, generated in rows],
        presence_penalty=penalties[:, 0],
        frequency_penalty=penalties[:, 1],
        repetition_penalty=penalties[:, 2],
        num_logprobs=[-1 if p.logprobs is None else p.logprobs for p in params],
        prompt_tokens=prompts,
        output_tokens=answers,
        bias_tokens=bias_tokens,
        bias_values=bias_values,
    )


def _is_plain(sequence: Sequence, generated: int) -> bool:
    """Whether the next token is the likeliest, and nothing else is asked."""
    p = sequence.request.sampling
    if p.temperature or p.logprobs is not None or p.logit_bias or generated < p.min_tokens:
        return False
    return not _is_penalized(sequence)


def _is_penalized(sequence: Sequence) -> bool:
    p = sequence.request.sampling
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1)


def _histories(sequences: list[Sequence], wanted: list[bool]) -> tuple[Ragged, Ragged]:
    """Prompt and answer of each row that a penalty acts on; nothing for the others."""
    none = array("i")
    prompts, answers = [], []
    for sequence, needed in zip(sequences, wanted, strict=True):
        prompts.append(sequence.token_ids[: sequence.num_prompt_tokens] if needed else none)
        answers.append(sequence.token_ids[sequence.num_prompt_tokens :] if needed else none)
    return Ragged.of(prompts), Ragged.of(answers)


def _biases(rows: list[tuple[Sequence, int]], eos_token_ids: Collection[int]) -> tuple[Ragged | None, Array | None]:
    biases = []
    for sequence, generated in rows:
        p = sequence.request.sampling
        bias = dict(p.logit_bias)
        if generated < p.min_tokens:
            ends = p.stop_token_ids if p.ignore_eos else (*p.stop_token_ids, *eos_token_ids)
            bias.update(dict.fromkeys(ends, -np.inf))
        biases.append(bias)
    if not any(biases):
        return None, None
    values = np.array([value for bias in biases for value in bias.values()], np.float32)
    return Ragged.of([list(bias) for bias in biases]), values
