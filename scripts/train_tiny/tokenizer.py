"""The verb `tokenizer`: a byte-level BPE of a sample of the text (arXiv:1508.07909; bytes as in GPT-2)."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from halve.core.errors import ConfigError, TextError
from train_tiny.files import make_folder, write_json
from train_tiny.text import BOS, CHAT_TEMPLATE, SPECIALS, documents, sections

# English contractions, words with their space, single digits, runs of marks, runs of newlines, other space.
SPLIT = r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"
MAX_VOCAB = 1 << 16  # streams are uint16
MIN_VOCAB = len(SPECIALS) + 256


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSettings:
    """max_chars: characters of text that the merges are counted on. context: tokens, only written down."""

    text: tuple[Path, ...]
    out: Path
    vocab: int
    context: int
    max_chars: int
    seed: int

    def __post_init__(self) -> None:
        if not MIN_VOCAB <= self.vocab <= MAX_VOCAB:
            raise ConfigError(
                f"--vocab {self.vocab}: must be {MIN_VOCAB} (specials and bytes) to {MAX_VOCAB} (ids are 16 bits)"
            )
        if self.context < 1 or self.max_chars < 1:
            raise ConfigError(f"--context {self.context} and --max-chars {self.max_chars} must be 1 or more")


def run_tokenizer(settings: TokenizerSettings) -> None:
    """Train and write tokenizer.json and tokenizer_config.json."""
    sample = _sample(settings)
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    make_folder(settings.out)
    tokenizer.save(str(settings.out / "tokenizer.json"))
    write_json(settings.out / "tokenizer_config.json", _config(settings.context))
    size = tokenizer.get_vocab_size()
    print(f"vocabulary {size} from {sum(map(len, sample)) / 1e6:.1f} M characters -> {settings.out}")
    if size < settings.vocab:
        print(f"the text gives only {size} of the {settings.vocab} entries asked for; train takes the smaller number")


def _sample(settings: TokenizerSettings) -> list[str]:
    pieces = [s for path in settings.text for document in documents(path) for s in sections(document, 4000)]
    random.Random(settings.seed).shuffle(pieces)
    total, keep = 0, []
    for piece in pieces:
        keep.append(piece)
        total += len(piece)
        if total > settings.max_chars:
            break
    return keep


def _untrained() -> Any:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _config(context: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": SPECIALS[3:],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder that `tokenizer` wrote.

    Raises TextError when it is missing, broken, too large for 16 bits or without our special tokens at their ids.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TextError(f"{path} does not exist; make it by the verb tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise TextError(f"{path} is not a tokenizer ({error}); make it by the verb tokenizer") from error
    ids = [tokenizer.token_to_id(token) for token in SPECIALS]
    if ids != list(range(len(SPECIALS))):
        raise TextError(f"{path}: special tokens have the ids {ids}, not 0 to 15; make it by the verb tokenizer")
    if tokenizer.get_vocab_size() > MAX_VOCAB:
        raise TextError(f"{path}: {tokenizer.get_vocab_size()} entries do not fit 16-bit ids ({MAX_VOCAB} at most)")
    return tokenizer
