"""Errors in OpenAI's format: a status, and {"error": {"message", "type", "param", "code"}}."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException


logger = logging.getLogger(__name__)
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """What a client is told."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A request that is wrong."""
    return APIError(400, message, param, code)


def of_fields(error: ValidationError | RequestValidationError) -> APIError:
    """The first field of a body that is wrong."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return invalid(f"Unrecognized request argument supplied: {param}.", param, "unknown_parameter")
    return invalid(f"{param or 'The body'}: {first['msg']}.", param)


def add_handlers(app: FastAPI) -> None:
    """Answers every error of the app in OpenAI's format."""

    @app.exception_handler(APIError)
    async def known(request: Request, error: APIError):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError):
        return of_fields(error).response()

    @app.exception_handler(HTTPException)
    async def of_route(request: Request, error: HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}."
        return APIError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception):
        return APIError(500, "The server had an error; its log says which.").response()
