"""`llm-jepa push`: a model folder as a repository of the Hugging Face Hub, in one commit.

Only the files of a model are sent: safetensors, GGUF, text, pictures of the card. All of them are read before the first
byte leaves: no access token, no path of this machine, no pickle. The commit comes last, so a push that breaks off
publishes nothing, and the next one sends only the files that have not arrived.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .core.errors import UserError, first_line
from .core.files import MODEL_FILES, MODEL_PATTERNS, file_sha256
from .core.json_files import read_json
from .core.publishable import check_file

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo

CARD = "README.md"
FILES = {
    *MODEL_FILES, CARD, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "adapter_config.json",
    "llm_jepa.json", "model.safetensors.index.json", "config_sentence_transformers.json", "sentence_bert_config.json",
}  # fmt: skip
PATTERNS = (
    "*.safetensors", "*.gguf", "y_decoder/*.json", "y_decoder/*.jinja", "y_decoder/*.safetensors",
    "[0-9]*_*/*.json", "[0-9]*_*/*.safetensors", *MODEL_PATTERNS,
)  # fmt: skip
NOT_OF_A_MODEL = {"manifest.json", "jepa_state.safetensors"}  # of this machine, and of the training
WEIGHTS = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors|.*\.gguf")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
HIDDEN = re.compile(r"(^|/)\.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llm-jepa push`."""
    parser.add_argument("folder", help="folder of a finished run or of an export")
    parser.add_argument("repository", help="USER/NAME on the Hub; it is made if it does not exist")
    visibility = parser.add_mutually_exclusive_group(required=True)
    visibility.add_argument("--private", action="store_true", help="only you, or your organization, can read it")
    visibility.add_argument("--public", action="store_true", help="everybody can read it")
    parser.add_argument("--license", help="licence for the card, for example apache-2.0; that of the base model")
    parser.add_argument("--update", action="store_true", help="add a commit to a repository that holds a model already")


def run(options: argparse.Namespace) -> None:
    """Check the folder, then send it."""
    _check_name(options.repository)
    files = read_folder(Path(options.folder), licence=options.license)
    _say_left_out(files)
    _send(files, options)


@dataclass(frozen=True)
class Files:
    """What is sent of a folder.

    paths: name in the repository -> file.
    card: the text of README.md, with its licence.
    left_out: names that are no files of a model.
    """

    folder: Path
    paths: dict[str, Path]
    card: str
    left_out: list[str]

    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths.values())


# -- the folder -------------------------------------------------------------------------------------------------------


def read_folder(folder: Path, *, licence: str | None = None) -> Files:
    """The files of a model in a folder, all of them checked. Raises UserError; sends nothing.

    licence: for the card, which needs one.
    """
    _check_finished(folder)
    paths, left_out = {}, []
    for name in _names_in(folder):
        if _is_of_a_model(name):
            paths[name] = folder / name
        else:
            left_out.append(name)
    if not any(WEIGHTS.fullmatch(name) for name in paths):
        raise UserError(f"{folder} holds no weights (model.safetensors, adapter_model.safetensors or a .gguf file).")
    if CARD not in paths:
        raise UserError(
            f"{folder} has no {CARD}. A run writes one at its end, and `llm-jepa export` for a checkpoint; push that "
            "folder."
        )
    card = _card(folder / CARD, licence)
    for name in sorted(paths):
        check_file(paths[name], name, folder)
    pictures = [name for name in left_out if _is_picture_of(card, name)]
    for name in pictures:
        check_file(folder / name, name, folder)
        paths[name] = folder / name
    return Files(folder, paths, card, [name for name in left_out if name not in pictures])


