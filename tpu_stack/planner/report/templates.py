"""Finds a page's template beside this file; an undefined name in it is an error.

Example:
    template("demo.html.jinja").render(report=report)
"""

from collections.abc import Callable
from pathlib import Path

import jinja2

from tpu_stack.units import bytes_text, seconds_text, si_text


def template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """The template called `name`, with filters `bytes`, `seconds`, `si` and those given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=bytes_text, seconds=seconds_text, si=si_text, **filters)
    return environment.get_template(name)
