"""The page at `/`: a playground and live charts, one HTML file that needs nothing else.

Example:
    page_response(host).headers["content-security-policy"]
"""

import secrets
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from starlette.responses import HTMLResponse

from tpu_stack.serving.http.host import Host

TEMPLATE = "page.html.jinja"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE)


def _words(value: Any) -> str:
    """A fact as a person reads it: a mesh as data=2, tensor=4."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_words(item)}" for name, item in value.items())
    return str(value)


def page_response(host: Host) -> HTMLResponse:
    """The page with a policy that lets only its own script and style run."""
    nonce = secrets.token_urlsafe(18)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    )
    text = _template().render(
        nonce=nonce,
        model=host.model.id,
        window=host.model.service.max_length,
        facts={name: _words(value) for name, value in host.model.service.describe().items()},
        needs_key=bool(host.keys),
        chats=host.model.chat.chat_template is not None,
    )
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    return HTMLResponse(text, headers=headers)
