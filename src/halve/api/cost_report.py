"""What `price`, `breakeven` and `plan-hardware` found, as a page."""

from dataclasses import replace
from pathlib import Path

from halve.api.breakeven import BrokenEven
from halve.api.plan_hardware import HardwarePlan, plan_hardware
from halve.api.price import Priced
from halve.api.progress import SILENT, Progress
from halve.core.errors import ConfigError, OutputError


def write_report(
    path: Path, found: Priced | BrokenEven | HardwarePlan, language: str = "en", progress: Progress = SILENT
) -> None:
    """Write an HTML page that opens in a language, en or ja; whatever was asked, machines are ranked on it.

    Raises ConfigError, OutputError.
    """
    from halve.report.costs import render_costs

    if language not in ("en", "ja"):
        raise ConfigError(f"language: {language!r} must be en or ja")
    priced = found.priced if isinstance(found, BrokenEven) else found if isinstance(found, Priced) else None
    even = found if isinstance(found, BrokenEven) else None
    hardware = found if isinstance(found, HardwarePlan) else None
    if priced is not None:
        asked = priced.asked
        # The same question about every machine: neither a device, nor the price of one, nor what was measured on it.
        hardware = plan_hardware(
            replace(asked, device=None, price_per_hour=None, region=None, measure=False),
            currency=priced.currency,
            progress=progress,
        )
    assert hardware is not None
    html = render_costs(
        title=f"{hardware.subject.name}, {hardware.preset.name}",
        currency=hardware.currency,
        rows=priced.rows() if priced else (),
        even=even.table() if even else (),
        machines=hardware.table(),
        left_out=hardware.left_out,
        sentence=priced.sentence if priced else hardware.sentence,
        notes=priced.notes if priced else hardware.notes,
        created=hardware.created,
        language=language,
    )
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}; give --report a file in a folder") from error
