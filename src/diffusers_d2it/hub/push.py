# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pushing to the Hub: which files of a folder go there, with which card, and how a training does it.

Only files that a repository of this package is made of are pushed: what else lies in the folder (checkpoints, logs,
notes, a forgotten password) stays where it is and is named in a warning.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.utils import validate_repo_id

from ..files.folders import MANIFEST, durable_file
from ..files.source import PARTS, without_origin
from ..words import listed, printable, shown
from .card import check_license, commands_of, is_name, is_on_hub, make_model_card
from .remote_code import BRANCH, remote_files


logger = logging.get_logger(__name__)

SAMPLES = "samples.png"
CARD = "README.md"
_PUSHED = (
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "*.safetensors",
    "*.safetensors.index*.json",  # of shards; a variant stands between `index` and `json`
    CARD,
    SAMPLES,
    "conversion.json",
)
_INDICES = ("config.json", "model_index.json")
_NUM_NAMED = 50  # of the files that are left out


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None = None,
    commit_message: str = "Upload with diffusers-d2it",
    code_of: type | None = None,
    **commit: Any,
) -> str:
    """Push a saved pipeline or model to the Hub, in a repository that is made if it does not exist.

    Pushed are configurations, safetensors, README.md, samples.png and conversion.json, at the top of the folder and in
    the sub-folders of a pipeline; a warning names everything else. Where a model was loaded from, which diffusers
    notes in its configuration, is not pushed.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: "user/name", or "name" for the user of the token.
        private: whether a new repository is private; None for the account's default.
        token: access token with write permission; None for the one of `hf auth login` or HF_TOKEN.
        commit_message: summary of the commit.
        code_of: class of the pipeline in the folder, whose code goes to a branch; None for no such branch.
        **commit: more arguments of `huggingface_hub.HfApi.create_commit`.

    Returns:
        Address of the commit or the pull request.

    Raises:
        ValueError: the folder holds nothing to push; `repo_id` is not a name of the Hub; there is no token; the Hub
            cannot be reached or refuses; `private` is True and the repository exists and is public; a class of the
            pipeline is none of this package. The files stay in the folder.
    """
    folder = Path(folder)
    if not any(name.endswith((*_INDICES, "lora_weights.safetensors")) for name in files_to_push(folder)[0]):
        raise ValueError(f"`folder` {str(folder)!r} holds no pipeline or model: nothing of it can be pushed.")
    with named_errors(repo_id, f"The files are kept in {str(folder)!r}."):
        code = None if code_of is None else remote_files(folder, code_of)
        repo_id = make_repository(repo_id, private, token)
        return upload(folder, repo_id, code=code, token=token, commit_message=commit_message, **commit)


def push_pipeline(
    pipe: DiffusionPipeline,
    repo_id: str,
    *,
    folder: Path | None,
    commit_message: str | None,
    private: bool | None,
    token: str | None,
    create_pr: bool,
    variant: str | None,
    subfolder: str | None,
    model_card: ModelCard | None,
    sample_image: str | os.PathLike | None,
    remote_code: bool,
) -> str:
    """Push a pipeline to the Hub with its model card: what `D2iTPipeline.push_to_hub` does, and says of its arguments.

    Raises:
        ValueError: as there.
    """
    if subfolder is not None and (model_card is not None or sample_image is not None):
        raise ValueError("`model_card` and `sample_image` belong to the top of a repository: drop `subfolder`.")
    if remote_code and (create_pr or subfolder is not None):
        raise ValueError("`remote_code` makes a branch of a whole repository: drop `create_pr` and `subfolder`.")
    if sample_image is not None:
        check_png(sample_image)
    kept = f"The files are kept in {str(folder)!r}."
    if folder is None:
        kept = "The pipeline is still in memory: `save_pretrained` keeps it."
    with named_errors(repo_id, kept), tempfile.TemporaryDirectory() as temporary:
        # Before anything is saved, so that a refusal comes early; it also knows the full name for the card.
        repo_id = make_repository(repo_id, private, token)
        if folder is None:
            folder = Path(temporary)
            pipe.save_pretrained(folder, variant=variant)
        code = remote_files(folder, type(pipe)) if remote_code else None
        if subfolder is None:
            has_card = (folder / CARD).exists() or HfApi(token=token).file_exists(repo_id, CARD)
            if model_card is None and not has_card:
                image = None if sample_image is None else SAMPLES
                model_card = make_model_card(
                    pipe, repo_id=repo_id, license=None, sample_image=image, variant=variant, remote_code=remote_code
                )
            elif model_card is None and remote_code:
                logger.warning("%s keeps its card: `make_model_card(..., remote_code=True)` shows the code.", repo_id)
            write_card(folder, model_card, sample_image)
        commit = {"token": token, "commit_message": commit_message or f"Upload {type(pipe).__name__}"}
        return upload(folder, repo_id, subfolder, code=code, **commit, create_pr=create_pr)


