"""Answers from OpenAI-compatible servers such as vLLM: one serves the model, others serve masked checkpoints.

Known limit: the server draws the answers. It receives the seed of each question, but how it uses the seed depends on
the server, its version and often on what else it is answering. So answers differ from those sampled by this package.
"""

import contextlib
import dataclasses
import email.utils
import functools
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retmask_jax.training.pairs import Question, StoredAnswer, Variant, answer
from retmask_jax.utils.compiled import waiting
from retmask_jax.utils.keys import clean_key, has_password, without_secrets
from retmask_jax.utils.progress import with_rate

_PASSING = (408, 409, 425, 429)  # statuses below 500 that go away
_LONGEST_WAIT, _LONGEST_ASKED = 60.0, 600.0  # seconds between two tries: ours, and what Retry-After may ask for
_KEY = "OPENAI_API_KEY"
_PATH = "/v1/chat/completions"
_GONE = 2  # a server with so many failed questions in a row, per thread, is taken to be down


@dataclasses.dataclass(frozen=True)
class Endpoints:
    """The server of each variant, and how it is asked.

    Attributes:
        urls: {variant: base address of its server, with or without /v1}.
        model: Name under which the servers serve the model.
        concurrency: Questions under way at once, for each server.
        timeout: Seconds for one answer.
        retries: How often a failed call is repeated, after 1, 2, 4, ... up to 60 seconds, or after what Retry-After
            says.
        template_kwargs: Arguments for the server's chat template.
        thoughts_begin: What the model writes before its thoughts, put back where the server has split them off.
        first_wait: Seconds before the first retry.
    """

    urls: Mapping[Variant, str]
    model: str
    concurrency: int = 64
    timeout: float = 600.0
    retries: int = 8
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    thoughts_begin: str = "<think>"
    first_wait: float = 1.0

    def __post_init__(self):
        for url in self.urls.values():
            if not url.startswith(("http://", "https://")):
                shown = without_secrets(f"//{url}")[2:]  # also where the scheme is what is missing
                raise ValueError(f"endpoint {shown!r} is no address: it must begin with http:// or https://")
            if has_password(url):
                raise ValueError(
                    f"endpoint {without_secrets(url)} has a user or a password, which is not sent: leave it out, "
                    f"and put the key of the server into {_KEY}"
                )
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise ValueError(
                f"endpoints need concurrency >= 1, timeout > 0 and retries >= 0; they are {self.concurrency}, "
                f"{self.timeout} and {self.retries}"
            )


def sample(
    endpoints: Endpoints, questions: Sequence[Question], *, temperature: float, top_p: float, max_new_tokens: int
) -> Iterator[StoredAnswer]:
    """Yields (key, answer) for each question, in the order in which the servers answer.

    A question all of whose tries failed is left out, and a server that fails many times in a row is not asked again.
    The servers' key is read from the environment variable OPENAI_API_KEY, without blanks around it; it is sent to no
    address but the endpoint's and stands in no message.

    Raises:
        ValueError: The key cannot be sent; a server refuses in a way that no retry changes (status 401, 404, a
            redirect), with the server's words; or, at the end, answers are missing.
    """
    _key()
    options: dict[str, Any] = {
        "model": endpoints.model,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_new_tokens,
    }
    if endpoints.template_kwargs:
        options["chat_template_kwargs"] = dict(endpoints.template_kwargs)
    answers = _in_threads(endpoints, questions, options)
    return with_rate(answers, lambda stored: stored[1]["tokens"], len(questions), "ask the endpoints")


