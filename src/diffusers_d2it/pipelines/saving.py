# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How a pipeline is saved, whole or not at all, and how it goes to the Hub, with its card and nothing else."""

import os
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard

from ..files.folders import save_folder
from ..files.source import forget_origin
from ..hub.card import make_model_card
from ..hub.push import CARD, SAMPLES, check_png, files_to_push, make_repository, named_errors, upload, write_card
from ..models.strict import refuse_unsafe


class PipelineHubMixin:
    """`push_to_hub` and `save_pretrained` of a pipeline: all of it or nothing, and with its own model card.

    It stands before `DiffusionPipeline`, which saves file by file over what is there, and pushes a card of no content
    and every file of the folder.
    """

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        model_card: ModelCard | None = None,
        sample_image: str | os.PathLike | None = None,
    ) -> str:
        """Push the pipeline to the Hub, with its model card.

        Args:
            repo_id: "user/name", or "name" for the user of the token.
            commit_message: None for "Upload D2iTPipeline".
            private: whether a new repository is private; None for the account's default.
            token: access token with write permission; None for the one of `hf auth login` or HF_TOKEN.
            create_pr: propose the files in a pull request instead of committing them.
            safe_serialization: True; pickled weights are not pushed.
            variant: variant of the weights, such as "fp16", named in their files.
            subfolder: folder of the repository to push to; a card belongs to the top, so none is pushed then.
            model_card: from `make_model_card`, which takes the licence, data and figures that a pipeline cannot know.
                None keeps the card that the repository has, and writes one if it has none.
            sample_image: a PNG that is pushed as samples.png and shown in a card that is written here.

        Returns:
            Address of the commit or the pull request.

        Raises:
            ValueError: `repo_id` is not a name of the Hub, there is no token, the Hub cannot be reached or refuses,
                `private` is True and the repository exists and is public, `safe_serialization` is False,
                `sample_image` is no PNG, or a card or image comes with a `subfolder`.
        """
        refuse_unsafe(safe_serialization, use_flashpack=False)
        return _push_pipeline(
            self,
            None,
            repo_id,
            private=private,
            token=token,
            variant=variant,
            commit_message=commit_message,
            create_pr=create_pr,
            subfolder=subfolder,
            model_card=model_card,
            sample_image=sample_image,
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        model_card: ModelCard | None = None,
        sample_image: str | os.PathLike | None = None,
    ) -> None:
        """Save the pipeline to a folder, whole or not at all, and push it if asked.

        One manifest at the top of the folder lists the files of all components, so that they change together; see
        `saving`. Other files in the folder stay.

        Args:
            save_directory: the folder.
            safe_serialization: True; nothing is pickled.
            variant, max_shard_size: as diffusers documents them.
            use_flashpack: False; only safetensors are written.
            push_to_hub: push what has been saved; of the folder only what belongs to a pipeline.
            repo_id: None for the name of the folder. It and what follows serve `push_to_hub` alone.
            private, token, commit_message, create_pr, sample_image: as for `push_to_hub`.
            model_card: None keeps the one in the folder or on the Hub, and writes one if there is none.

        Raises:
            ValueError: something else than safetensors is asked for, the folder is a file, another process is saving
                there, or as for `push_to_hub`.
            OSError: the disk is full or failed. What was in the folder is still there.
        """
        refuse_unsafe(safe_serialization, use_flashpack)
        folder = Path(save_directory).absolute()
        save = super().save_pretrained

        def write(path: str) -> None:
            save(path, variant=variant, max_shard_size=max_shard_size)
            forget_origin(Path(path, self.config_name))

        save_folder(folder, write)
        if push_to_hub:
            repo_id = folder.name if repo_id is None else repo_id
            _push_pipeline(
                self,
                folder,
                repo_id,
                private=private,
                token=token,
                variant=variant,
                commit_message=commit_message,
                create_pr=create_pr,
                subfolder=None,
                model_card=model_card,
                sample_image=sample_image,
            )


def _push_pipeline(
    pipe: DiffusionPipeline,
    folder: Path | None,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    variant: str | None,
    commit_message: str | None,
    create_pr: bool,
    subfolder: str | None,
    model_card: ModelCard | None,
    sample_image: str | os.PathLike | None,
) -> str:
    """Push a pipeline from the folder where it has been saved, or through a temporary one."""
    if subfolder is not None and (model_card is not None or sample_image is not None):
        raise ValueError("`model_card` and `sample_image` belong to the top of a repository: leave out `subfolder`.")
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
        if subfolder is None:
            has_card = (folder / CARD).exists() or HfApi(token=token).file_exists(repo_id, CARD)
            if model_card is None and not has_card:
                image = None if sample_image is None else SAMPLES
                model_card = make_model_card(pipe, repo_id=repo_id, license=None, sample_image=image, variant=variant)
            write_card(folder, model_card, sample_image)
        message = commit_message or f"Upload {type(pipe).__name__}"
        return upload(folder, repo_id, *files_to_push(folder), token, message, create_pr, subfolder)
