"""Answers from servers that fail in every way: none is lost or doubled, and what cannot be mended stops at once."""

import collections
import dataclasses

import pytest
from helpers_servers import FAILURES, MASKED, NORMAL, QUESTIONS, Server, plan

from retmask_jax.training.endpoints import Endpoints, sample
from retmask_jax.training.pairs import answer


def _endpoints(normal, masked=None, **options):
    urls = {NORMAL: normal.url, MASKED: f"{(masked or normal).url}/v1/"}
    settings = {"concurrency": 8, "timeout": 0.4, "retries": 8, "first_wait": 0.001}
    return Endpoints(urls, "our/model", **settings | options)


def _ask(endpoints, questions=QUESTIONS):
    return sample(endpoints, questions, temperature=0.6, top_p=0.9, max_new_tokens=17)


def _healthy(serve):
    records = list(_ask(_endpoints(serve(), serve("masked"))))
    return dict(records)


def test_a_healthy_server_is_asked_what_was_meant(serve):
    found = _healthy(serve)
    assert set(found) == {question.key for question in QUESTIONS}
    for question in QUESTIONS:
        body = {
            "model": "our/model",
            "messages": question.messages,
            "temperature": 0.6,
            "top_p": 0.9,
            "max_tokens": 17,
            "seed": question.draw,
        }
        name = {NORMAL: "normal", MASKED: "masked"}[question.variant]
        choice = Server.answer(collections.namedtuple("Named", "name")(name), body)["choices"][0]
        wanted = answer(choice["message"]["content"], choice["finish_reason"] == "stop", 7)
        assert found[question.key] == wanted
    assert {record["finished"] for record in found.values()} == {True, False}


def test_a_fifth_of_calls_failing_changes_nothing(serve):
    wanted = _healthy(serve)
    # Every failure comes at least once.
    servers = serve("normal", [*FAILURES, *plan(200, 0.2)]), serve("masked", plan(200, 0.2, seed=1))
    records = list(_ask(_endpoints(*servers)))
    assert len(records) == len(wanted)
    assert dict(records) == wanted
    assert sum(len(server.seen) for server in servers) > len(wanted) + len(FAILURES)


def test_what_is_missing_is_left_for_the_next_run(serve):
    wanted = _healthy(serve)
    servers = serve("normal", plan(60, 0.4)), serve("masked", plan(60, 0.4))
    stored, runs = {}, 0
    while len(stored) < len(wanted):
        todo = [question for question in QUESTIONS if question.key not in stored]
        before, runs = len(stored), runs + 1
        try:
            for key, record in _ask(_endpoints(*servers, retries=0), todo):
                assert key not in stored
                stored[key] = record
        except ValueError as error:
            missing = len(todo) - (len(stored) - before)
            assert f"{missing} of {len(todo)} answers are missing (the last one because of http://127" in str(error)
            assert "run the same command again" in str(error)
            assert "\n" not in str(error)
    assert stored == wanted and runs > 1


def test_a_server_that_is_gone_is_not_asked_for_ever_and_holds_up_no_other(serve):
    good, gone = serve(), serve("masked", ["500"] * 1000)
    records = []
    with pytest.raises(ValueError, match="40 of 80 answers are missing .*500 Internal Server Error: too much"):
        records.extend(_ask(_endpoints(good, gone, concurrency=2, retries=1)))
    # `extend` keeps what came before the error.
    assert sorted(key[2] for key, _ in records) == sorted(f"p{i}" for i in range(40))
    assert 8 <= len(gone.seen) <= 16  # two failures a thread, of two tries each, and what was under way


@pytest.mark.parametrize(("status", "words"), [(401, "invalid api key"), (404, "no model our/model\nhere")])
def test_what_no_retry_mends_stops_at_once_with_the_servers_words(serve, status, words):
    server = serve("normal", [(status, words)] * 1000)
    with pytest.raises(ValueError, match=f"refused prompt p[0-9]+: {status} .*: {' '.join(words.split())}"):
        list(_ask(_endpoints(server, concurrency=2)))
    assert len(server.seen) <= 6


