"""Records to one self-contained HTML page: no scripts, no network, one file that can be mailed.

`render(ReportPage(...))` is the whole of it; whoever has the records fills a `ReportPage`.
"""

from halve.report.page import render
from halve.report.records import Candidate, GroupSize, LayerError, ReportPage, Sample

__all__ = ["Candidate", "GroupSize", "LayerError", "ReportPage", "Sample", "render"]
