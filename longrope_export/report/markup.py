"""HTML by hand: everything that is text is escaped here, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


class Html(str):
    """Markup that is safe to put into a page as it is; any other text is escaped first."""


def element(name: str, *content: str, **attributes: str) -> Html:
    """`<name attributes>content</name>`; `class_` stands for class."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{''.join(map(safe, content))}</{name}>")


def safe(text: str) -> Html:
    """The text itself if it is markup, else escaped."""
    return text if isinstance(text, Html) else Html(escape(str(text)))


def join(parts: Sequence[str], between: str = "\n") -> Html:
    """Parts one after the other."""
    return Html(between.join(map(safe, parts)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> Html:
    """A table that scrolls sideways by itself; columns in `words` hold text, the others numbers."""

    def line(tag: str, cells: Sequence[str]) -> Html:
        return element(
            "tr",
            *(
                element(tag, cell, class_="words") if column in words else element(tag, cell)
                for column, cell in enumerate(cells)
            ),
        )

    head = element("thead", line("th", header))
    body = element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", head, body), class_="wide")
