# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pushing to the Hub: which files of a folder go there, with which card, and how a training script does it.

Only files that a repository of this package is made of are pushed: what else lies in the folder (checkpoints, logs,
notes, a forgotten password) stays where it is and is named in a warning.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files.folders import MANIFEST, write_durably
from ..words import printable
from .card import check_license, commands_of, make_model_card


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
_NUM_NAMED = 50  # of the files that are left out
_SUBFOLDERS = ("vae", "grain_model", "transformer", "scheduler", "grain_scheduler")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None = None,
    commit_message: str = "Upload with diffusers-d2it",
    create_pr: bool = False,
) -> str:
    """Push a saved pipeline or model to the Hub, in a repository that is made if it does not exist.

    Pushed are model_index.json, config.json, scheduler_config.json, safetensors and their indices, README.md,
    samples.png and conversion.json, at the top of the folder and in the sub-folders of a pipeline; a warning names
    everything else. Paths of this machine that diffusers noted in a configuration (`_name_or_path`) are not pushed.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: "user/name", or "name" for the user of the token.
        private: whether a new repository is private; None for the account's default.
        token: access token with write permission; None for the one of `hf auth login` or HF_TOKEN.
        commit_message: summary of the commit, and title of the pull request.
        create_pr: propose the files in a pull request instead of committing them.

    Returns:
        Address of the commit or the pull request.

    Raises:
        ValueError: the folder holds nothing to push; `repo_id` is not a name of the Hub; there is no token; the Hub
            cannot be reached or refuses; `private` is True and the repository exists and is public. The files stay in
            the folder.
    """
    folder = Path(folder)
    names, left_out = files_to_push(folder)
    if not any(name.endswith(("config.json", "model_index.json")) for name in names):
        raise ValueError(f"`folder` {str(folder)!r} holds no pipeline or model: nothing of it can be pushed.")
    with named_errors(repo_id, f"The files are kept in {str(folder)!r}."):
        repo_id = make_repository(repo_id, private, token)
        return upload(folder, repo_id, names, left_out, token, commit_message, create_pr)


def files_to_push(folder: Path) -> tuple[list[str], list[str]]:
    """Names in a folder that may be pushed, and those that may not, relative to it; whole folders with a slash."""
    pushed, left_out = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and path.name in _SUBFOLDERS and not path.is_symlink():  # which may lead anywhere
            inside = sorted(path.iterdir())
        elif path.is_dir():
            left_out.append(f"{path.name}/")
            continue
        else:
            inside = [path]
        for file in inside:
            if file.name == MANIFEST:  # it is about this folder; the Hub keeps hashes of its own
                continue
            allowed = file.is_file() and any(fnmatchcase(file.name, pattern) for pattern in _PUSHED)
            name = file.relative_to(folder).as_posix()
            (pushed if allowed else left_out).append(f"{name}/" if file.is_dir() else name)
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
    names: list[str],
    left_out: list[str],
    token: str | None,
    commit_message: str,
    create_pr: bool,
    path_in_repo: str | None = None,
) -> str:
    """Commit files of a folder to a repository that exists, warn of the others, and return the commit's address."""
    if left_out:
        named = ", ".join(printable(name) for name in left_out[:_NUM_NAMED])
        more = f" and {len(left_out) - _NUM_NAMED} more" if len(left_out) > _NUM_NAMED else ""
        warnings.warn(f"left in {str(folder)!r}, not pushed to {repo_id}: {named}{more}", stacklevel=3)
    api = HfApi(token=token)
    prefix = "" if path_in_repo is None else f"{path_in_repo}/"
    files = [CommitOperationAdd(f"{prefix}{name}", _content(folder / name)) for name in names]
    commit = api.create_commit(repo_id, files, commit_message=commit_message, create_pr=create_pr)
    return str(commit.pr_url or commit)


