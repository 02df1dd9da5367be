"""Reads a page back: its tags, its facts, and the rows of each table by section."""

from html.parser import HTMLParser

VOID = {"meta", "input", "rect", "circle", "line"}


class Page(HTMLParser):
    """Collects tags, attributes and texts, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self.facts: dict[str, str] = {}
        self.summaries: list[str] = []
        self._section, self._fact = "", ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag == "tr" and "tbody" in self.open:
            self.rows.setdefault(self._section, []).append([])
        if tag == "td":
            self.rows[self._section][-1].append("")
        if tag == "title" and "svg" in self.open:
            self.titles.append("")
        if tag == "summary":
            self.summaries.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.rows[self._section][-1][-1] += data
        innermost = self.open[-1] if self.open else ""
        if innermost == "dt":
            self._fact = data
        elif innermost == "dd":
            self.facts[self._fact] = data
        elif innermost == "summary":
            self.summaries[-1] += data
        elif innermost == "title" and "svg" in self.open:
            self.titles[-1] += data
