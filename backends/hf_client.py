"""One exchange with a hosted API: `AsyncInferenceClient` knows providers, URLs and formats; connections and lines are seen to here.

Its own exchange is not used, for what it cannot do: close one stream while others go on, tell a Retry-After, bound what an upstream
sends, refuse redirects, and read lines as server-sent events have them (it also breaks them at U+2028 and U+0085, which JSON may hold).
And it retries a refused text generation without the parameters that were refused: here a refusal is the end.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from huggingface_hub import AsyncInferenceClient, __version__, errors, utils
from huggingface_hub.inference._providers import get_provider_helper

from zmqserve.release import installed_version

from .hf_errors import Blame, shown
from .hf_registry import HostedModel
from .hf_retries import retry_after_s
from .hf_token import Token

http: Any = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
"""The library under huggingface_hub: httpx before its version 2, httpx2 from then on, with one interface."""

MOST_BYTES = 64 * 2**20
"""Of an answer that comes whole, and of one line of a stream."""
ERROR_BYTES = 16 * 2**10
"""Read of what comes with an error."""
ERROR_S = 2.0
"""How long what comes with an error may take."""
END_S = 0.25
"""How long a stream may take to end after its last event; a connection that has ended can be used again."""
_LINE_END = re.compile(rb"[\r\n]")


AGENT = f"zmqserve/{installed_version()}; hf_hub/{__version__}"
"""What upstreams are told of who asks: the library's own text lists what is installed here."""


def new_session(model: HostedModel) -> Any:
    """Connections to the model's upstream, kept open between requests. `set_async_client_factory` of huggingface_hub may change them."""
    session = utils.get_async_session()  # type: ignore[attr-defined]
    if model.base_url is not None:
        # The library's hooks are for the Hub: they log whole URLs, and HF_HUB_OFFLINE would keep us from a server of our own.
        session.event_hooks = {kind: [hook for hook in hooks if not _is_the_hubs(hook)] for kind, hooks in session.event_hooks.items()}
    return session


