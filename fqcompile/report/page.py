"""One self-contained HTML page: light and dark, no network, and no script but its own."""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template

from fqcompile.report.html import Section, paragraph


def render_page(
    title: str, notes: Sequence[str], facts: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> str:
    """The page; `notes` are warnings, `facts` the figures and what each one is."""
    script = _part("page.js")
    return Template(_part("page.html")).substitute(
        title=escape(title),
        style=_part("page.css"),
        script=script,
        script_hash=_hash(script),
        notes="\n".join(paragraph(note, "warning") for note in notes),
        facts="".join(
            f"<div><dt>{escape(what)}</dt><dd>{escape(figure)}</dd></div>" for figure, what in facts
        ),
        contents="\n".join(
            f'<li><a href="#{_anchor(section)}">{escape(section.title)}</a></li>'
            for section in sections
        ),
        sections="\n".join(map(_section, sections)),
    )


def _section(section: Section) -> str:
    anchor = _anchor(section)
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
        f'<h2 id="{anchor}-title">{escape(section.title)}</h2>\n{section.body}\n</section>'
    )


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title)


@cache
def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """By which the browser knows the one script that it may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
