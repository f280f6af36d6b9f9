"""A model's name to a directory: a local path as it is, `org/name` through the Hugging Face cache and Hub."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

from halve.checkpoint.files import exists, read_object
from halve.checkpoint.safetensors import INDEX, SINGLE
from halve.core.errors import CheckpointError

log = logging.getLogger("halve.checkpoint")

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
ALLOWED = [
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "tokenizer*", "halve/*"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
]
# Code and pickles are never fetched; second copies of the weights in other layouts would double the download.
IGNORED = [
    *("*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"),
    *("*/*.safetensors", "consolidated*.safetensors"),
]

Download = Callable[..., str]


def resolve(model: str, *, snapshot_download: Download | None = None) -> Path:
    """The directory of a model: an existing path, or `org/name` from the local cache, or else from the Hub.

    snapshot_download: huggingface_hub's, or a stand-in for tests. A model whose snapshot is whole in the cache is
    used as it is, without asking for a newer one. Raises CheckpointError with the way out on every failure.
    """
    if model.strip() and exists(Path(model)):
        return Path(model)
    if not REPOSITORY.fullmatch(model):
        raise CheckpointError(
            f"{model!r}: no such directory, and not a name on the Hub (org/name); give the directory of a model"
        )
    if snapshot_download is None:
        from huggingface_hub import snapshot_download as hub_download

        snapshot_download = hub_download
    if (cached := _cached(model, snapshot_download)) is not None:
        log.info("%s: using the cached snapshot %s", model, cached)
        return cached
    log.info("%s: downloading from the Hub", model)
    try:
        return Path(snapshot_download(model, allow_patterns=ALLOWED, ignore_patterns=IGNORED))
    except Exception as error:  # the Hub's clients raise errors of many trees: HTTP, OS, validation
        partial = getattr(error, "snapshot_path", None)  # others may have fetched the weights and no more
        if partial is not None and _is_whole(Path(partial)):
            log.warning("%s: using the cached snapshot %s; files beside its weights may be missing", model, partial)
            return Path(partial)
        raise CheckpointError(f"{model}: no such directory here; as a name on the Hub: {_reason(error)}") from error


def _cached(model: str, snapshot_download: Download) -> Path | None:
    """The cached snapshot, None when there is none or weights are missing from it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(model, allow_patterns=ALLOWED, ignore_patterns=IGNORED, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except Exception as error:
        raise CheckpointError(f"{model}: no such directory here; as a name on the Hub: {_reason(error)}") from error
    return path if _is_whole(path) else None


def _is_whole(path: Path) -> bool:
    """Whether a snapshot holds its configuration and every weight file; an interrupted download may not."""
    if not (path / "config.json").exists():
        return False
    if (path / INDEX).exists():
        weight_map = read_object(path / INDEX).get("weight_map")
        return isinstance(weight_map, dict) and all((path / str(file)).exists() for file in weight_map.values())
    return (path / SINGLE).exists()


def _reason(error: Exception) -> str:
    """What went wrong and what to do, by the kind of the Hub's error."""
    from huggingface_hub import errors

    local = "or give the directory of a copy on this machine"
    if isinstance(error, errors.GatedRepoError):
        return f"access is gated; accept its terms on huggingface.co and set HF_TOKEN, {local}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"not on the Hub, or private; check the name, set HF_TOKEN if it is private, {local}"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return (
            f"not in the local cache, and the Hub can't be reached; run `hf download` where there is a network, {local}"
        )
    return f"the Hub refused: {type(error).__name__}: {str(error)[:300]}; try again, set HF_TOKEN, {local}"
