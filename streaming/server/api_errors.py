"""What goes wrong in the API, as OpenAI's clients parse it: a status code and an error object."""

from typing import Any

from starlette.responses import JSONResponse

from streaming.errors import BrookError, EngineBusy, EngineClosed, InvalidRequest, ModelUnavailable, PromptTooLong

RETRY_AFTER_S: dict[int, float] = {429: 2, 503: 5}
"""When a client may ask again: places become free sooner than models load, and clients do not ask often."""


class ApiError(Exception):
    """A request that is answered with an error object; `param` names the argument at fault."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.type = type
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The error object, which streams send as an event of their own."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def to_response(self) -> JSONResponse:
        """Give the answer to a request that has none yet."""
        headers = {"cache-control": "no-store"}
        if self.status_code == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status_code in RETRY_AFTER_S:
            headers["retry-after"] = str(RETRY_AFTER_S[self.status_code])
        return JSONResponse(self.body, self.status_code, headers)


def as_api_error(error: BrookError) -> ApiError:
    """Give what Brook raised as OpenAI would say it."""
    words = str(error)
    if isinstance(error, PromptTooLong):
        return ApiError(400, words, param=error.field, code="context_length_exceeded")
    if isinstance(error, InvalidRequest):
        return ApiError(400, words, param=error.field or None, code="invalid_value")
    if isinstance(error, EngineBusy):
        return ApiError(429, words, type="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, EngineClosed | ModelUnavailable):
        return ApiError(503, words, type="server_error", code="model_unavailable")
    return server_error(words)


def server_error(message: str) -> ApiError:
    """Say that a request was right and the server failed."""
    return ApiError(500, message, type="server_error")
