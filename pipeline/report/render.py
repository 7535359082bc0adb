"""The templates of this folder, filled in. All text is escaped, as it comes from models, data and settings."""

import base64
import re
from pathlib import Path
from typing import Any

from data.durable import file_sha256

FOLDER = Path(__file__).parent
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|])")  # in Markdown


def render(name: str, **content: Any) -> str:
    """`name` from NAME.jinja, where {{ text }} is escaped for HTML, or for Markdown where the name ends in .md."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def plain(value: Any) -> Markup:
        """Text in which nothing is Markdown."""
        return value if isinstance(value, Markup) else Markup(re.sub(r"[\r\n]", " ", SPECIAL.sub(r"\\\1", str(value))))

    def code(text: str) -> Markup:
        shown = text.replace("`", "'").replace("\n", " ")
        return Markup(f"`{shown}`")

    def data_uri(svg: str) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=plain if name.endswith(".md") else None,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"code": code, "data_uri": data_uri}
    text = environment.get_template(f"{name}.jinja").render(content).strip() + "\n"
    return re.sub(r"\n{3,}", "\n\n", text) if name.endswith(".md") else text


def sources() -> dict[str, dict[str, str]]:
    """The sha256 of each file, beside the code, that decides what a report looks like."""
    paths = sorted(path for path in FOLDER.iterdir() if path.suffix in (".jinja", ".mplstyle"))
    return {path.name: {"sha256": file_sha256(path)} for path in paths}
