import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from halve.engine import Engine, EngineConfig
from halve.text import Tokenizer

from .toy import ToyRunner


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Make engines; at the end of the test every block of each must be free."""
    made: list[Engine] = []

    def make(
        runner: Any = None, tokenizer: Tokenizer | None = None, eos: tuple[int, ...] = (), **config: int
    ) -> Engine:
        made.append(Engine(runner or ToyRunner(), tokenizer, EngineConfig(**config), eos_token_ids=eos))
        return made[-1]

    yield make
    for one in made:
        one.pool.check()
        assert one.has_unfinished or one.pool.num_free == one.pool.num_blocks


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
