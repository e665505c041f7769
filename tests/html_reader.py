"""Reads pages as browsers do, for the tests of pictures and of the demo."""

from __future__ import annotations

from html.parser import HTMLParser


class Reader(HTMLParser):
    """Start tags with their attributes; the text outside scripts and styles; that of p.caption."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.caption = self.text = self._open = ""
        self._told = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len({name for name, _ in attrs})
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag
        self._told = dict(attrs).get("class") == "caption" if tag == "p" else self._told

    def handle_endtag(self, tag: str) -> None:
        self._open, self._told = "", self._told and tag != "p"

    def handle_data(self, data: str) -> None:
        self.text += data if self._open not in ("script", "style") else ""
        self.caption += data if self._told else ""

    def having(self, name: str) -> list[dict[str, str]]:
        """Attributes of the tags that have one of this name."""
        return [attributes for _, attributes in self.tags if name in attributes]

    def each(self, name: str, value: str = "", tag: str = "") -> list[str]:
        """The values of an attribute (default: the same) of all tags, or those of a kind, with
        another one."""
        return [a[value or name] for t, a in self.tags if name in a and tag in ("", t)]
