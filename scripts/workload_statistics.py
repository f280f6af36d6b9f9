#!/usr/bin/env python3
"""Print the statistics of a trace as a preset of src/halve/economics/presets.py.

    python scripts/workload_statistics.py TRACE [NAME] [SOURCE]

TRACE: any file that `halve bench --trace` reads. Prints Python that stands in the list of presets; only these figures
ship, never a trace.
"""

import sys

from halve.data import read_trace
from halve.economics.presets import preset_of


def main(path: str, name: str | None = None, source: str | None = None) -> None:
    """Read, sum up, print."""
    found = preset_of(read_trace(path))
    print(f"""Preset(
    name={name or found.name!r},
    source={source or found.source!r},
    mean_prompt={found.mean_prompt:.1f},
    mean_output={found.mean_output:.1f},
    prompt={found.prompt},
    output={found.output},
    cached_share={found.cached_share:.4f},
    peak={found.peak:.2f},
)""")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
