"""The local folder or GGUF file of a model that is given by name: the bundled model, a path, or a checkpoint fetched from the
hub; and folders that are pushed there."""

import contextlib
import dataclasses
import errno
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from retmask_jax.hf.checkpoint_files import CHECKPOINT_TEXTS, INDEX, read_config, weight_names
from retmask_jax.hf.families import from_hf, ignorable
from retmask_jax.hf.gguf.file import is_gguf
from retmask_jax.utils.compiled import waiting
from retmask_jax.utils.keys import is_key, without_secrets

BUNDLED = Path(__file__).parent.parent / "assets" / "tiny"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@waiting()
def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    ignore: Sequence[str] = (),
) -> Path:
    """Returns the folder or GGUF file of a model, fetched from the hub if it is not in the cache.

    config.json is fetched first, so a model that is unsupported, quantised or pickled is refused before its weights are
    fetched. huggingface_hub's variables HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE apply.

    Args:
        name: "bundled", a local folder or .gguf file, for which nothing is fetched, or a hub id.
        revision: Branch, tag or commit of a hub id.
        token: Token for the hub; None for that of huggingface_hub, False for none.
        cache_dir: Cache folder; None for that of huggingface_hub.
        ignore: Attributes of config.json for which a model is not refused, though they are not understood.

    Raises:
        ValueError: One line that names the model, what is wrong and what to do.
    """
    if (folder := _local(name, revision)) is not None:
        return folder
    repo = _repo(name, revision, token, cache_dir)
    folder = repo.fetch_texts(ignore)
    repo.fetch_weights(folder)
    return folder


def config_folder(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    ignore: Sequence[str] = (),
) -> Path:
    """Returns a folder as `resolve` does, but without the weights: config.json and the files of tokenizer and
    generation."""
    if (folder := _local(name, revision)) is not None:
        return folder
    return _repo(name, revision, token, cache_dir).fetch_texts(ignore)


def hub_id(name: str | os.PathLike[str]) -> str | None:
    """Returns the name of a model on the hub; None for what lies on this machine, or lay there."""
    try:
        return os.fspath(name) if _local(name, None) is None else None
    except ValueError:
        return None


def check_hub_name(name: str) -> None:
    """Raises ValueError for what cannot be the name of a model on the hub, owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("there is no owner in it")
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name!r} is no name of a model on the hub, owner/name ({reason})") from error


def push(folder: Path, name: str) -> str:
    """Uploads the files of a folder to a model of the hub, which is made if it is not there; returns its address.

    Nothing of the folder is changed.

    Raises:
        ValueError: Nobody is logged in, or the hub does not take it; one line, with the command that goes on.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HTTPError

    try:
        if get_token() is None:
            raise ValueError("nobody is logged in: set HF_TOKEN or run `hf auth login`")
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by retmask_jax")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        why = without_secrets(_why_not_pushed(error), get_token())
        raise ValueError(
            f"{folder} is written and kept, but not pushed to {name}: {why}; then `hf upload {name} {folder}`"
        ) from error
    return f"{constants.ENDPOINT}/{name}"


def _why_not_pushed(error: Exception) -> str:
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None) or 0
    reason = " ".join(str(error).split())[:200]
    match error:
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set: unset it"
        case _ if status in (401, 403):
            return f"{constants.ENDPOINT} refused the token ({status}): make one that may write there"
        case _ if status == 429 or status >= 500:
            return f"{constants.ENDPOINT} could not take it ({status}): try again later"
        case errors.HTTPError() | OSError() | RuntimeError():
            return f"{type(error).__name__}: {reason}: check the network"
        case _:
            return reason