def test_retry_after_is_honoured_and_waits_grow(serve, monkeypatch):
    server = serve("normal", ["429", "500", "500", "500", "500"])
    list(_ask(_endpoints(server, first_wait=0.02), QUESTIONS[:1]))
    times = [seen[0] for seen in server.seen]
    waits = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert len(waits) == 5 and waits[0] > 0.05
    assert all(0.5 * 0.02 * 2**i < wait for i, wait in enumerate(waits))


def test_an_answer_that_only_trickles_in_is_asked_for_again(serve):
    server = serve("normal", ["trickle"])
    assert len(list(_ask(_endpoints(server), QUESTIONS[:1]))) == 1
    first, second = (seen[0] for seen in server.seen)
    assert 0.4 < second - first < 1.2  # the timeout is 0.4


def test_the_key_and_the_templates_arguments_are_sent(serve, monkeypatch):
    server = serve()
    list(_ask(_endpoints(server), QUESTIONS[:1]))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    list(_ask(_endpoints(server, template_kwargs={"enable_thinking": True}), QUESTIONS[-1:]))
    (_, path, headers, body), (_, again, later, more) = server.seen
    assert path == again == "/v1/chat/completions"
    assert "Authorization" not in headers and later["Authorization"] == "Bearer secret"
    assert "chat_template_kwargs" not in body and more["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("message", "begin", "text"),
    [
        ({"content": "<think>hm</think>yes"}, "<think>", "<think>hm</think>yes"),
        ({"content": "\n\nyes", "reasoning_content": "\nhm\n"}, "<think>", "<think>\nhm\n</think>\n\nyes"),
        ({"content": "yes", "reasoning": "hm"}, "", "hm</think>yes"),  # the prompt ends with <think>
        ({"content": None, "reasoning": "hm"}, "<think>", "<think>hm"),  # cut before the answer
        ({"content": ""}, "<think>", ""),
    ],
)
def test_thoughts_stand_before_the_answer(serve, message, begin, text):
    server = serve("normal", [{"choices": [{"message": message, "finish_reason": "length"}]}])
    (found,) = _ask(_endpoints(server, thoughts_begin=begin), QUESTIONS[:1])
    assert found == ((0, "normal", "p0"), {"text": text, "finished": False, "tokens": 0})


# --- keys ---

KEY = "sk-4f9a/secret+KEY=="


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def _line(call) -> str:
    """The message of a mistake: one line, without the key or a part of it."""
    with pytest.raises(ValueError) as told:
        call()
    line = str(told.value)
    assert "\n" not in line and "secret" not in line and "sk-4f9a" not in line and "KEY==" not in line
    return line


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("to", ["another host", "the same host"])
def test_a_redirect_is_refused_with_both_addresses_and_takes_the_key_nowhere(serve, key, status, to):
    other = serve("other")
    server = serve("normal")
    base = other.url if to == "another host" else f"{server.url}/moved"
    server.plan.extend([(status, "moved", {"Location": f"{base}/v1/chat/completions"})] * 200)
    endpoints = _endpoints(server, concurrency=2)
    line = _line(lambda: list(_ask(endpoints)))
    assert line.startswith(f"{server.url}/v1/chat/completions redirects to {base}/v1/chat/completions ({status})")
    assert line.endswith(f"set the endpoint to {base}") and not other.seen and len(server.seen) <= 6
    assert {path for _, path, _, _ in server.seen} == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    "location, shown",
    [
        ("/v1/chat/completions?key=" + KEY, "v1/chat/completions?key=*** (302)"),
        ("//me:secret@b:1/", "http://***@b:1/ (302)"),
        ("file:///etc/passwd", "file:///etc/passwd (302)"),
        ("http://[b", "http://[b (302)"),
        (None, "answers 302, a redirect that names no other address"),
    ],
)
def test_where_a_redirect_leads_is_shown_without_what_is_secret_in_it(serve, key, location, shown):
    server = serve("normal", [(302, "moved", {"Location": location} if location else {})] * 200)
    assert shown in _line(lambda: list(_ask(_endpoints(server, concurrency=1))))


