"""Pages for files outside docs/: the README as the home page, other Markdown files, and the notebooks with outputs.

Links are written for the repository, so that GitHub can follow them. This hook rewrites them: a link to a file that
has a page leads to that page. A link to any other file leads to ``repo_url`` if that is set, and becomes plain text
otherwise.
"""

import base64
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Source in the repository and page of the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "recipes/README.md": "recipes.md",
    "README.md": "index.md",
}
NOTEBOOKS = "notebooks"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
CODE = re.compile(r"^(?P<fence> *(?:```+|~~~+)).*?^(?P=fence)|`+[^`\n]+`+", re.MULTILINE | re.DOTALL)

log = logging.getLogger("mkdocs.hooks.repository_files")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    for source, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for notebook in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        text, images = notebook_markdown(json.loads(notebook.read_text(encoding="utf-8")), notebook.stem)
        files.append(File.generated(config, f"{NOTEBOOKS}/{notebook.stem}.md", content=text))
        for name, content in images.items():
            files.append(File.generated(config, f"{NOTEBOOKS}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links that leave docs/."""
    sources = {page: source for source, page in PAGES.items()}
    uri = page.file.src_uri
    is_notebook = uri.startswith(f"{NOTEBOOKS}/")
    source = uri.replace(".md", ".ipynb") if is_notebook else sources.get(uri, f"docs/{uri}")
    code = [match.span() for match in CODE.finditer(markdown)]

    def rewritten(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"[a-z]+:", target) or any(start < match.start() < end for start, end in code):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = _page(path)
        if files.get_file_from_path(to) is not None:
            link = posixpath.relpath(to, posixpath.dirname(uri) or ".")
        elif not (ROOT / path).exists():
            log.warning("%s: no file for the link to %s", source, target)
            return match[0]
        elif config.repo_url:
            link = f"{config.repo_url.rstrip('/')}/blob/main/{path}"
        else:
            return match["text"]
        return f"{match['image']}[{match['text']}]({link}{match['anchor'] or ''})"

    return LINK.sub(rewritten, markdown)


def _page(path: str) -> str:
    """Return the page of a file of the repository."""
    if path.startswith(f"{NOTEBOOKS}/"):
        return path.replace(".ipynb", ".md")
    return PAGES.get(path, path.removeprefix("docs/"))


def notebook_markdown(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its images by file name."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(line for line in cell["source"] if not line.startswith("%")).strip("\n")
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source.strip():
            parts.append(f"```python\n{source}\n```")
        printed = ""
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if output["output_type"] == "stream":
                printed += "".join(output["text"])
            elif "image/png" in data:
                file = f"{name}-{len(images) + 1}.png"
                images[file] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the cell above]({file})")
            elif "text/html" in data:
                parts.append(f'<div class="notebook-output">{"".join(data["text/html"]).strip()}</div>')
            else:
                printed += "".join(data.get("text/plain", output.get("traceback", [])))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", images
