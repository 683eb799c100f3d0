"""Model names: what they stand for, what is asked of the hub and in which order, and each error in one line.

huggingface_hub itself runs, against a small server here that speaks the part of the hub's API it needs.
"""

import errno
import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from retmask_jax.generation.language_model import load
from retmask_jax.hf.hub import BUNDLED, config_folder, resolve
from retmask_jax.hf.weights import read

SHARDED = Path(__file__).parents[1] / "golden" / "sharded"
NAME, TOKEN = "owner/name", "hf_aSecretOfMine"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
OTHER_FORMS = {
    "README.md": b"",
    "modeling.py": b"",
    "model.gguf": b"",
    "consolidated.safetensors": b"",
    "params.json": b"{}",
    "pytorch_model.bin": b"",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.safetensors.index.json": b"{}",
    "original/consolidated.00.pth": b"",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"",
    "adapter.safetensors": b"",
}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "golden.npz"}


TINY = files_of(BUNDLED)


def with_config(**changes):
    """The bundled model with other attributes in its config.json."""
    return TINY | {"config.json": json.dumps(json.loads(TINY["config.json"]) | changes).encode()}


@functools.cache
def digest(data):
    return hashlib.sha1(data).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {branch: {file: bytes}}}; what was asked for is in `requests`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos = {NAME: {"main": TINY}}
        self.refusals = {}  # name -> (status, headers), whatever is asked for
        self.cut = set()  # files whose connection breaks half-way
        self.pushed = None  # files that main has from the moment its config.json was fetched
        self.requests = []  # (method, path, authorization)

    def commit(self, name, branch="main"):
        """The id of a branch's commit."""
        return digest(repr({path: digest(data) for path, data in self.repos[name][branch].items()}).encode())

    def fetched(self, method="GET"):
        """{file: revision it was asked for in} of the files requested so far."""
        paths = [path.partition("/resolve/")[2] for used, path, _ in self.requests if used == method]
        return {file: revision for revision, _, file in (path.partition("/") for path in paths) if file}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers["Authorization"]))
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        if match is None:
            return self._answer(404)
        name, kind, revision, file = match.groups()
        if name in self.server.refusals:
            return self._answer(self.server.refusals[name][0], self.server.refusals[name][1])
        if name not in self.server.repos:
            return self._answer(404, {"X-Error-Code": "RepoNotFound"})
        branches = self.server.repos[name]
        commits = {branch: self.server.commit(name, branch) for branch in branches}
        found = [branch for branch in branches if (revision or "main") in (branch, commits[branch])]
        if not found:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        files, commit = branches[found[0]], commits[found[0]]
        here = {"X-Repo-Commit": commit}
        if kind == "resolve":
            if file not in files:
                return self._answer(404, here | {"X-Error-Code": "EntryNotFound"})
            if self.server.pushed and (self.command, file) == ("GET", "config.json"):
                branches["before"], branches["main"], self.server.pushed = files, self.server.pushed, None
            headers = here | {"ETag": f'"{digest(files[file])}"'}
            return self._answer(200, headers, files[file], cut=file in self.server.cut)
        listing = [
            {"type": "file", "path": path, "rfilename": path, "size": len(data), "oid": digest(data)}
            for path, data in files.items()
        ]
        content = listing if kind == "tree" else {"id": name, "sha": commit, "siblings": listing, "private": False}
        return self._answer(200, here | {"Content-Type": "application/json"}, json.dumps(content).encode())

    do_HEAD = do_GET

    def _answer(self, status, headers=(), body=b"", cut=False):
        self.send_response(status)
        for key, value in (dict(headers) | {"Content-Length": len(body)}).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The server as the hub of this process, with an empty cache, nobody logged in, and no waiting between retries.

    The environment is read when huggingface_hub is imported, so here its constants are set; a test below sets the
    environment of new processes.
    """
    point_at(server.url, monkeypatch)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    return server


def point_at(url, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # versions before 1.0 have the second one's copy
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def error_of(call, *args, **kwargs):
    """The one line a call is refused with."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line and TOKEN not in line
    return line


# --- what is fetched ---


def test_a_hub_id_becomes_a_folder_with_all_that_is_read_and_nothing_else(hub):
    hub.repos[NAME]["main"] = TINY | OTHER_FORMS
    folder = resolve(NAME)
    wanted = TEXTS | {WEIGHTS}
    assert files_of(folder) == {file: (TINY | OTHER_FORMS)[file] for file in wanted}
    assert set(hub.fetched()) == set(hub.fetched("HEAD")) == wanted
    assert read(folder, "float32")[0] == read(BUNDLED, "float32")[0]