def _local(name: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The folder or GGUF file with that name on this machine, None for a hub id; ValueError if the name can be neither."""
    text = os.fspath(name)
    folder = BUNDLED if text == "bundled" else Path(os.path.expanduser(text))
    if folder.is_dir() or is_gguf(folder):
        if not folder.exists():
            raise ValueError(f"model file {text} does not exist (the hub's GGUF files are fetched with `hf download`)")
        if revision is not None:
            kind = "folder" if folder.is_dir() else "file"
            raise ValueError(f"model {text} is a local {kind} and has no revision {revision!r}: leave revision out")
        return folder
    if folder.exists():
        raise ValueError(f"model {text} is a file: pass the folder it lies in")
    if isinstance(name, os.PathLike) or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ValueError(f"model folder {text} does not exist (a hub id has the form owner/name)")
    return None


def _repo(
    name: str | os.PathLike[str],
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
) -> "_Repo":
    return _Repo(str(name), revision, token, None if cache_dir is None else os.fspath(cache_dir))


@dataclasses.dataclass(frozen=True)
class _Repo:
    """A model on the hub."""

    name: str
    revision: str | None
    token: str | bool | None = dataclasses.field(repr=False)
    cache_dir: str | None

    def __post_init__(self):
        # The HTTP library's error about such a header would quote the token.
        if isinstance(self.token, str) and not is_key(self.token):
            raise ValueError(f"the token given for {self.name} is empty or has blanks or odd characters: copy it again")

    def fetch_texts(self, ignore: Sequence[str]) -> Path:
        """The folder of one commit with all but the weights; ValueError if the model is not supported."""
        from huggingface_hub import hf_hub_download

        with self._explained():
            path = hf_hub_download(
                self.name, "config.json", revision=self.revision, token=self.token, cache_dir=self.cache_dir
            )
        folder = Path(path).parent
        try:
            hf_config = read_config(folder)
            from_hf(hf_config, ignorable(hf_config, ignore))
        except ValueError as error:
            raise ValueError(f"{self.name} cannot be used: {error}") from error
        self._fetch(folder, (INDEX, *CHECKPOINT_TEXTS))
        return folder

    def fetch_weights(self, folder: Path) -> None:
        """Adds the weights to a folder of `fetch_texts`; ValueError if they are not safetensors."""
        wanted = self._weight_files(folder)
        if all((folder / file).exists() for file in wanted):
            return
        from huggingface_hub import HfApi

        with self._explained():
            found = HfApi(token=self.token).list_repo_files(self.name, revision=folder.name)
        if any(file.endswith(_PICKLES) for file in found) and not any(file in found for file in wanted):
            raise ValueError(
                f"{self.name} has pickled weights only, which are never opened: if you trust them, convert them with "
                f'transformers, AutoModelForCausalLM.from_pretrained("{self.name}").save_pretrained("FOLDER"), save '
                "the tokenizer there too, and pass FOLDER"
            )
        if missing := [file for file in wanted if file not in found]:
            raise ValueError(f"{self.name} has no {missing[0]}: pass a model whose weights are stored as safetensors")
        self._fetch(folder, wanted)

    def _fetch(self, folder: Path, names: Sequence[str]) -> None:
        from huggingface_hub import snapshot_download

        with self._explained():
            # The folder is named after its commit, so every file is of the commit whose config was checked.
            snapshot_download(
                self.name,
                revision=folder.name,
                token=self.token,
                cache_dir=self.cache_dir,
                allow_patterns=[glob.escape(name) for name in names],
            )

    def _weight_files(self, folder: Path) -> list[str]:
        try:
            return weight_names(folder)
        except ValueError as error:
            raise ValueError(
                f"{self.name} has a {INDEX} without a readable weight_map ({error}): tell its owner"
            ) from error

    @contextlib.contextmanager
    def _explained(self):
        """Turns errors of huggingface_hub into ValueErrors of one line; other errors pass unchanged."""
        from huggingface_hub.errors import HFValidationError, HTTPError

        try:
            yield
        # HTTPError is the base of the HTTP library's errors; hf_xet, which transfers large files, mostly raises
        # RuntimeError.
        except (HTTPError, HFValidationError, OSError, RuntimeError, UnicodeError) as error:
            raise ValueError(without_secrets(self._explain(error), self._sent())) from error

    def _sent(self) -> str | None:
        """The token that is sent with requests."""
        from huggingface_hub import get_token

        return self.token if isinstance(self.token, str) else None if self.token is False else get_token()

    def _explain(self, error: BaseException) -> str:
        from huggingface_hub import constants, errors

        if isinstance(error, errors.LocalEntryNotFoundError):
            error = (
                error.__cause__ or error
            )  # it only says that the cache lacks the file; the cause says why the hub did not give it
        name, hub, login = self.name, constants.ENDPOINT, "set HF_TOKEN or run `hf auth login`"
        token = self._sent()
        if token and not is_key(token) and not hasattr(error, "response"):
            return f"the token for {name} (HF_TOKEN, or of `hf auth login`) has blanks or odd characters: copy it again"
        status = getattr(getattr(error, "response", None), "status_code", None) or 0
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        match error:
            case errors.GatedRepoError():
                return f"{name} is gated: accept its licence at {hub}/{name}, then {login}"
            case errors.RepositoryNotFoundError():
                return f"{name} is neither a local folder nor on {hub}: check the spelling; if it is private, {login}"
            case errors.RevisionNotFoundError():
                return f"{name} has no revision {self.revision!r}: pass a branch, tag or commit that {hub}/{name} lists"
            case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
                return f"{name} is not wholly in the cache and HF_HUB_OFFLINE is set: unset it, or pass a local folder"
            case errors.EntryNotFoundError():
                return f"{name} has no config.json: pass the model itself, not an adapter, or fetch its GGUF file and pass that"
            case errors.HFValidationError():
                return f"{name} is neither a local folder nor a hub id ({reason})"
            case errors.DisabledRepoError():
                return f"{name} has been disabled on {hub}: pass another model"
            case _ if status in (401, 403):
                return f"{hub} refused the token for {name} ({status}): make one that may read it, then {login}"
            case _ if status == 429 or status >= 500:
                return f"{hub} could not serve {name} ({status}): try again later, or pass a local folder"
            case _ if getattr(error, "errno", None) in _DISK_FULL or os.strerror(errno.ENOSPC) in str(error):
                cache = self.cache_dir or constants.HF_HUB_CACHE
                return f"no space left for {name} in {cache}: free some, or set HF_HOME or cache_dir to another disk"
            case OSError(errno=int(), filename=str(path)):
                return f"{name} cannot be stored in {path} ({error.strerror}): set HF_HOME or cache_dir elsewhere"
            case _:
                return f"{name} could not be fetched from {hub} ({reason}): check the network, or pass a local folder"
