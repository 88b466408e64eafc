"""mkdocs hook: docstrings' Sphinx roles, which Markdown does not know, as plain code."""

import re


def on_page_content(html: str, **kwargs: object) -> str:
    html = re.sub(r":(?:class|func|meth|mod):<code>~?(.*?)</code>", r"<code>\1</code>", html)
    return html.replace("<p>::</p>", "")