class _Failed(Exception):
    """A call that may succeed if it is repeated; wait: the seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


def _in_threads(endpoints: Endpoints, questions: Sequence[Question], options) -> Iterator[StoredAnswer]:
    """Asks each server in separate threads, so that a slow one holds up no other. Each thread ends with the result
    None."""
    results, stops = queue.SimpleQueue(), {}
    for url in set(endpoints.urls.values()):
        todo, stops[url] = queue.SimpleQueue(), threading.Event()
        for question in questions:
            if endpoints.urls[question.variant] == url:
                todo.put(question)
        for _ in range(endpoints.concurrency):
            # Daemon threads, so that an interrupted run does not wait for answers under way.
            threading.Thread(
                target=_work, args=(endpoints, url, todo, options, stops[url], results), daemon=True
            ).start()
    try:
        yield from _collect(results, stops, endpoints.concurrency, len(questions))
    finally:
        for stop in stops.values():
            stop.set()


def _work(endpoints: Endpoints, url: str, todo, options, stop: threading.Event, results) -> None:
    try:
        while not stop.is_set():
            results.put((url, _patiently(endpoints, todo.get_nowait(), options, stop)))
    except queue.Empty:
        pass
    except Exception as error:  # raised where the results are read
        results.put((url, error))
    results.put((url, None))


def _collect(results, stops: Mapping[str, threading.Event], concurrency: int, total: int) -> Iterator[StoredAnswer]:
    """The answers as they come; ValueError after the last of them if some are missing."""
    answered, in_a_row, failure, running = 0, dict.fromkeys(stops, 0), None, concurrency * len(stops)
    while running:
        with waiting():
            url, result = results.get()
        if result is None:
            running -= 1
        elif isinstance(result, _Failed):
            failure, in_a_row[url] = result, in_a_row[url] + 1
            if in_a_row[url] == _GONE * concurrency:
                stops[url].set()
        elif isinstance(result, Exception):
            raise result
        else:
            answered, in_a_row[url] = answered + 1, 0
            yield result
    if failure is not None:
        raise ValueError(
            f"{total - answered} of {total} answers are missing (the last one because of {failure}); the others are "
            "kept: run the same command again to go on"
        )


def _patiently(endpoints: Endpoints, question: Question, options, stop: threading.Event) -> StoredAnswer | _Failed:
    """The answer, or the last failure."""
    retry = 0
    while True:
        try:
            return _ask(endpoints, question, options)
        except _Failed as error:
            failure = error
        wait = min(endpoints.first_wait * 2**retry, _LONGEST_WAIT) * random.uniform(0.5, 1)
        if retry == endpoints.retries or stop.wait(max(wait, failure.wait)):
            return failure
        retry += 1


def _ask(endpoints: Endpoints, question: Question, options) -> StoredAnswer:
    url, key = f"{endpoints.urls[question.variant].rstrip('/').removesuffix('/v1')}{_PATH}", _key()
    body = options | {"messages": list(question.messages), "seed": question.draw}
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    deadline = time.monotonic() + endpoints.timeout
    try:
        with _opener().open(request, timeout=endpoints.timeout) as response:
            content = _read(response, deadline)
    except urllib.error.HTTPError as error:
        raise _refused(url, question, error, key) from error
    except (OSError, http.client.HTTPException) as error:  # no connection, reset, timeout, body cut short
        raise _Failed(f"{url}: {without_secrets(repr(error), key)}") from error
    except ValueError as error:  # such as an invalid address of a proxy in the environment
        raise ValueError(f"{url} cannot be asked: {without_secrets(str(error), key)}") from error
    try:
        return question.key, _parse(json.loads(content), endpoints.thoughts_begin)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        said = without_secrets(content[: 2**16].decode(errors="replace"), key)
        raise _Failed(f"{url}: no whole answer but {said[:200]!r}") from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the key to wherever it points, and take what is there for an answer."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> None:
        return None  # urllib then raises an HTTPError

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirects)


def _key() -> str:
    """The key to send, "" where there is none."""
    return clean_key(os.environ.get(_KEY, ""), _KEY)


def _read(response, deadline: float) -> bytes:
    """The body of an answer, read until the deadline: a server may send a byte now and then for ever."""
    parts = []
    while part := response.read1(2**16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _refused(url: str, question: Question, error: urllib.error.HTTPError, key: str) -> Exception:
    try:
        words = error.read(2**16).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        words = ""
    if 300 <= error.code < 400:
        return _redirected(url, error, key)
    said = f"{error.code} {without_secrets(error.reason, key)}: {' '.join(without_secrets(words, key).split())[:300]}"
    if error.code >= 500 or error.code in _PASSING:
        return _Failed(f"{url}: {said}", _asked_wait(error.headers.get("Retry-After")))
    return ValueError(f"{url} refused prompt {question.id}: {said}")


def _redirected(url: str, error: urllib.error.HTTPError, key: str) -> ValueError:
    target = "".join((error.headers.get("Location") or "").split())
    with contextlib.suppress(ValueError):  # an invalid address is shown as it is
        target = urllib.parse.urljoin(url, target)
    if target == url:
        return ValueError(
            f"{url} answers {error.code}, a redirect that names no other address: is this an OpenAI-compatible server?"
        )
    target = without_secrets(target, key)
    return ValueError(
        f"{url} redirects to {target[:300]} ({error.code}), where neither key nor prompts are sent: if that is "
        f"the server, set the endpoint to {target.removesuffix(_PATH)[:300]}"
    )


def _asked_wait(header: str | None) -> float:
    """Seconds that Retry-After asks for, given as such or as a date."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_ASKED)


def _parse(body: Any, thoughts_begin: str) -> dict[str, Any]:
    """The answer to be stored. Thoughts that the server has split off are put back before the text, as the model
    wrote them."""
    choice = body["choices"][0]
    message, reason = choice["message"], choice["finish_reason"]
    thoughts, text = message.get("reasoning_content") or message.get("reasoning"), message.get("content")
    if not (isinstance(text, str) or thoughts) or reason in (None, "abort", "error"):
        raise ValueError("no text, or the server gave up on it")
    if thoughts:
        text = f"{thoughts_begin}{thoughts}" + (f"</think>{text}" if text else "")
    tokens = int((body.get("usage") or {}).get("completion_tokens") or 0)
    return answer(text, finished=reason == "stop", tokens=tokens)
