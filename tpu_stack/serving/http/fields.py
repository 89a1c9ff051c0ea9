"""A JSON body read field by field, so that a wrong one is named in the answer.

>>> fields = Fields(parse_body(b'{"n": 2, "temperature": 0.5}'))
>>> fields.integer("n", 1, low=1, high=8), fields.number("temperature", 1.0, low=0, high=2)
(2, 0.5)
>>> fields.finish()  # refuses fields that were not read
"""

import json
import math
from typing import Any, Never

from tpu_stack.serving.http.errors import ApiError

_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def named(value: Any) -> str:
    """The JSON type of a value, as OpenAI's messages spell it."""
    return _NAMES[type(value)]


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def wrong_type(param: str, wanted: str, value: Any) -> ApiError:
    """400 for a value of another JSON type."""
    got = named(value)
    return invalid(
        param,
        f"Invalid type for '{param}': expected {wanted}, but got {got} instead.",
        "invalid_type",
    )


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError 400 for anything else, NaN and Infinity too."""

    def refuse(constant: str) -> Never:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8: byte {error.start} is wrong.") from error
    try:
        body = json.loads(text, parse_constant=refuse)
        if "\\ud" in text.lower():
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(400, "The body holds half of a surrogate pair, which is no text.") from error
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ApiError(400, f"The body is not JSON that can be read: {said}.") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"The body must be a JSON object, and is {named(body)}.")
    return body


class Fields:
    """Takes known fields out of a body; null counts as absent, as in OpenAI's API."""

    def __init__(self, body: dict[str, Any], prefix: str = ""):
        self._body = dict(body)
        self._prefix = prefix

    def path(self, name: str) -> str:
        """The field's name with the object it is in, as errors give it."""
        return f"{self._prefix}{name}"

    def take(self, name: str) -> Any:
        """The raw value, None when absent."""
        return self._body.pop(name, None)

    def require(self, name: str) -> Any:
        """The raw value. Raises ApiError when absent."""
        value = self.take(name)
        if value is None:
            path = self.path(name)
            message = f"Missing required parameter: '{path}'."
            raise invalid(path, message, "missing_required_parameter")
        return value

    def typed[T](self, name: str, kind: type[T], default: T) -> T:
        """A boolean, string, array or object."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not kind:
            raise wrong_type(self.path(name), named(kind()), value)
        return value

    def integer[D](self, name: str, default: D, *, low: int, high: int) -> int | D:
        """An integer within bounds; 2.0 is not one."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int:
            raise wrong_type(self.path(name), "an integer", value)
        self._bound(name, value, low, high, "integer")
        return value

    def number[D](self, name: str, default: D, *, low: float, high: float) -> float | D:
        """A finite number within bounds."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise wrong_type(self.path(name), "a decimal", value)
        if isinstance(value, float) and not math.isfinite(value):
            raise invalid(self.path(name), f"Invalid '{self.path(name)}': it is not finite.")
        self._bound(name, value, low, high, "decimal")
        return float(value)

    def _bound(self, name: str, value: float, low: float, high: float, kind: str) -> None:
        path = self.path(name)
        for wrong, word, way, bound in (
            (value < low, "below_min", ">=", low),
            (value > high, "above_max", "<=", high),
        ):
            if wrong:
                shown = f"{value}" if abs(value) < 1e18 else "a huge number"
                message = f"Invalid '{path}': {kind} {word.replace('_', ' ')} value."
                message += f" Expected a value {way} {bound}, but got {shown} instead."
                raise invalid(path, message, f"{kind}_{word}_value")

    def ignore(self, *names: str) -> None:
        """Drops fields that OpenAI knows and that change nothing here."""
        for name in names:
            self.take(name)

    def refuse(self, name: str, *harmless: Any) -> None:
        """Raises ApiError when a field that is not supported asks for something."""
        value = self.take(name)
        if value is not None and value not in harmless:
            path = self.path(name)
            raise invalid(path, f"'{path}' is not supported by this server.", "unsupported_value")

    def finish(self) -> None:
        """Raises ApiError when a field is unknown, as OpenAI does."""
        if self._body:
            path = self.path(min(self._body))[:100]
            raise invalid(path, f"Unknown parameter: '{path}'.", "unknown_parameter")
