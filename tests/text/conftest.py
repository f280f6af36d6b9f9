"""Checkpoint directories with tokenizers made here: byte-level as Llama 3, byte fallback as Llama 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "The old house stood at the end of the lane, and nobody had lived in it for years.",
    "She said that she would come back tomorrow; he didn't believe her at all.",
    "Grüße aus Köln! 東京の空は青い。 Привет, мир. 🙂🙃",
    "for i in range(10):\n    print(i)\n",
]
CONTROL = [
    "<|begin|>",
    "<|end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]


def byte_level() -> tuple[Tokenizer, dict[str, Any]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "model_max_length": 1024}
    return backend, config


def byte_fallback() -> tuple[Tokenizer, dict[str, Any]]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzTSG.,'", "th", "the", "▁the", "in", "▁▁", "東", "\ufffd"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "▁")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return backend, config


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint's tokenizer files; keywords overrule tokenizer_config.json, None removes a key."""

    def write(make: Callable[[], tuple[Tokenizer, dict[str, Any]]] = byte_level, **changes: Any) -> Path:
        backend, config = make()
        backend.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
        config = {key: value for key, value in {**config, **changes}.items() if value is not None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return write