def _content(path: Path) -> str | bytes:
    """What is pushed of a file: the file, or a configuration without where on this machine its model was loaded from.

    The file itself stays as it is: its folder is sealed with it.
    """
    if path.name.endswith(("config.json", "model_index.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        origin = config.get("_name_or_path")
        if origin and not _is_on_hub(origin):
            del config["_name_or_path"]
            return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return str(path)


def _is_on_hub(name: str) -> bool:
    """Whether a name that was loaded from is one of the Hub rather than a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


@contextmanager
def named_errors(repo_id: str, kept: str) -> Iterator[None]:
    """Turn every error of the Hub into a ValueError that names the repository, the cause and what is not lost."""
    try:
        yield
    except Exception as error:  # those of httpx, huggingface_hub and hf_xet have no base in common
        raise ValueError(f"cannot push to `repo_id` {repo_id!r}: {printable(error).rstrip('.')}. {kept}") from error


def write_card(folder: Path, model_card: ModelCard | None, sample_image: str | os.PathLike | None) -> None:
    """Put a card and its image, what there is of them, into the folder of a model.

    Raises:
        ValueError: the image is no PNG.
    """
    if sample_image is not None:
        check_png(sample_image)
        write_durably(folder / SAMPLES, partial(shutil.copyfile, sample_image))
    if model_card is not None:
        write_durably(folder / CARD, model_card.save)


def check_png(path: str | os.PathLike) -> None:
    """Raise a ValueError unless a file begins like a PNG."""
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            raise ValueError(f"`sample_image` must be a PNG file, got {str(path)!r}.")


# ---------------------------------------------------------------------------------------------------------------------
# Training scripts
# ---------------------------------------------------------------------------------------------------------------------


def check_hub_arguments(args: argparse.Namespace) -> None:
    """Find out before the training whether its result can be pushed. Call it on the main process.

    With --push_to_hub it asks the Hub who the token belongs to, makes the repository and asks whether it may be
    written to: nothing less is certain to work days later.

    Raises:
        ValueError: --push_to_hub comes without --hub_model_id, or --hub_private_repo without --push_to_hub;
            --hub_model_id is not "user/name" or --license no identifier; there is no token, it may not write, the
            repository is public in spite of --hub_private_repo, or the Hub cannot be reached.
    """
    check_license(args.license)
    if args.push_to_hub and args.hub_model_id is None:
        raise ValueError("--push_to_hub needs --hub_model_id, the user/name of a repository.")
    if args.hub_private_repo and not args.push_to_hub:
        raise ValueError("--hub_private_repo does nothing without --push_to_hub.")
    if args.hub_model_id is not None:
        try:
            validate_repo_id(args.hub_model_id)
        except HFValidationError as error:
            raise ValueError(f"--hub_model_id {args.hub_model_id!r}: {printable(error)}") from error
        if "/" not in args.hub_model_id:
            raise ValueError(f"--hub_model_id must be user/name, got {args.hub_model_id!r}.")
    if args.push_to_hub:
        with named_errors(args.hub_model_id, "Nothing has been trained yet: put it right, or drop --push_to_hub."):
            api = HfApi()
            role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
            if role == "read":
                raise ValueError("the access token may only read: make one that may write")
            repo_id = make_repository(args.hub_model_id, args.hub_private_repo, token=None)
            api.auth_check(repo_id, write=True)


def publish(
    args: argparse.Namespace,
    pipe_or_model: DiffusionPipeline | torch.nn.Module,
    folder: str | os.PathLike,
    *,
    train_data: str | None,
    sample_image: str | os.PathLike | None = None,
    sample_caption: str | None = None,
    figures: dict | None = None,
    limits: list[str] | None = None,
    subfolder: str | None = None,
    built_on: tuple[str, ...] = (),
) -> str | None:
    """Write the model card of a finished training into its folder, and push the folder with --push_to_hub.

    Call it on the main process, after everything has been saved.

    Args:
        args: the flags of the script, with those of `add_hub_arguments`, and max_train_steps, train_batch_size and
            gradient_accumulation_steps.
        pipe_or_model: what has been trained.
        folder: what `save_pretrained` wrote; it becomes the top of the repository.
        train_data: the images in words.
        sample_image: a PNG of the last validation, which becomes samples.png.
        sample_caption, figures, limits: as for `make_model_card`.
        subfolder: folder inside `folder` that holds the model, if it is not at the top.
        built_on: outputs of earlier stages; the commands of their cards come first in this one.

    Returns:
        Address of the commit; None without --push_to_hub.

    Raises:
        ValueError: as for `make_model_card` and `push_folder`. The folder is complete by then.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if sample_image is not None and not os.path.isfile(sample_image):
        warnings.warn(f"the model card shows no samples: there is no {str(sample_image)!r}", stacklevel=2)
        sample_image = None
    dataset = getattr(args, "dataset_name", None)
    card = make_model_card(
        pipe_or_model,
        repo_id=args.hub_model_id,
        license=args.license,
        train_data=train_data,
        datasets=[dataset] if dataset is not None and _is_on_hub(dataset) else None,
        commands=[*(line for stage in built_on for line in commands_of(stage)), _command(num_processes)],
        figures=figures,
        sample_image=None if sample_image is None else SAMPLES,
        sample_caption=sample_caption,
        train_steps=args.max_train_steps,
        train_batch_size=args.train_batch_size * args.gradient_accumulation_steps * num_processes,
        limits=limits,
        subfolder=subfolder,
    )
    write_card(Path(folder), card, sample_image)
    if not args.push_to_hub:
        return None
    return push_folder(
        folder,
        args.hub_model_id,
        private=args.hub_private_repo,
        commit_message=f"Upload {type(pipe_or_model).__name__} after {args.max_train_steps} steps",
    )


def _command(num_processes: int) -> str:
    """The command that runs this process; options of a launcher beyond the number of processes are lost to it."""
    launcher = ["python"] if num_processes == 1 else ["accelerate", "launch", "--num_processes", str(num_processes)]
    return shlex.join([*launcher, *sys.argv])
