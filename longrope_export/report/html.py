"""One self-contained HTML page: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from string import Template

from longrope_export import __version__
from longrope_export.report.drawing import Plot
from longrope_export.report.inputs import ReportInputs
from longrope_export.report.markup import Html, element, join, safe
from longrope_export.report.ours import COMMENT
from longrope_export.report.sections import make_sections

DEFAULT_TITLE = "Context extension report"


def make_page(inputs: ReportInputs, plots: Sequence[Plot], title: str = DEFAULT_TITLE) -> str:
    """The page, ending in a newline. All that comes from files is escaped.

    Args:
        plots: of the inputs, see make_plots; drawn here as SVG.

    Raises:
        ToolError: matplotlib is not installed.
    """
    sections = make_sections(inputs, plots)
    navigation = [element("a", heading, href=f"#{anchor}") for anchor, heading, _ in sections]
    content = [
        element("section", element("h2", heading), body, id=anchor)
        for anchor, heading, body in sections
    ]
    template = Template(
        files("longrope_export.report").joinpath("templates/page.html").read_text(encoding="utf-8")
    )
    made = datetime.now(UTC).date().isoformat()
    subtitle = f"longrope-export {__version__}, {made}"
    values: dict[str, Html] = {
        "made_by": Html(COMMENT),
        "title": safe(title),
        "subtitle": safe(subtitle),
        "navigation": join(navigation),
        "sections": join(content),
    }
    return template.substitute(values)
