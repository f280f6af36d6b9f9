"""Ten thousand requests at random: no block lost, no request without its end, bounded wait, no growth in memory."""

import gc
import random
import tracemalloc

from .toy import StubRunner, request

NUM_REQUESTS = 10_000
SYSTEM = [[7 * k + i for i in range(48)] for k in range(5)]  # prompts that many share


def random_request(rng, i):
    prompt = [*rng.choice([[], *SYSTEM]), *(rng.randrange(1000) for _ in range(rng.randint(1, 40)))]
    n = rng.choice([1] * 8 + [2, 4])
    tokens = rng.randint(1, 8) if rng.random() < 0.8 else rng.randint(30, 80)
    return request(str(i), prompt, n=n, max_tokens=tokens, priority=rng.randint(-2, 2))


def test_ten_thousand_requests_with_aborts_priorities_prefixes_and_samples(core):
    rng = random.Random(0)
    one = core(StubRunner(num_blocks=160, block_size=4), max_num_seqs=32, max_tokens_per_step=256)
    open_ends, steps, added = {}, 0, 0
    while added < NUM_REQUESTS or one.has_unfinished:
        while added < NUM_REQUESTS and len(open_ends) < 100:
            new = random_request(rng, added)
            one.add(new)
            open_ends[new.request_id] = new.sampling.n
            added += 1
        if rng.random() < 0.3:
            one.abort(rng.choice(list(open_ends)))
        for output in one.step():
            if output.finish_reason is not None:
                open_ends[output.request_id] -= 1
                if not open_ends[output.request_id]:
                    del open_ends[output.request_id]
        steps += 1
        if steps % 100 == 0:
            one.check_invariants()
    metrics = one.metrics()
    assert open_ends == {}
    assert metrics.blocks_used == 0
    assert metrics.num_preemptions > 100
    assert metrics.num_hit_tokens > 100_000
    assert metrics.num_aborted > 300


def test_nobody_waits_for_more_than_a_bounded_number_of_later_requests_and_nothing_piles_up(core):
    """100 wait at a time; a request of the least priority lets 4 levels of 20 later ones pass, and no more."""
    rng = random.Random(1)
    one = core(StubRunner(num_blocks=90), max_num_seqs=16, max_tokens_per_step=256, overtakes_per_priority=20)
    arrived, waiting, added, sizes = {}, 0, 0, []
    tracemalloc.start()
    while added < 2_000 or one.has_unfinished:
        while added < 2_000 and len(arrived) < 100:
            new = random_request(rng, added)
            one.add(new)
            arrived[new.request_id] = added
            added += 1
        for output in one.step():
            if output.request_id in arrived:
                waiting = max(waiting, added - arrived.pop(output.request_id))
        if added >= 500 and not sizes:
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    gc.collect()
    sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert arrived == {}
    assert waiting <= 100 + 4 * 20 + 100  # those before it, those that overtake, those that came meanwhile
    assert sizes[1] < sizes[0] + 50_000  # bytes, over 1,500 requests
