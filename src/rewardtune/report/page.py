"""A self-contained page from a template: style, script and data inside, everything else forbidden by its own policy.

Strings reach the page by two ways only: through jinja2's escaping, and as JSON in which `<`, `>` and `&` are escapes
and which the script puts on the page as text. The content security policy names the hashes of our own style and script,
so anything that got past the escaping could neither run nor ask the network for anything.
"""

import base64
import hashlib
import json
import math
from functools import lru_cache
from importlib.resources import files
from typing import Any

from ..modelcard import CONTROLS, TURNS


def render(name: str, *, data: Any, **context: Any) -> str:
    """The page `name`.html.j2 with `name`.js and the common style; `data` is what the script reads.

    Numbers of `data` that are not finite become null.
    """
    from markupsafe import Markup

    style, script = _asset("style.css"), _asset("common.js") + _asset(f"{name}.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    html = _environment().get_template(f"{name}.html.j2").render(
        **context, policy=policy, style=Markup(style), script=Markup(script), data=Markup(as_data(data))
    )  # fmt: skip
    return html.encode("utf-8", "replace").decode()  # a lone surrogate in a prompt is no reason to fail


def as_data(value: Any) -> str:
    """JSON that may stand in a <script> element whatever strings it holds."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def clean(text: Any) -> str:
    """Text without control characters and marks that turn the direction of reading; lines stay."""
    import unicodedata

    def kept(char: str) -> str:
        turns = char in TURNS or (unicodedata.category(char) in CONTROLS and char != "\n")
        return " " if turns else char

    return "".join(map(kept, str(text)))


@lru_cache
def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


@lru_cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