def _check_finished(folder: Path) -> None:
    """Raises UserError if the folder is not there, damaged, or of a run that has not ended."""
    from .core.checkpoint import RUN_FILE, fault_of_model, newest_sealed
    from .core.identity import RUN_ID
    from .core.publish import MANIFEST, damage_of

    if not folder.is_dir():
        raise UserError(f"No folder {folder}; name that of a finished run or of an export.")
    if (folder / RUN_FILE).is_file():
        is_saved = (folder / MANIFEST).is_file() or RUN_ID not in read_json(folder / RUN_FILE)
        reason = fault_of_model(folder) if (folder / MANIFEST).is_file() else None
        if not is_saved or not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            newest = newest_sealed(folder)
            way_on = f", or export its checkpoint {newest} and push that" if newest else ""
            raise UserError(f"The run in {folder} is not finished; resume it{way_on}.")
    else:
        reason = damage_of(folder)
        if reason and reason.startswith(CARD):
            reason = None  # the card may be edited
    if reason:
        raise UserError(f"{folder} is not complete: {reason}. Let the run save it again, or take a whole copy.")


def _names_in(folder: Path) -> list[str]:
    """All files; what is inside of the folders of checkpoints and of the adapter counts as one name each."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            inner = sorted(child.relative_to(folder).as_posix() for child in path.rglob("*") if not child.is_dir())
            names += inner if any(_is_of_a_model(name) for name in inner) else [f"{path.name}/"]
        else:
            names.append(path.name)
    return [name for name in names if not HIDDEN.search(name)]


def _is_of_a_model(name: str) -> bool:
    path = PurePosixPath(name)
    if path.name in NOT_OF_A_MODEL:
        return False
    if name in FILES:
        return True
    return any(len(path.parts) == len(PurePosixPath(pattern).parts) and path.match(pattern) for pattern in PATTERNS)


def _is_picture_of(card: str, name: str) -> bool:
    return name.endswith((".png", ".jpg", ".jpeg", ".svg")) and f"({name})" in card


def _card(path: Path, licence: str | None) -> str:
    """The text of a card, with a licence in its head. Raises UserError if it has none or cannot be read."""
    from huggingface_hub import ModelCard

    from .core.json_files import read_text

    text = read_text(path)
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # YAML of any kind
        raise UserError(f"The head of {path} is not valid YAML: {first_line(error)}.") from None
    own = card.data.get("license")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UserError(f"--license {licence!r} is no licence of the Hub; write a name such as apache-2.0 or llama3.2.")
    if licence is not None and own not in (None, licence):
        raise UserError(f"--license {licence}, but {path} says {own}; change one of them.")
    if own is None and licence is None:
        base = card.data.get("base_model")
        whose = f" It is that of the base model {base}." if base else " A model from random weights has yours."
        raise UserError(f"{path} names no licence; write --license NAME, for example apache-2.0.{whose}")
    if own is None:
        setattr(card.data, "license", licence)  # noqa: B010
        return str(card)
    return text


def _say_left_out(files: Files) -> None:
    count, size = len(files.paths), files.num_bytes()
    print(f"{count} files, {size / 1e6:,.1f} MB: no access token, no path of this machine, no pickle.")
    if files.left_out:
        some = ", ".join(files.left_out[:20]) + (", ..." if len(files.left_out) > 20 else "")
        print(f"Not sent, since they are no files of the model ({len(files.left_out)}): {some}")


# -- the Hub ----------------------------------------------------------------------------------------------------------


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        is_valid = REPOSITORY.fullmatch(repository) is not None
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError(f"{repository!r} is not a name on the Hub; write USER/NAME, for example anna/my-model.")


def _send(files: Files, options: argparse.Namespace) -> None:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it.")
    token = get_token()
    if token is None:
        raise UserError("No access token: run `hf auth login`, or set HF_TOKEN to a token that may write.")
    check_for_token(files, token)
    api = HfApi(token=token, library_name="llm-jepa")
    try:
        user = _user(api)
        info = _prepare_repository(api, user, options)
        oid = _commit(api, files, info, options.repository)
    except HfHubHTTPError as error:
        raise UserError(_reason(error, options.repository)) from None
    except (HTTPError, RuntimeError, OSError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise UserError(_reason(error.__cause__, options.repository)) from None
        raise UserError(
            f"The connection to {constants.ENDPOINT} broke ({first_line(error)}). Nothing is published yet; the same "
            "command sends the files that have not arrived."
        ) from None
    url = f"{constants.ENDPOINT}/{options.repository}"
    print(f"Published {url} ({'private' if options.private else 'public'}), commit {oid}")
    print(f'Load exactly this version: from_pretrained("{options.repository}", revision="{oid}")')


def check_for_token(files: Files, token: str) -> None:
    """Raises UserError if the access token of this machine is in a file, in whatever place."""
    key = token.encode()
    for name, path in files.paths.items():
        with open(path, "rb") as file:
            before = b""
            while block := file.read(1 << 22):
                if key in before + block:
                    raise UserError(f"{name} holds your access token; remove it. Nothing was sent.")
                before = block[-len(key) :]


def _user(api: HfApi) -> dict[str, Any]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        user: dict[str, Any] = api.whoami()
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UserError("The Hub does not accept your access token; run `hf auth login` again.") from None
        raise
    return user


def _prepare_repository(api: HfApi, user: dict[str, Any], options: argparse.Namespace) -> ModelInfo:
    """The repository, which is made if it does not exist.

    Raises UserError if it is somebody else's, is visible to others than asked, or holds a model.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    owner = options.repository.partition("/")[0]
    known = {user["name"], *(organization["name"] for organization in user.get("orgs", []))}
    if owner.lower() not in {name.lower() for name in known}:
        raise UserError(
            f"{options.repository} belongs to {owner}, and your access token to {user['name']}; write "
            f"{user['name']}/{options.repository.partition('/')[2]}."
        )
    try:
        info = api.model_info(options.repository)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(options.repository, private=options.private, exist_ok=True)
        return api.model_info(options.repository)
    if bool(info.private) != options.private:
        is_now, asked = ("private", "--public") if info.private else ("public", "--private")
        raise UserError(
            f"{options.repository} exists and is {is_now}, which {asked} does not change; change it on its page, or "
            "choose another name."
        )
    held = [sibling.rfilename for sibling in info.siblings or [] if sibling.rfilename != ".gitattributes"]
    if held and not options.update:
        raise UserError(
            f"{options.repository} holds {len(held)} file(s) already; write --update to add a commit, or choose "
            "another name."
        )
    return info


