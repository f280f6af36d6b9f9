"""A model to compare, wherever it comes from: a bundle, a Hugging Face directory, or a GGUF file of llama.cpp."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from halve.api.bundle import read_certificate
from halve.api.certify import check_plan, served_device
from halve.api.model import Model, load, make_ops
from halve.api.roofline import Judged
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.checkpoint.gguf import KEPT, GGUFFile, is_gguf
from halve.core.certificate import Certificate, Speed
from halve.core.errors import ConfigError
from halve.core.plan import KVCache, Plan
from halve.models import Decoder, ModelConfig, load_config, stored_formats
from halve.models.gguf import GGUFSource, gguf_name, read_gguf_config
from halve.models.names import EMBEDDING, modules
from halve.models.sizes import bytes_per_token
from halve.text import Tokenizer

Kind = Literal["bundle", "checkpoint", "gguf"]


@dataclass(frozen=True, eq=False)
class Side:
    """An opened model, no weight read yet. certificate: of a bundle. file: of a GGUF, which has no checkpoint."""

    name: str
    path: Path
    kind: Kind
    config: ModelConfig
    checkpoint: Checkpoint | None = None
    certificate: Certificate | None = None
    file: GGUFFile | None = None

    @classmethod
    def open(cls, model: str | Path) -> Self:
        """Check the files. Raises as `open_checkpoint`, `GGUFFile` and `read_certificate` do."""
        path = Path(model)
        if is_gguf(path):
            file = GGUFFile(path)
            return cls(path.name, path, "gguf", read_gguf_config(file), file=file)
        checkpoint = open_checkpoint(resolve(str(model)))
        name = checkpoint.path.resolve().name
        config = load_config(checkpoint)
        if not checkpoint.is_bundle:
            return cls(name, checkpoint.path, "checkpoint", config, checkpoint=checkpoint)
        certificate = read_certificate(checkpoint)
        check_plan(checkpoint, certificate)
        return cls(name, checkpoint.path, "bundle", config, checkpoint=checkpoint, certificate=certificate)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        if self.file is not None:
            return self.file.size_bytes
        assert self.checkpoint is not None
        return self.checkpoint.weight_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decoded token reads: of a GGUF file all but a table that is looked up."""
        if self.file is None:
            assert self.checkpoint is not None
            return bytes_per_token(self.config, stored_formats(self.checkpoint, self.config))
        table = gguf_name(f"{EMBEDDING}.weight")
        read = self.file.names - (set() if self.config.tied else {table})
        return sum(map(self.file.stored_bytes, read))

    @property
    def formats(self) -> dict[str, int]:
        """How its matrices are stored, and how many weights so, most first."""
        found: dict[str, int] = {}
        stored = {} if self.checkpoint is None else stored_formats(self.checkpoint, self.config)
        for module in modules(self.config):
            name = (
                stored[module.name].name if self.file is None else self.file.type_of(gguf_name(f"{module.name}.weight"))
            )
            found[name] = found.get(name, 0) + module.shape[0] * module.shape[1]
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def unpacked(self) -> list[str]:
        """Types of a GGUF file whose bits no format of ours has, so that they run in float32 here."""
        return [] if self.file is None else [name for name in self.formats if name not in KEPT]

    def tokenizer_from(self, other: "Side | None") -> Checkpoint:
        """The directory with this side's tokenizer. Raises ConfigError where its tokens are not those of the file."""
        if self.checkpoint is not None:
            return self.checkpoint
        assert self.file is not None
        if other is None or other.checkpoint is None:
            raise ConfigError(
                f"{self.path}: the tokenizer of a GGUF file is not rebuilt here; name a directory that has it by "
                "--tokenizer"
            )
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise ConfigError(
                f"{self.path}: holds no list of tokens, so nothing says that it reads these; convert it again"
            )
        theirs = Tokenizer.from_directory(other.checkpoint.path, vocab_size=other.config.vocab_size)
        if difference := theirs.differs_from(tokens):
            raise ConfigError(
                f"{self.path}: its tokens are not those of {other.path}, {difference}; compare models of one tokenizer"
            )
        return other.checkpoint

    def load(self, tokenizer: Checkpoint, device: str) -> Model:
        """The model as it is served: a bundle by its plan, all else rounded nowhere. tokenizer: of `tokenizer_from`."""
        if self.file is None:
            return load(self.path, device=served_device(device), keep=False)
        ops = make_ops(served_device(device), "fp32")
        decoder = Decoder(self.config, ops, GGUFSource(self.file, self.config), None)
        words = Tokenizer.from_directory(tokenizer.path, vocab_size=self.config.vocab_size)
        return Model(tokenizer, Plan(kv_cache=KVCache(format="fp32")), ops, decoder, words)

    def judged(self, name: str, speed: Speed) -> Judged | None:
        """Its speed and the work behind a token, for the limits of the machine; None where it was not measured."""
        if speed.decode_tok_s is None:
            return None
        macs = sum(m.shape[0] * m.shape[1] for m in modules(self.config) if m.name != EMBEDDING or self.config.tied)
        size = self.bytes_per_token
        return Judged(model=name, decode_tok_s=speed.decode_tok_s.value, bytes_per_step=size, macs=macs)

    def close(self) -> None:
        """Let go of the files."""
        if self.checkpoint is not None:
            self.checkpoint.close()