def files_to_push(folder: Path) -> tuple[list[str], list[str]]:
    """Names in a folder that may be pushed, and those that may not, relative to it; whole folders with a slash."""
    pushed, left_out = [], []
    parts = [folder / name for name in PARTS]
    parts = [part for part in parts if part.is_dir() and not part.is_symlink()]  # a link may lead anywhere
    for path in sorted(path for inside in (folder, *parts) if inside.is_dir() for path in inside.iterdir()):
        if path in parts or path.name == MANIFEST:  # it is about this folder; the Hub keeps hashes of its own
            continue
        allowed = path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _PUSHED)
        name = path.relative_to(folder).as_posix()
        (pushed if allowed else left_out).append(f"{name}/" if path.is_dir() else name)
    return pushed, left_out


def make_repository(repo_id: str, private: bool | None, token: str | None) -> str:
    """Make a repository unless it exists, and return its full name.

    Raises:
        ValueError: there is no token, or `private` is True and the repository exists and is public.
    """
    validate_repo_id(repo_id)
    if token is None and get_token() is None:
        raise ValueError("there is no access token: run `hf auth login`, set HF_TOKEN or pass `token`")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        # The Hub ignores `private` for a repository that exists, and what was meant to be private would be public.
        raise ValueError("`private` is True, but the repository exists and is public: change it in its settings")
    return repo_id


def upload(
    folder: Path,
    repo_id: str,
    subfolder: str | None = None,
    *,
    code: dict[str, str] | None = None,
    token: str | None,
    commit_message: str,
    **commit: Any,
) -> str:
    """Commit what may be pushed of a folder to a repository, below `subfolder`, and return the commit's address.

    It is one commit, of which nobody loads half; `HfApi.upload_folder` splits a slow upload. A warning names the rest.
    After it comes the branch with `code`, if there is any.
    """
    names, left_out = files_to_push(folder)
    if left_out:
        named = listed(left_out, _NUM_NAMED)
        warnings.warn(f"left in {str(folder)!r}, not pushed to {repo_id}: {named}", stacklevel=3)
    prefix = "" if subfolder is None else f"{subfolder}/"
    files = [CommitOperationAdd(f"{prefix}{name}", _content(folder / name)) for name in names]
    made = HfApi(token=token).create_commit(repo_id, files, commit_message=commit_message, **commit)
    if code is not None:
        upload_code(folder, repo_id, code, token, commit_message)
    return str(made.pr_url or made)


def upload_code(folder: Path, repo_id: str, code: dict[str, str], token: str | None, commit_message: str) -> None:
    """Commit a pipeline to the branch with code, which is made from main if need be: all of it in one commit.

    Args:
        folder: what has been committed to main: the Hub has its weights, and they are not sent again.
        repo_id: "user/name".
        code: files in place of or besides those of the folder, from `remote_files`. Other code of the branch goes.
        token: access token with write permission; None for the one of `hf auth login` or HF_TOKEN.
        commit_message: summary of the commit.
    """
    api = HfApi(token=token)
    api.create_branch(repo_id, branch=BRANCH, exist_ok=True)
    contents = {name: _content(folder / name) for name in files_to_push(folder)[0]}
    contents |= {name: text.encode() for name, text in code.items()}
    there = api.list_repo_files(repo_id, revision=BRANCH)
    changes = [CommitOperationDelete(name) for name in there if name.endswith(".py") and name not in code]
    changes += [CommitOperationAdd(name, content) for name, content in contents.items()]
    api.create_commit(repo_id, changes, commit_message=commit_message, revision=BRANCH)


def _content(file: Path) -> Path | bytes:
    """What is pushed of a file: a configuration without its origin; the file stays, its folder is sealed with it."""
    if file.name.endswith(_INDICES):
        return without_origin(file.read_text(encoding="utf-8")).encode()
    return file


@contextmanager
def named_errors(repo_id: str, kept: str) -> Iterator[None]:
    """Turn every error of the Hub into a ValueError that names the repository, the cause and what is not lost."""
    try:
        yield
    except Exception as error:  # those of httpx, huggingface_hub and hf_xet have no base in common
        raise ValueError(f"cannot push to {repo_id!r}: {printable(error).rstrip('.')}. {kept}") from error