class UpstreamClient(AsyncInferenceClient):
    """The AsyncInferenceClient of one request to `model`; `body` goes over what it makes. Close it when no more is wanted.

    Raises hf_errors.Failure for whatever goes wrong with the exchange.
    """

    def __init__(self, session: Any, model: HostedModel, token: Token, blame: Blame, body: dict[str, Any]) -> None:
        # Where no token is set none may leave: the library would send the saved login to any URL.
        headers: Any = {"authorization": None} if token.value is None else None
        super().__init__(
            model.base_url or model.upstream_name,
            provider=None if model.base_url else model.provider,  # type: ignore[arg-type]
            token=token.value,
            headers=headers,
        )
        self._session = session
        self._blame = blame
        self._body = body
        self._limits = http.Timeout(None, connect=model.connect_timeout_s)
        self._response: Any = None
        self._lines: Any = None

    def __repr__(self) -> str:
        return f"UpstreamClient({self._blame!r})"

    async def close(self) -> None:
        """Close the connection, unless the answer has come to its end."""
        if self._lines is not None:
            await self._lines.aclose()
        if self._response is not None:
            await self._response.aclose()

    async def embeddings(self, texts: list[str], model: str) -> tuple[Any, int]:
        """OpenAI's embeddings at the base URL, which the library asks of providers only: a float32 array and the tokens used."""
        import numpy as np

        helper = get_provider_helper(None, task="feature-extraction", model=self.model)
        request: Any = helper.prepare_request(inputs=texts, parameters={}, headers=self.headers, model=self.model, api_key=self.token)
        parts = urlsplit(request.url)
        path = parts.path.rstrip("/").removesuffix("/embeddings").removesuffix("/v1")
        request.url = urlunsplit(parts._replace(path=f"{path}/v1/embeddings"))
        request.json = {"model": model, "input": texts, "encoding_format": "float"}
        content = json.loads(await self._inner_post(request))
        rows = sorted(content["data"], key=lambda row: row["index"])
        used = (content.get("usage") or {}).get("prompt_tokens")
        return np.array([row["embedding"] for row in rows], dtype="float32"), used if type(used) is int and used >= 0 else 0

    async def _inner_post(self, request_parameters: Any, *, stream: bool = False) -> Any:
        url = request_parameters.url
        wanted = "text/event-stream" if stream else "application/json"
        # Not packed: something on the way might wait for enough to pack.
        headers = {**request_parameters.headers, "accept": wanted, "accept-encoding": "identity", "user-agent": AGENT}
        body = {**request_parameters.json, **self._body}
        request = self._session.build_request("POST", url, json=body, headers=headers, timeout=self._limits)
        try:
            self._response = response = await self._session.send(request, stream=True, follow_redirects=False)
        except http.TransportError as error:
            raise self._blame.broken(f"cannot reach {shown(url)}: {_why(error)}") from None
        if response.status_code != 200:
            told_s = retry_after_s(response.headers.get("retry-after"))
            raise self._blame.status(response.status_code, url, await self._error_body(), told_s)
        kind = response.headers.get("content-type", wanted).partition(";")[0].strip().lower()
        if kind != wanted:
            raise self._blame.nonsense(f"{shown(url)} answers with {kind}, not with {wanted}: {await self._error_body()}")
        if stream:
            self._lines = self._stream_lines()
            return self._lines
        return await self._whole()

    async def _stream_lines(self) -> AsyncGenerator[str, None]:
        async with aclosing(self._chunks()) as chunks:
            async for line in split_lines(chunks, self._blame):
                if line.startswith("data:") and line[5:].strip() == "[DONE]":
                    try:
                        async with asyncio.timeout(END_S):
                            async for _ in chunks:
                                pass
                    except Exception:  # noqa: BLE001, S110 - the answer is there, whatever becomes of the connection
                        pass
                    return
                yield line

    async def _whole(self) -> bytes:
        parts = bytearray()
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                parts += chunk
                if len(parts) > MOST_BYTES:
                    raise self._blame.nonsense(f"the answer has more than {MOST_BYTES} bytes")
        return bytes(parts)

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._response.aiter_bytes()) as received:
                async for chunk in received:
                    yield chunk
        except http.TransportError as error:
            raise self._blame.broken(f"the connection broke off in the middle of an answer: {_why(error)}") from None
        except http.DecodingError as error:
            raise self._blame.nonsense(f"the answer cannot be unpacked: {_why(error)}") from None

    async def _error_body(self) -> str:
        """The beginning of it, as far as it can be had."""
        parts = bytearray()
        try:
            async with asyncio.timeout(ERROR_S), aclosing(self._response.aiter_bytes()) as received:
                async for chunk in received:
                    parts += chunk
                    if len(parts) >= ERROR_BYTES:
                        break
        except (TimeoutError, http.HTTPError, http.StreamError):
            pass
        return parts[:ERROR_BYTES].decode(errors="replace")


async def split_lines(chunks: AsyncIterator[bytes], blame: Blame) -> AsyncIterator[str]:
    """The lines of a stream of server-sent events: each ends with a line feed, a carriage return, or both. Empty ones are left out."""
    held = bytearray()
    async for chunk in chunks:
        *whole, rest = _LINE_END.split(chunk)
        for part in whole:
            held += part
            if held:
                yield _text(held, blame)
                held.clear()
        held += rest
        if len(held) > MOST_BYTES:
            raise blame.nonsense(f"a line of the stream has more than {MOST_BYTES} bytes")
    # What an unfinished line holds is not for sure whole: such an event is dropped, as the standard says.


def _text(line: bytearray, blame: Blame) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise blame.nonsense("the stream holds bytes that are not UTF-8") from None


def _is_the_hubs(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("huggingface_hub.")


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
