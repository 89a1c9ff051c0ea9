"""Refusals in OpenAI's words, so that its client raises the exception its users expect.

>>> raise ApiError(404, "The model `x` does not exist", param="model", code="model_not_found")
Traceback (most recent call last):
tpu_stack.serving.http.errors.ApiError: The model `x` does not exist
"""

import math
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.serving.requests import QueueFull

_TYPES = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}


class ApiError(UserError):
    """An answer that is no success.

    Attributes:
      status: the HTTP status. param: the field at fault. code: OpenAI's word for the fault.
      headers: more for the client, such as when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        server = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, server)
        fields = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def full(error: QueueFull) -> ApiError:
    """429 with the seconds to wait, rounded up as the header wants whole ones."""
    retry = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    return ApiError(429, str(error), code="rate_limit_exceeded", headers=retry)


def draining() -> ApiError:
    """503 while the server waits for its last requests."""
    return ApiError(
        503,
        "the server is shutting down and takes no more requests",
        code="service_unavailable",
        headers={"Retry-After": "5", "Connection": "close"},
    )