def write_card(folder: Path, model_card: ModelCard | None, sample_image: str | os.PathLike | None) -> None:
    """Put a card and its image, what there is of them, into the folder of a model.

    Raises:
        ValueError: the image is no PNG.
    """
    if sample_image is not None:
        check_png(sample_image)
        with durable_file(folder / SAMPLES) as staged:
            shutil.copyfile(sample_image, staged)
    if model_card is not None:
        with durable_file(folder / CARD) as staged:
            model_card.save(staged)


def check_png(path: str | os.PathLike) -> None:
    """Raise a ValueError unless a file begins like a PNG."""
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            raise ValueError(f"`sample_image` must be a PNG file, got {str(path)!r}.")


def check_push(
    *,
    push_to_hub: bool,
    hub_model_id: str | None,
    hub_private_repo: bool | None,
    license: str | None,
    hub_remote_code: bool = False,
) -> None:
    """Find out before a training whether `publish` can do its work, with the same arguments. For the main process.

    With `push_to_hub` it asks the Hub who the token belongs to, makes the repository and asks whether it may be
    written to: nothing less is certain to work days later.

    Raises:
        ValueError: an argument is of another form or does nothing without another; there is no token, it may not
            write, the repository is public in spite of `hub_private_repo`, or the Hub cannot be reached.
    """
    check_license(license)
    if push_to_hub and hub_model_id is None:
        raise ValueError("`push_to_hub` needs `hub_model_id`, the user/name of a repository.")
    for name, value in (("hub_private_repo", hub_private_repo), ("hub_remote_code", hub_remote_code)):
        if value and not push_to_hub:
            raise ValueError(f"`{name}` does nothing without `push_to_hub`.")
    if hub_model_id is not None and not ("/" in hub_model_id and is_name(hub_model_id)):
        raise ValueError(
            f"`hub_model_id` must be user/name, of letters, digits, '-', '_' and '.', got {shown(hub_model_id)}."
        )
    if push_to_hub:
        with named_errors(hub_model_id, "Nothing has been trained yet: correct it, or leave out `push_to_hub`."):
            if HfApi().whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
                raise ValueError("the access token may only read: make one that may write")
            HfApi().auth_check(make_repository(hub_model_id, hub_private_repo, token=None), write=True)


def publish(
    pipe_or_model: DiffusionPipeline | torch.nn.Module,
    folder: str | os.PathLike,
    *,
    push_to_hub: bool,
    hub_model_id: str | None,
    hub_private_repo: bool | None,
    license: str | None,
    hub_remote_code: bool = False,
    dataset_name: str | None = None,
    built_on: Sequence[str | os.PathLike] = (),
    commands: Sequence[str] = (),
    sample_image: str | os.PathLike | None = None,
    **card: Any,
) -> str | None:
    """Write the model card of a finished training into its folder, and push the folder with `push_to_hub`.

    For the main process, after everything has been saved.

    Args:
        pipe_or_model: what has been trained.
        folder: what `save_pretrained` wrote; it becomes the top of the repository.
        push_to_hub: whether it is pushed, to a repository that is made if it does not exist.
        hub_model_id: user/name of the repository, also named in the card.
        hub_private_repo: whether a new repository is private; None for the account's default.
        license: identifier of the Hub; None if none has been chosen, which the card then says.
        hub_remote_code: also push the code of a pipeline to a branch, for people without this package.
        dataset_name: of the training data, for the metadata if it is a name on the Hub.
        built_on: outputs of earlier stages; the commands of their cards come first in this one.
        commands: those of this training.
        sample_image: a PNG of the last validation, which becomes samples.png.
        **card: more arguments of `make_model_card`.

    Returns:
        Address of the commit; None without `push_to_hub`.

    Raises:
        ValueError: as for `make_model_card` and `push_folder`. The folder is complete by then.
    """
    if sample_image is not None and not os.path.isfile(sample_image):
        warnings.warn(f"the model card shows no samples: there is no {str(sample_image)!r}", stacklevel=2)
        sample_image = None
    model_card = make_model_card(
        pipe_or_model,
        repo_id=hub_model_id,
        license=license,
        datasets=[dataset_name] if dataset_name is not None and is_on_hub(dataset_name) else None,
        commands=[*(command for stage in built_on for command in commands_of(stage)), *commands],
        sample_image=None if sample_image is None else SAMPLES,
        remote_code=push_to_hub and hub_remote_code,
        **card,
    )
    write_card(Path(folder), model_card, sample_image)
    if not push_to_hub:
        return None
    steps = "" if card.get("train_steps") is None else f" after {card['train_steps']} steps"
    message = f"Upload {type(pipe_or_model).__name__}{steps}"
    code_of = type(pipe_or_model) if hub_remote_code else None
    return push_folder(folder, hub_model_id, private=hub_private_repo, commit_message=message, code_of=code_of)
