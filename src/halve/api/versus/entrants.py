"""Who takes part: the model itself and the engines that `vs` names, each with what its model asks of the machine."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from halve.api.versus.engines import MODULES
from halve.api.versus.figures import Work
from halve.api.versus.processes import WorkerError, find_engine
from halve.api.versus.rounds import Contestant
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.core.errors import ConfigError
from halve.models import ModelConfig, load_config, stored_formats
from halve.models.names import modules, num_active_parameters, num_parameters

PEERS = (*MODULES, "openai")
WEIGHT_FILES = {
    "halve": (".safetensors",),
    "llama.cpp": (".gguf",),
    "onnx": (".onnx", ".data"),
    "openvino": (".bin",),
    "vllm": (".safetensors", ".bin"),
}


def entrants(
    checkpoint: Checkpoint, config: ModelConfig, vs: Sequence[str], environments: Sequence[Path], stages: Sequence[bool]
) -> list[Contestant]:
    """The model first, then each of `vs`, KIND:PATH.

    stages: whether batches (False) and requests (True) will be asked for. Raises ConfigError for words that name no
    engine, a path that is not there, or an engine that no environment has.
    """
    asked = [("halve", str(checkpoint.path)), *map(_parse, vs)]
    names = Counter(f"{kind}:{model_name(kind, path)}" for kind, path in asked)
    found, seen = [], Counter[str]()
    for kind, path in asked:
        name = f"{kind}:{model_name(kind, path)}"
        seen[name] += 1
        try:
            engines = {serving: find_engine(kind, environments, serving=serving) for serving in stages}
            work = work_of(kind, path, config)
        except WorkerError as error:
            raise ConfigError(str(error)) from error
        found.append(
            Contestant(
                name=name if names[name] == 1 else f"{name}#{seen[name]}",
                kind=kind,
                path=path,
                found=engines,
                work=work,
                shape={
                    "vocab_size": config.vocab_size,
                    "hidden_size": config.hidden_size,
                    "num_hidden_layers": config.num_layers,
                },
            )
        )
    found[0].format = main_format(checkpoint, config)
    for other in found[1:]:
        if other.kind == "halve":
            with open_checkpoint(Path(other.path)) as opened:
                other.format = main_format(opened, load_config(opened))
    return found


def _parse(words: str) -> tuple[str, str]:
    kind, _, path = words.partition(":")
    if kind not in ("halve", *PEERS) or not path:
        raise ConfigError(f"vs: {words!r} is not KIND:PATH with a kind of halve, {', '.join(PEERS)}")
    if kind == "openai":
        return kind, path
    if kind == "halve":
        return kind, str(resolve(path))
    if not Path(path).exists():
        raise ConfigError(f"vs: {words!r}: there is no {path}")
    return kind, str(Path(path).resolve())


def model_name(kind: str, path: str) -> str:
    """A model without where it lies: the last part of its path, or the address of a server."""
    return path.partition("://")[2].rstrip("/") if kind == "openai" else Path(path).name


def main_format(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """The format that most weights of a checkpoint are stored in."""
    shapes = {module.name: module.shape for module in modules(config)}
    weights: Counter[str] = Counter()
    for name, stored in stored_formats(checkpoint, config).items():
        weights[stored.name] += shapes[name][0] * shapes[name][1]
    return weights.most_common(1)[0][0]


def weight_bytes(kind: str, path: Path) -> int:
    """Bytes of the files that an engine reads weights from. Raises WorkerError where there are none."""
    suffixes = WEIGHT_FILES[kind]
    files = [path] if path.is_file() else [p for p in path.glob("*") if p.suffix in suffixes]
    if size := sum(p.stat().st_size for p in files if p.suffix in suffixes):
        return size
    raise WorkerError(f"{kind}:{path}: no weight files ({', '.join(suffixes)}) there")


def work_of(kind: str, path: str, config: ModelConfig) -> Work:
    """What a model of this shape asks of the machine. Every weight file is read once a step.

    The table of an untied model is looked up, not read, and of a sparse model's experts a token reads a few: their
    shares of the weights are taken off the bytes. Raises WorkerError for a model without weights.
    """
    table, parameters = config.vocab_size * config.hidden_size, num_active_parameters(config)
    read = (parameters - (0 if config.tied else table)) / num_parameters(config)
    layers = parameters - table * (1 if config.tied else 2)
    size = None if kind == "openai" else round(weight_bytes(kind, Path(path)) * read)
    return Work(size, layers, table, config.sparse)
