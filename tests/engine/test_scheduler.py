import pytest

from halve.engine.block_pool import BlockPool
from halve.engine.scheduler import Scheduler, flat_batch

from .toy import request


def scheduler(num_blocks=16, block_size=4, context=64, max_num_seqs=4, max_tokens_per_step=8):
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(pool, context=context, max_num_seqs=max_num_seqs, max_tokens_per_step=max_tokens_per_step)


def advance(chunks):
    """Pretend that the chunks ran and that token 1 was sampled where nothing is pending."""
    for chunk in chunks:
        ends = chunk.ends_pending
        chunk.state.num_computed += chunk.num_tokens
        if ends:
            chunk.state.token_ids.append(1)


def plan(chunks):
    return [(chunk.state.request.request_id, chunk.num_tokens) for chunk in chunks]


@pytest.fixture
def checked():
    made = []

    def make(**sizes):
        made.append(scheduler(**sizes))
        return made[-1]

    yield make
    for one in made:
        one.pool.check()


def test_decodes_go_first_and_prompts_fill_the_step(checked):
    one = checked()
    one.add(request("a", range(3), max_tokens=4))
    chunks = one.schedule()
    assert plan(chunks) == [("a", 3)]
    advance(chunks)
    one.add(request("b", range(10), max_tokens=4))
    one.add(request("c", range(5), max_tokens=4))
    for expected in ([("a", 1), ("b", 7)], [("a", 1), ("b", 3), ("c", 4)], [("a", 1), ("b", 1), ("c", 1)]):
        chunks = one.schedule()
        assert plan(chunks) == expected
        advance(chunks)


def test_the_first_to_come_is_not_overtaken_by_one_that_would_fit(checked):
    one = checked(num_blocks=5)
    one.add(request("a", range(8), max_tokens=4))
    one.add(request("big", range(8), max_tokens=8))
    one.add(request("small", range(2), max_tokens=2))
    assert plan(one.schedule()) == [("a", 8)]
    one.remove("a")
    assert plan(one.schedule()) == [("big", 8)]
    one.remove("small")
    one.remove("big")
    assert one.schedule() == []
    assert not one.has_unfinished
    assert one.pool.num_free == 5


def test_blocks_for_the_longest_answer_are_reserved_at_admission(checked):
    one = checked(context=20, max_tokens_per_step=16)
    one.add(request("a", range(8), max_tokens=5))
    one.add(request("b", range(8), max_tokens=500))
    assert plan(one.schedule()) == [("a", 8), ("b", 8)]
    assert len(one.running["a"].blocks) == 4  # 13 tokens
    assert len(one.running["b"].blocks) == 5  # the context, 20 tokens


def test_no_more_than_max_num_seqs_run(checked):
    one = checked(max_num_seqs=2)
    for name in "abc":
        one.add(request(name, [1], max_tokens=1))
    assert plan(one.schedule()) == [("a", 1), ("b", 1)]


def test_a_flat_batch_says_where_every_token_lies(checked):
    one = checked(max_tokens_per_step=6)
    one.add(request("a", [10, 11, 12, 13, 14], max_tokens=2))
    one.add(request("b", [20, 21, 22], max_tokens=2))
    first = one.schedule()
    batch, rows = flat_batch(first, 4)
    assert batch.token_ids.tolist() == [10, 11, 12, 13, 14, 20]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 6]
    assert batch.block_tables.tolist() == [[0, 1], [2, -1]]
    assert batch.slot_mapping.tolist() == [0, 1, 2, 3, 4, 8]
    assert rows.tolist() == [4]
    advance(first)
    batch, rows = flat_batch(one.schedule(), 4)
    assert batch.token_ids.tolist() == [1, 21, 22]
    assert batch.positions.tolist() == [5, 1, 2]
    assert batch.slot_mapping.tolist() == [5, 9, 10]
    assert batch.block_tables.tolist() == [[0, 1], [2, -1]]
    assert rows.tolist() == [0, 2]
