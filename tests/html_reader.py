"""Reads pages as browsers do, for the tests of pictures and of the demo."""

from html.parser import HTMLParser


class Reader(HTMLParser):
    """Start tags with their attributes; the text outside scripts and styles; that of p.caption."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.caption = self.text = self._open = ""
        self._told = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len({name for name, _ in attrs})
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag
        self._told = dict(attrs).get("class") == "caption" if tag == "p" else self._told

    def handle_endtag(self, tag):
        self._open, self._told = "", self._told and tag != "p"

    def handle_data(self, data):
        self.text += data if self._open not in ("script", "style") else ""
        self.caption += data if self._told else ""

    def having(self, name):
        return [attributes for _, attributes in self.tags if name in attributes]

    def each(self, name, value="", tag=""):
        """The values of an attribute (default: the same) of all tags, or those of a kind, with
        another one."""
        return [a[value or name] for t, a in self.tags if name in a and tag in ("", t)]