def _commit(api: HfApi, files: Files, info: ModelInfo, repository: str) -> str:
    """Upload what the Hub does not have, and make one commit of it. Returns its id."""
    from huggingface_hub import CommitOperationDelete

    operations: list[Any] = _additions(files)
    stale = [sibling.rfilename for sibling in info.siblings or [] if _is_of_a_model(sibling.rfilename)]
    operations += [CommitOperationDelete(name) for name in stale if name not in files.paths]
    commit = api.create_commit(
        repository, operations, commit_message="Upload with llm-jepa push", parent_commit=info.sha, num_threads=2
    )
    _check_arrived(api, files, repository, commit.oid)
    return str(commit.oid)


def _additions(files: Files) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    additions = []
    for name, path in sorted(files.paths.items()):
        content: Any = files.card.encode() if name == CARD else path
        additions.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    return additions


def _check_arrived(api: HfApi, files: Files, repository: str, oid: str) -> None:
    """Raises UserError if the commit does not hold the files that were sent."""
    info = api.model_info(repository, revision=oid, files_metadata=True)
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}
    for name, path in files.paths.items():
        size = len(files.card.encode()) if name == CARD else path.stat().st_size
        file = there.get(name)
        is_same = file is not None and file.size == size
        if is_same and file is not None and file.lfs is not None:
            is_same = file.lfs.sha256 == file_sha256(path)
        if not is_same:
            raise UserError(f"{name} did not arrive whole in commit {oid} of {repository}; push again with --update.")


def _reason(error: Any, repository: str) -> str:
    """Why the Hub refused, in one line."""
    status = error.response.status_code if error.response is not None else 0
    if status == 403:
        return (
            f"The Hub does not let you write to {repository}: it is not yours, or your access token may only read. "
            "Nothing was published."
        )
    if status in (401, 404):
        return f"The Hub knows no repository {repository} that your access token may read; check the name."
    if status == 412:
        return f"{repository} has changed while the files were sent; look at it, and push again."
    message = getattr(error, "server_message", None) or first_line(error)
    return f"The Hub refused ({status}): {message}. Nothing was published."