@pytest.mark.parametrize("stem", ["model", "consolidated"])
def test_of_several_weight_files_those_the_index_names_are_fetched(hub, stem):
    stored = {file.replace("model-", f"{stem}-"): data for file, data in files_of(SHARDED).items()}
    stored[INDEX] = stored[INDEX].replace(b"model-", f"{stem}-".encode())
    hub.repos[NAME]["main"] = stored | OTHER_FORMS
    folder = resolve(NAME)
    shards = {file for file in stored if file.endswith(".safetensors")}
    assert len(shards) == 2
    assert {file for file in hub.fetched() if file.endswith((".safetensors", ".bin"))} == shards
    assert read(folder, "float32")[0] == read(SHARDED, "float32")[0]


def test_the_config_comes_first_and_the_weights_last(hub):
    resolve(NAME)
    files = [path.split("/")[-1] for _, path, _ in hub.requests if "/resolve/" in path]
    assert set(files[:2]) == {"config.json"} and files[-1] == WEIGHTS


def test_all_files_are_of_one_commit_even_if_the_branch_moves_meanwhile(hub):
    hub.pushed = TINY | {"config.json": b"{}", WEIGHTS: b"new", "tokenizer.json": b"new"}
    folder = resolve(NAME)
    assert hub.pushed is None
    assert files_of(folder) == {file: TINY[file] for file in TEXTS | {WEIGHTS}}
    assert folder.name == hub.commit(NAME, "before") != hub.commit(NAME)


def test_a_config_folder_has_no_weights_until_the_model_is_asked_for(hub):
    folder = config_folder(NAME)
    assert files_of(folder) == {file: TINY[file] for file in TEXTS}
    hub.requests.clear()
    assert resolve(NAME) == folder
    assert set(hub.fetched()) == {WEIGHTS}
    assert (folder / WEIGHTS).read_bytes() == TINY[WEIGHTS]


def test_what_is_in_the_cache_is_not_fetched_again(hub, tmp_path):
    folder = resolve(NAME)
    assert folder.is_relative_to(tmp_path / "cache")
    hub.requests.clear()
    assert resolve(NAME) == folder
    assert hub.fetched() == {} and set(hub.fetched("HEAD")) == {"config.json"}
    assert resolve(NAME, cache_dir=tmp_path / "other").is_relative_to(tmp_path / "other")
    assert WEIGHTS in hub.fetched()


def test_a_cached_model_survives_an_outage(hub):
    folder = resolve(NAME)
    hub.refusals[NAME] = (503, {})
    assert resolve(NAME) == folder


def test_a_revision_is_passed_on(hub):
    hub.repos[NAME]["v1"] = with_config(rms_norm_eps=0.25)
    folder = resolve(NAME, revision="v1")
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 0.25
    assert folder.name == hub.commit(NAME, "v1") != resolve(NAME).name
    assert resolve(NAME, revision=folder.name) == config_folder(NAME, revision="v1") == folder


@pytest.mark.parametrize("token", [TOKEN, None])
def test_the_token_goes_with_every_request_if_there_is_one(hub, token):
    resolve(NAME, token=token)
    sent = {authorization for _, path, authorization in hub.requests if NAME in path}
    assert sent == {f"Bearer {token}" if token else None}


# --- names of this machine ---


def test_a_local_folder_needs_no_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner/name").mkdir(parents=True)
    for find in (resolve, config_folder):
        assert find("bundled") == BUNDLED
        for name in ("owner/name", "./owner/name", Path("owner/name"), tmp_path / "owner/name", "~/owner/name"):
            assert find(name).samefile(tmp_path / "owner/name")


def test_what_can_be_no_model_raises_without_asking_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / WEIGHTS).write_bytes(b"")
    for name in ("gpt2", "./name", "~/name", "/name", "a/b/c", f"{hub.url}/{NAME}", Path(NAME)):
        assert error_of(resolve, name) == f"model folder {name} does not exist (a hub id has the form owner/name)"
    assert error_of(resolve, f"owner/{WEIGHTS}") == f"model owner/{WEIGHTS} is a file: pass the folder it lies in"
    assert "local folder and has no revision 'v1'" in error_of(resolve, "bundled", revision="v1")
    assert "owner/na me is neither a local folder nor a hub id" in error_of(resolve, "owner/na me")
    assert not hub.requests


