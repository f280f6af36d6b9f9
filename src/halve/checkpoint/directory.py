"""A model directory: configuration, weights and the files that travel with them. No code in it ever runs."""

import hashlib
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import numpy as np

from halve.checkpoint.compressed_tensors import check_finite, read_weight
from halve.checkpoint.files import exists, read_bytes, read_object
from halve.checkpoint.quantization_config import Layout
from halve.checkpoint.safetensors import Progress, TensorReader
from halve.checkpoint.stacked import ALTERNATING, StackedReader, mxfp4_layout
from halve.core.errors import CheckpointError
from halve.formats import Weight
from halve.formats.base import widen

Array = np.ndarray[Any, np.dtype[Any]]

CONFIG = "config.json"
CARRIED = (
    "tokenizer*",
    "special_tokens_map*",
    "added_tokens*",
    "chat_template*",
    "vocab*",
    "merges*",
    "sentencepiece*",
    "generation_config.json",
    "license*",
    "licence*",
    "notice*",
    "use_policy*",
    "readme.md",
    "model_card*",
)
# Text and tokenizer data only: weights, pickles and code stay behind whatever they are called.
CARRIED_SUFFIXES = ("", ".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".rst")
# Reserved for a draft model inside a bundle; its weights count in the bundle's bytes.
DRAFT = "halve/draft"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An opened model directory. Made by `open_checkpoint`."""

    path: Path
    config: dict[str, Any]
    reader: TensorReader
    layout: Layout

    @property
    def is_bundle(self) -> bool:
        """Whether `halve optimize` wrote it."""
        return (self.path / "halve" / "plan.json").is_file()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files, those of a draft model in DRAFT among them."""
        return self.reader.size_bytes + sum(p.stat().st_size for p in (self.path / DRAFT).glob("*.safetensors"))

    def carried_files(self) -> list[Path]:
        """Files that a smaller model takes over byte for byte: tokenizer, templates, card and licence, by name."""
        return sorted(path for path in self.path.iterdir() if _is_carried(path.name) and path.is_file())

    def licence(self) -> str | None:
        """What the model card's front matter or else the first line of the licence file says; None when neither."""
        files = {path.name.lower(): path for path in self.carried_files()}
        if "readme.md" in files and (found := _front_matter_licence(_text(files["readme.md"]))):
            return found
        for name, path in files.items():
            if name.startswith(("license", "licence")):
                lines = (line.strip() for line in _text(path).splitlines())
                # Creative Commons texts begin with the same title, whichever licence they are.
                titles = (line for line in lines if line and line != "Creative Commons Legal Code")
                if first := next(titles, None):
                    return first[:200]
        return None

    def read_weight(self, module: str, shape: tuple[int, ...]) -> Weight:
        """The matrix of `module` as stored. Raises CheckpointError as `compressed_tensors.read_weight` does."""
        return read_weight(self.reader, module, self.layout, shape)

    def read_vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """A norm gain or bias as float32. Raises CheckpointError on other types or shapes, NaN and infinity."""
        info = self.reader.info(name)
        if info.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"{self.path}: {name}: {info.dtype}; vectors are F32, F16 or BF16")
        if info.shape != shape:
            raise CheckpointError(
                f"{self.path}: {name}: shape {list(info.shape)}; the model needs {list(shape)}: "
                "config.json and weights do not belong together"
            )
        values = self.reader.read(name)
        check_finite(name, values)
        return widen(values)

    def sha256(self, progress: Progress | None = None) -> str:
        """SHA-256 in hex over config.json and the weight files."""
        config = hashlib.sha256(read_bytes(self.path / CONFIG)).hexdigest()
        return hashlib.sha256(f"{config} {self.reader.sha256(progress)}".encode()).hexdigest()

    def close(self) -> None:
        """Let go of the weight files; arrays that were read stay valid."""
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model directory, all its files checked and no tensor read yet.

    Raises CheckpointError, with what to give instead, on anything but a Hugging Face directory with safetensors.
    """
    directory = _directory(path)
    if not exists(directory / CONFIG):
        raise CheckpointError(f"{directory}: no {CONFIG}; give the directory of a Hugging Face model")
    config = read_object(directory / CONFIG)
    names, quantization = config.get("architectures"), config.get("quantization_config")
    family = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    if isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4":
        layout = mxfp4_layout(quantization, family)
    else:
        layout = Layout.from_config(quantization)
    if family is not None and family in ALTERNATING:
        return Checkpoint(directory, config, StackedReader(directory, alternating=ALTERNATING[family]), layout)
    return Checkpoint(directory, config, TensorReader(directory), layout)


def _directory(path: str | Path) -> Path:
    if not str(path).strip():
        raise CheckpointError("the model's path is empty; give the directory of a Hugging Face model")
    directory = Path(path)
    if not exists(directory):
        raise CheckpointError(
            f"{directory}: does not exist; give a model's directory, or org/name of a model on the Hub"
        )
    if directory.is_dir():
        return directory
    if _is_gguf(directory):
        raise CheckpointError(
            f"{directory}: a GGUF file, already quantized for llama.cpp; give the directory of the original model "
            "(config.json and *.safetensors)"
        )
    raise CheckpointError(f"{directory}: a file; give the directory that holds config.json and the weights")


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check the permissions") from error


def _is_carried(name: str) -> bool:
    lower = name.lower()
    return Path(lower).suffix in CARRIED_SUFFIXES and any(fnmatchcase(lower, pattern) for pattern in CARRIED)


def _text(path: Path) -> str:
    return read_bytes(path).decode(errors="replace")


def _front_matter_licence(card: str) -> str | None:
    """`license:` of the YAML block between two `---` lines; `license_name` where that says `other`."""
    block = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", card, re.DOTALL | re.MULTILINE)
    if block is None:
        return None
    fields = {}
    for key in ("license", "license_name"):
        found = re.search(rf"^{key}:(?:[ \t]*\r?\n[ \t]*-)?[ \t]*([^\r\n]+)", block[1], re.MULTILINE)
        fields[key] = found[1].strip().strip("[]'\"") if found else ""
    return (fields["license_name"] if fields["license"] == "other" else "") or fields["license"] or None
