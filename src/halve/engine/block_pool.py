"""The blocks of the paged KV cache: who holds which. Source: arXiv:2309.06180."""

from halve.core.errors import RequestError


class BlockPool:
    """Hands out `num_blocks` blocks of `block_size` tokens; a request gets all of its blocks at once."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise RequestError(f"cache: {num_blocks} blocks of {block_size} tokens; both must be 1 or more")
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._used: dict[str, tuple[int, ...]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, request_id: str, num_blocks: int) -> tuple[int, ...]:
        """Take blocks for a request that holds none. Raises RequestError when fewer are free."""
        assert request_id not in self._used, request_id
        if num_blocks > self.num_free:
            raise RequestError(
                f"request {request_id!r}: needs {num_blocks} blocks of {self.block_size} tokens, {self.num_free} of "
                f"{self.num_blocks} are free; wait until a request ends"
            )
        self._used[request_id] = tuple(self._free.pop() for _ in range(num_blocks))
        return self._used[request_id]

    def free(self, request_id: str) -> None:
        """Give back every block of a request that holds some."""
        self._free.extend(reversed(self._used.pop(request_id)))

    def check(self) -> None:
        """Assert that every block is in one place: free + cached + used == total (nothing is cached yet)."""
        cached: list[int] = []
        used = [block for blocks in self._used.values() for block in blocks]
        assert len(self._free) + len(cached) + len(used) == self.num_blocks
        assert set(self._free) | set(cached) | set(used) == set(range(self.num_blocks))
