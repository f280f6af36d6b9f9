import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from halve.engine import Engine, EngineConfig, EngineCore
from halve.text import Tokenizer

from .toy import ToyRunner


@pytest.fixture
def core() -> Iterator[Callable[..., EngineCore]]:
    """Make engine cores; at the end of the test no block of any may be lost."""
    made: list[EngineCore] = []

    def make(
        runner: Any = None, tokenizer: Tokenizer | None = None, eos: tuple[int, ...] = (), **config: Any
    ) -> EngineCore:
        made.append(EngineCore(runner or ToyRunner(), tokenizer, EngineConfig(**config), eos_token_ids=eos))
        return made[-1]

    yield make
    for one in made:
        check(one)


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Make engines; at the end of the test each is closed, and no block may be lost."""
    made: list[Engine] = []

    def make(
        runner: Any = None, tokenizer: Tokenizer | None = None, eos: tuple[int, ...] = (), **config: Any
    ) -> Engine:
        made.append(Engine(runner or ToyRunner(), tokenizer, EngineConfig(**config), eos_token_ids=eos))
        return made[-1]

    yield make
    for one in made:
        one.close()
        check(one._worker.core)
        assert not one._worker.core.has_unfinished


def check(core: EngineCore) -> None:
    """free + cached + used == total, and used is 0 where nothing is unfinished."""
    core.check_invariants()
    pool = core.scheduler.pool
    assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks
    assert core.has_unfinished or pool.num_used == 0


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for every byte, the special `<eos>`, and a few words that overlap stop strings."""
    pieces = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("s", "t"), ("st", "o"), ("o", "p"), ("a", "b"), ("ab", "c")]
    pieces += ["".join(merge) for merge in merges]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    path: Path = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return Tokenizer.from_directory(path)