# --- refused before the weights ---


@pytest.mark.parametrize(
    "files, line",
    [
        (with_config(model_type="gpt2"), "cannot be used: model_type 'gpt2' is not supported"),
        (with_config(clip_qkv=8.0), "cannot be used: .* not understood.*: clip_qkv=8.0"),
        (with_config(quantization_config={"quant_method": "gptq"}), r"cannot be used: .* quantised \(gptq\)"),
        (TINY | {"config.json": b"{"}, "cannot be used: .*config.json is not valid JSON"),
        (TINY | {INDEX: b'{"metadata": {}}'}, f"has a {INDEX} without a readable weight_map"),
        (
            TINY | {INDEX: b'{"weight_map": {"a": "../config.json"}}'},
            ".*names '../config.json', which is no file next to it",
        ),
        (TINY | {INDEX: b'{"weight_map": {"a": "lost.safetensors"}}'}, "has no lost.safetensors: pass a model whose"),
        ({file: TINY[file] for file in TEXTS} | {"model.gguf": b""}, "has no model.safetensors: pass a model whose"),
        (
            {file: TINY[file] for file in TEXTS} | {"pytorch_model.bin": b""},
            r'has pickled weights only, .*\.from_pretrained\("owner/name"\).save_pretrained\("FOLDER"\)',
        ),
        ({"model.gguf": b"", "pytorch_model.bin": b"", WEIGHTS: b""}, "has no config.json: pass the model itself"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_before_its_weights_are_fetched(hub, files, line):
    hub.repos[NAME]["main"] = files
    assert re.match(f"{NAME} {line}", error_of(resolve, NAME))
    asked = {**hub.fetched(), **hub.fetched("HEAD")}
    assert not [file for file in asked if file.endswith((".safetensors", ".bin", ".gguf"))]


def test_an_attribute_that_is_to_be_ignored_refuses_no_model(hub):
    """Of names that the config does not have nothing is said here: one list may be meant for several models."""
    hub.repos[NAME]["main"] = with_config(clip_qkv=8.0, window=3)
    assert "clip_qkv=8.0" in (line := error_of(resolve, NAME, ignore=("window",))) and "window=3" not in line
    folder = config_folder(NAME, ignore=("clip_qkv", "window", "other"))
    assert resolve(NAME, ignore=("clip_qkv", "window")) == folder and (folder / WEIGHTS).exists()
    assert error_of(load, NAME, ignore=("clip_qkv", "window", "other")).startswith("config.json has no 'other'")
    assert load(NAME, ignore=("clip_qkv", "window")).config == load("bundled").config


# --- what the hub may answer ---


@pytest.mark.parametrize(
    "status, headers, line",
    [
        (
            401,
            {"X-Error-Code": "RepoNotFound"},
            "NAME is neither a local folder nor on URL: check the spelling; if it is "
            "private, set HF_TOKEN or run `hf auth login`",
        ),
        (
            403,
            {"X-Error-Code": "GatedRepo"},
            "NAME is gated: accept its licence at URL/NAME, then set HF_TOKEN or run `hf auth login`",
        ),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            "URL refused the token for NAME (401): make one that may read it, then set HF_TOKEN or run `hf auth login`",
        ),
        (
            403,
            {"X-Error-Message": "missing permission"},
            "URL refused the token for NAME (403): make one that may read it, then set HF_TOKEN or run `hf auth login`",
        ),
        (
            403,
            {"X-Error-Message": "Access to this resource is disabled."},
            "NAME has been disabled on URL: pass another model",
        ),
        (
            404,
            {"X-Error-Code": "RevisionNotFound"},
            "NAME has no revision 'v9': pass a branch, tag or commit that URL/NAME lists",
        ),
        (429, {}, "URL could not serve NAME (429): try again later, or pass a local folder"),
        (503, {}, "URL could not serve NAME (503): try again later, or pass a local folder"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(hub, status, headers, line):
    hub.refusals[NAME] = (status, headers)
    for find in (resolve, config_folder):
        found = error_of(find, NAME, revision="v9", token=TOKEN)
        assert found == line.replace("URL", hub.url).replace("NAME", NAME)


def test_a_gate_that_opens_only_to_the_config_is_one_line_too(hub):
    config_folder(NAME)
    hub.refusals[NAME] = (403, {"X-Error-Code": "GatedRepo"})
    assert error_of(resolve, NAME).startswith(f"{NAME} is gated: accept its licence at")


def test_a_host_that_is_no_hub_is_one_line(hub):
    hub.refusals[NAME] = (200, {})
    assert re.match(rf"{NAME} could not be fetched from {hub.url} \(FileMetadataError: ", error_of(resolve, NAME))


def test_no_network_is_one_line(hub, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    point_at(url, monkeypatch)
    line = error_of(resolve, NAME, token=TOKEN)
    assert re.fullmatch(f"{NAME} could not be fetched from {url} .*: check the network, or pass a local folder", line)


def test_a_connection_that_breaks_is_one_line_and_leaves_no_half_file(hub):
    hub.cut.add(WEIGHTS)
    assert f"{NAME} could not be fetched from {hub.url}" in error_of(resolve, NAME, token=TOKEN)
    assert not (config_folder(NAME) / WEIGHTS).exists()
    hub.cut.clear()
    assert (resolve(NAME) / WEIGHTS).read_bytes() == TINY[WEIGHTS]


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left for owner/name in CACHE: free some, or set"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left for owner/name in CACHE"),
        (RuntimeError("Data processing error: No space left on device"), "no space left for owner/name in CACHE"),
        (PermissionError(errno.EACCES, "Permission denied", "/shared/x"), "owner/name cannot be stored in /shared/x"),
        (TimeoutError("timed\nout"), r"owner/name could not be fetched from .* \(TimeoutError: timed out\): check"),
    ],
)
def test_a_failing_download_is_one_line(hub, monkeypatch, tmp_path, error, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    for arguments, cache in (({}, "cache"), ({"cache_dir": tmp_path / "other"}, "other")):
        assert re.match(line.replace("CACHE", str(tmp_path / cache)), error_of(resolve, NAME, **arguments))


def test_an_error_nobody_foresaw_is_not_hidden(hub, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    with pytest.raises(KeyError, match="a bug"):
        resolve(NAME)


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f" {TOKEN}", f"{TOKEN}\u00e9", ""])
def test_a_damaged_token_is_refused_unseen(hub, token):
    assert f"token given for {NAME} is empty or has blanks or odd characters" in error_of(resolve, NAME, token=token)
    assert not hub.requests


@pytest.mark.parametrize("damage", ["\u00e9", "\u2026"])
def test_a_damaged_token_of_the_environment_is_told_unseen(hub, monkeypatch, damage):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}{damage}x")
    line = error_of(resolve, NAME)
    assert line.startswith(f"the token for {NAME} (HF_TOKEN, or of `hf auth login`) has blanks or odd characters")


def test_a_token_that_the_hub_repeats_is_in_no_message(hub):
    hub.refusals[NAME] = (400, {"X-Error-Message": f"bad token {TOKEN}"})
    assert TOKEN not in error_of(resolve, NAME, token=TOKEN)


# --- the environment ---


def in_a_new_process(calls, home, **environment):
    """The outcome of each (function, name) in a process of its own: a path or an error's line."""
    code = (
        "import json, sys\n"
        "from retmask_jax.hf import hub\n"
        "for function, name in json.loads(sys.argv[1]):\n"
        "    try: print(getattr(hub, function)(name))\n"
        "    except ValueError as error: print(error)\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)],
        env=clean | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        cwd=home.parent,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_variables_of_huggingface_hub_are_honoured(server, tmp_path):
    home = tmp_path / "home"
    server.repos["owner/half"] = server.repos["owner/never"] = {"main": TINY}
    whole, half = in_a_new_process(
        [("resolve", NAME), ("config_folder", "owner/half")], home, HF_ENDPOINT=server.url, HF_TOKEN=TOKEN
    )
    assert Path(whole).is_relative_to(home) and (Path(whole) / WEIGHTS).read_bytes() == TINY[WEIGHTS]
    assert {authorization for _, path, authorization in server.requests if "owner" in path} == {f"Bearer {TOKEN}"}

    server.requests.clear()
    calls = [("resolve", NAME), ("config_folder", "owner/half"), ("resolve", "owner/half"), ("resolve", "owner/never")]
    *found, first, second = in_a_new_process(calls, home, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
    assert found == [whole, half]
    line = "is not wholly in the cache and HF_HUB_OFFLINE is set: unset it, or pass a local folder"
    assert (first, second) == (f"owner/half {line}", f"owner/never {line}")
    assert not server.requests
