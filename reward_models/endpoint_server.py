"""Requests to a server of rewards: its URL and key from the environment, and what an error of it means.

Neither URL nor key is written to a log, a file or an error; whatever is said of them names the variable.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from reward_models.attempts import MayPassError
from vgf_llm.errors import ConfigError, ModelError
from vgf_llm.runs.files import shorten

TIMEOUT_SEC = 120.0
_GRACE_SEC = 5.0  # the caller's limit ends a call first; this closes the connection of one that was left behind
_LONGEST_MESSAGE = 300
_MAY_PASS = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_PRINTABLE = re.compile(r"[!-~]+")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows none: the key would go along to wherever it leads."""

    def redirect_request(self, *args: Any) -> None:
        return None


class EndpointServer:
    """A server that is asked for JSON.

    Args:
        url_variable: Environment variable with its URL, with or without /v1.
        key_variable: Environment variable with its key; where it is not set none is sent.
        timeout_sec: Seconds that an answer may take.

    Attributes:
        url: Without /v1; a secret.

    Raises:
        ConfigError: A variable has no usable value.
    """

    def __init__(self, url_variable: str, key_variable: str, timeout_sec: float) -> None:
        self.url_variable, self.key_variable, self.timeout_sec = url_variable, key_variable, timeout_sec
        self.url = _url(url_variable, key_variable)
        _key(key_variable)
        self._opener = urllib.request.build_opener(_NoRedirect, *_without_proxy(self.url))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request and return the answer's JSON.

        Raises:
            ConfigError: The key or URL is malformed.
            ModelError: The server refuses, or does not answer in JSON.
            MayPassError: It is busy, broken or not there.
        """
        key, server = _key(self.key_variable), f"the server of ${self.url_variable}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
            with self._opener.open(request, timeout=self.timeout_sec + _GRACE_SEC) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = self._without_secrets(error.read().decode(errors="replace"))
            message = f"{server} answers {path} with {error.code}: {shorten(' '.join(said.split()), _LONGEST_MESSAGE)}"
            if error.code in _MAY_PASS:
                raise MayPassError(message, _after_sec(error.headers.get("Retry-After"))) from None
            hint = f"; is ${self.key_variable} the right key?" if error.code in (401, 403) else ""
            raise ModelError(message + hint) from None
        except ValueError:
            raise ModelError(f"{server} answers {path} with something else than JSON; is it the right URL?") from None
        except http.client.InvalidURL:  # its reason shows the URL
            raise ConfigError(f"endpoint: {server} cannot be asked: the URL there is malformed") from None
        except (OSError, http.client.HTTPException) as error:  # urllib's own are OSErrors
            reason = getattr(error, "reason", None) or error
            message = self._without_secrets(f"{server} cannot be reached: {reason!r}; is it running?")
            raise MayPassError(message) from None

    def _without_secrets(self, text: str) -> str:
        for secret in (os.environ.get(self.key_variable), self.url):
            text = text.replace(secret, "***") if secret else text
        return text


def _url(variable: str, key_variable: str) -> str:
    url = os.environ.get(variable, "").rstrip("/")
    if not url.startswith(("http://", "https://")):
        state = "does not start with http:// or https://" if url else "is not set"
        raise ConfigError(
            f"endpoint: the environment variable {variable} {state}; set it to the server's URL, or name another as "
            "url_variable"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        good = _PRINTABLE.fullmatch(url) and parts.hostname and (parts.port is None or parts.port > 0)
        more = "@" in parts.netloc or bool(parts.query or parts.fragment)
    except ValueError:  # a port that is not a number
        good, more = None, False
    if not good or more:
        fault = "has a user, a query or a fragment in it" if more else "is malformed: a blank, a line break, or no host"
        raise ConfigError(
            f"endpoint: the URL in the environment variable {variable} {fault}; set it to http(s)://host:port, and put "
            f"the key into {key_variable}"
        )
    return url.removesuffix("/v1")


def _key(variable: str) -> str | None:
    """Return the key, or None where none is set.

    Raises:
        ConfigError: It has characters that a header cannot have; the message does not show it.
    """
    key = os.environ.get(variable)
    if key and not _PRINTABLE.fullmatch(key):
        raise ConfigError(
            f"endpoint: the key in the environment variable {variable} has a blank, a line break or a character "
            "outside ASCII; set it to the key alone"
        )
    return key or None


def _without_proxy(url: str) -> list[urllib.request.BaseHandler]:
    """Return what keeps requests to this machine from a proxy, which would look for the server on its own."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        here = False
    return [urllib.request.ProxyHandler({})] if here else []


def _after_sec(header: str | None) -> float | None:
    try:
        return None if header is None else float(header)
    except ValueError:  # a date
        return None