@pytest.mark.parametrize("around", ["\n", "\r\n", " \t", ""])
def test_blanks_and_line_ends_around_a_key_are_left_out(serve, monkeypatch, around):
    server = serve()
    monkeypatch.setenv("OPENAI_API_KEY", f"{around}{KEY}{around}")
    assert len(list(_ask(_endpoints(server), QUESTIONS[:1]))) == 1
    assert server.seen[0][2]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "damage, what",
    [
        ("\n", "a line end at place 21 of 41"),
        ("\r", "a line end at place 21"),
        ("\r\n ", "a line end at place 21 of 43"),
        ("\x01", "a control character at place 21"),
        ("\x7f", "a control character"),
        ("\u2026", "a character beyond ASCII"),
        ("\u00e9", "a character beyond ASCII"),
        (" ", "a blank at place 21 of 41"),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused_unseen_before_anything_is_asked(serve, monkeypatch, damage, what):
    server = serve()
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}{damage}{KEY}")
    assert _line(lambda: _ask(_endpoints(server))).startswith(f"OPENAI_API_KEY has {what}") and not server.seen


def test_an_empty_key_is_none(serve, monkeypatch):
    server = serve()
    monkeypatch.setenv("OPENAI_API_KEY", " \n")
    assert len(list(_ask(_endpoints(server), QUESTIONS[:1]))) == 1
    assert "Authorization" not in server.seen[0][2]


@pytest.mark.parametrize(
    "failure",
    [
        (401, f"Incorrect API key provided: {KEY}. Find yours"),
        (500, "x" * 295 + KEY),
        (200, f"no key {KEY}"),
        (200, "y" * 190 + KEY),
        (429, f'{{"error": "{KEY}"}}'),
    ],
)
def test_a_key_that_the_server_repeats_is_in_no_message(serve, key, failure):
    server = serve("normal", [failure] * 1000)
    line = _line(lambda: list(_ask(_endpoints(server, concurrency=1, retries=0), QUESTIONS[:3])))
    assert "*" in line


def test_a_password_in_an_address_is_refused_unseen():
    for url in ("http://me:secret@a:8000/v1", "https://secret@a", "http://me:se@secret@a"):
        line = _line(lambda url=url: Endpoints({NORMAL: url}, "m"))
        assert "://***@a" in line and "put the key of the server into OPENAI_API_KEY" in line
    assert "'***@a:8000' is no address" in _line(lambda: Endpoints({NORMAL: "me:secret@a:8000"}, "m"))
    assert Endpoints({NORMAL: "http://a/@b"}, "m").urls  # a path may hold one


def test_a_password_of_a_proxy_is_in_no_message(monkeypatch):
    from retmask_jax.training import endpoints

    monkeypatch.setenv("http_proxy", "http:/me:secret@proxy:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    endpoints._opener.cache_clear()
    try:
        asked = Endpoints({NORMAL: "http://a.invalid"}, "m", concurrency=1, retries=0)
        assert "cannot be asked: " in _line(lambda: list(_ask(asked, QUESTIONS[:1])))
    finally:
        endpoints._opener.cache_clear()


def test_bad_settings_are_refused(serve):
    good = Endpoints({NORMAL: "http://x"}, "m")
    with pytest.raises(ValueError, match="'localhost:8000' is no address"):
        dataclasses.replace(good, urls={NORMAL: "localhost:8000"})
    with pytest.raises(ValueError, match="they are 0, 600.0 and 8"):
        dataclasses.replace(good, concurrency=0)
