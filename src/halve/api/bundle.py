"""What a bundle holds beside a model directory's own files: names, and how they are read. No torch here."""

from collections.abc import Callable
from pathlib import Path

from halve.checkpoint import Checkpoint, open_checkpoint
from halve.core.certificate import Certificate, Draft
from halve.core.errors import CheckpointError
from halve.core.plan import KVCache, Plan
from halve.core.record import from_json

PLAN_FILE = "halve/plan.json"
CERTIFICATE_FILE = "halve/certificate.json"
SEALED_FILE = "halve/sealed.jsonl"
SEEN_FILE = "halve/seen.json"
TASKS_FOLDER = "halve/tasks"
FRONT_FILE = "halve/front.json"
REPORT_FILE = "halve/report.html"
DRAFT_FOLDER = "draft"


def read_plan(checkpoint: Checkpoint) -> Plan:
    """The plan of a bundle; a plain checkpoint runs as it is, rounded nowhere."""
    if not checkpoint.is_bundle:
        return Plan(kv_cache=KVCache(format="fp32"))
    return Plan.from_json(_read(checkpoint, PLAN_FILE))


def read_certificate(bundle: Checkpoint) -> Certificate:
    """The certificate of a bundle. Raises CheckpointError when it has none, ConfigError when it can't be read."""
    return from_json(Certificate, _read(bundle, CERTIFICATE_FILE), CERTIFICATE_FILE)


def read_draft(bundle: Path, progress: Callable[[int, int], None] | None = None) -> Draft | None:
    """What the draft in a bundle is; None where it holds none."""
    if not (bundle / DRAFT_FOLDER).is_dir():
        return None
    with open_checkpoint(bundle / DRAFT_FOLDER) as draft:
        return Draft(bytes=draft.weight_bytes, weights_sha256=draft.reader.sha256(progress))


def _read(bundle: Checkpoint, name: str) -> str:
    path = bundle.path / name
    if not path.exists():
        raise CheckpointError(f"{bundle.path}: holds no {name}; it is no bundle of `halve optimize`, or a broken one")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
