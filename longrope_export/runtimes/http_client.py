"""JSON over HTTP, with errors that say what the server said."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from longrope_export.errors import ModelError


class RefusedError(ModelError):
    """The server answered with an HTTP error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class JsonClient:
    """One server.

    Args:
        url: of it; a `/v1` at the end is left out.
        timeout: seconds of silence after which a request has failed.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout = timeout

    def call(self, path: str, **body: Any) -> Any:
        """POST a JSON object, or GET if there is none.

        Raises:
            ModelError: there is no answer, or it is not JSON.
        """
        where = self.url + path
        data = json.dumps(body).encode() if body else None
        try:
            request = urllib.request.Request(where, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise RefusedError(
                f"{where} answered {error.code} {error.reason}: {_message(said)}", error.code
            ) from error
        except TimeoutError as error:
            raise ModelError(
                f"{where} was silent for {self._timeout:g} seconds: give the server more threads, "
                "or a smaller --length"
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ModelError(f"{where} cannot be reached: {error}: is the server up?") from error
        try:
            return json.loads(text)
        except ValueError as error:
            raise ModelError(
                f"{where} did not answer in JSON, but {text[:80]!r}: is it llama-server or vLLM?"
            ) from error

    @contextmanager
    def reading(self, path: str, answer: Any) -> Iterator[None]:
        """A context in which missing parts of an answer become a ModelError."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{self.url}{path} did not answer as llama-server or vLLM do ({error!r}): "
                f"{json.dumps(answer)[:200]}"
            ) from error


def _message(body: str) -> str:
    """What an error body says: {"error": {"message": ...}}, {"message": ...}, or its text."""
    try:
        values = json.loads(body)
        inner = values.get("error", values)
        return str(inner["message"] if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError, KeyError):
        return " ".join(body.split())[:300]
