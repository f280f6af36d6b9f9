"""The blocks of the paged KV cache: who holds which, and what may be read again. Sources: arXiv:2309.06180 (pages,
reference counts, copy-on-write), arXiv:2312.07104 (reuse of prefixes).

A block is in one of three states:

    free     nobody holds it and it holds nothing of use
    cached   nobody holds it, but it is full of tokens whose hash is known: the next prompt with that prefix takes it
             as it is; when the free ones are gone, the one that lay longest is emptied and used
    used     one sequence holds it, or several that share a prefix (a count of references)

A full block's hash is over its parent's hash and its own tokens, so it names all tokens up to its end. With 256 bits
no two prefixes are ever taken for each other. Every operation is O(1) in the number of blocks and requests.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from halve.core.errors import RequestError

BlockHash = bytes

_ROOT: BlockHash = bytes(32)


def block_hash(parent: BlockHash | None, token_ids: "array[int]") -> BlockHash:
    """The name of all tokens up to the end of a block. parent: of the block before, None for the first."""
    return blake2b(token_ids.tobytes(), key=parent or _ROOT, digest_size=32).digest()


def root_hash(salt: str) -> BlockHash | None:
    """The parent of first blocks under a salt: prefixes under different salts are different."""
    return blake2b(salt.encode(), digest_size=32, person=b"halve-cache-salt").digest() if salt else None


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise RequestError(f"cache: {num_blocks} blocks of {block_size} tokens; both must be 1 or more")
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the one that lay longest first
        self._references = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for the next prompt with their prefix."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int:
        """An empty block with one reference; a free one, else the cached one that lay longest.

        The caller has seen that `num_available` is above 0.
        """
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a used or cached block."""
        if not self._references[block]:
            del self._cached[block]
        self._references[block] += 1

    def num_references(self, block: int) -> int:
        """How many hold it; with more than one, a writer needs a copy of its own."""
        return self._references[block]

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a reference to each block of a sequence.

        The last block goes first, so that of a prefix in the cache the end is emptied before the beginning.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def publish(self, block: int, name: BlockHash) -> None:
        """Say what a used, full block holds. Where another block already holds the same, that one stays the source."""
        assert self._references[block]
        if self._hashes[block] is None and name not in self._by_hash:
            self._hashes[block] = name
            self._by_hash[name] = block

    def find(self, names: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest known beginning of these hashes; `share` those that you take."""
        found = []
        for name in names:
            block = self._by_hash.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_unused(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds, so that sharing them makes fewer available."""
        return sum(not self._references[block] for block in blocks)

    def check(self) -> None:
        """Assert that every block is in one state: free + cached + used == total, and hashes point both ways."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._references) if count > 0}
        assert len(self._free) + len(self._cached) + len(used) == self.num_blocks
        assert len(free | cached | used) == self.num_blocks
        assert min(self._references) >= 0
        assert all(self._hashes[block] is None for block in free)
        assert all(self._hashes[block] is not None for block in cached)
        named = {name: block for block, name in enumerate(self._hashes) if name is not None}
        assert named == self._by_hash

    def _forget(self, block: int) -> None:
        name = self._hashes[block]
        assert name is not None
        del self._by_hash[name]
        self._hashes[block] = None
