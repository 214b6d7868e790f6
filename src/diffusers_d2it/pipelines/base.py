# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How a pipeline is loaded, saved and pushed: from one commit and without code, whole or not at all, with its card."""

import inspect
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import ModelCard, hf_hub_download

from ..files.folders import save_folder
from ..files.source import HUB_ARGUMENTS, PARTS, WithoutOrigin, check_source, pin, refuse_code, without_origin
from ..files.weights import check_sealed, sealed_files
from ..models.autoencoder_kl import check_autoencoder_kl
from ..models.strict import init_parameters, refuse_unsafe, saving
from ..optional import naming_what_is_broken
from .index import INDEX, check_scheduler_file, is_component, let_diffusers_load, read_index


logger = logging.get_logger(__name__)

Pipeline = TypeVar("Pipeline", bound="StrictPipeline")  # what is loaded is of the class that loads it


class StrictPipeline(WithoutOrigin, DiffusionPipeline):
    """A `DiffusionPipeline` that trusts no file, and saves all of itself or nothing.

    diffusers imports what model_index.json names, saves file by file over what is there, and pushes a card of no
    content and every file of the folder. A subclass says what it is made of:
    """

    _models: Mapping[str, tuple[type[torch.nn.Module], ...]]  # classes that a component may be of
    _schedulers: tuple[str, ...]  # components that are schedulers of diffusers
    _optional_components: list[str]  # those of both that may be None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        PARTS.update(getattr(cls, "_models", ()), getattr(cls, "_schedulers", ()))

    @property
    def _execution_device(self) -> torch.device:
        """As of diffusers, also where hooks offload some of the models and leave others where they are."""
        models = [model for model in self.components.values() if isinstance(model, torch.nn.Module)]
        for module in (module for model in models for module in model.modules()):
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
        return super()._execution_device

    # -----------------------------------------------------------------------------------------------------------------
    # Loading
    # -----------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Pipeline], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Pipeline:
        """Load a pipeline, as `diffusers.DiffusionPipeline.from_pretrained` does, from safetensors and JSON only.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hub, of which one commit is loaded.
            **kwargs: as diffusers documents them; a component by its name replaces the one in the folder.

        Raises:
            ValueError: an argument would run code or read pickled weights; the name is a URL; model_index.json names
                other components than those of this pipeline, or other classes than those of diffusers-d2it and the
                schedulers of diffusers; a file is missing or damaged; a model is refused by its own
                `from_pretrained`. The file is named.
            OSError: the Hub does not have it or cannot be reached.
            ImportError: a package that diffusers imports for it is broken; it is named.
        """
        refuse_code(kwargs)
        check_source(pretrained_model_name_or_path, None, kwargs.get("variant"))
        folder = pretrained_model_name_or_path
        if not os.path.isdir(folder):
            folder = cls.download(folder, **kwargs)
        index = cls._check_folder(Path(folder), kwargs.keys(), kwargs.get("variant"))
        let_diffusers_load([index[name] for name in init_parameters(cls) if is_component(index.get(name))])
        options = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS}
        with naming_what_is_broken("loading a pipeline"):  # diffusers imports all that a component might be
            pipe = super().from_pretrained(str(folder), **options | {"use_safetensors": True})
        pipe.register_to_config(_name_or_path=pretrained_model_name_or_path)
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Download a pipeline from the Hub, as `diffusers.DiffusionPipeline.download` does, and return its folder.

        All files come from one commit, which is asked for once.

        Raises:
            ValueError: an argument would run code or read pickled weights; the name is none of the Hub;
                model_index.json names what this pipeline does not have.
            OSError: the Hub does not have it or cannot be reached.
        """
        refuse_code(kwargs)
        check_source(pretrained_model_name, None, kwargs.get("variant"))
        hub = pin(pretrained_model_name, kwargs)
        read_index(cls, Path(hf_hub_download(pretrained_model_name, INDEX, **hub)))
        return super().download(pretrained_model_name, **kwargs | hub | {"use_safetensors": True})

    @classmethod
    def _check_folder(cls, folder: Path, given: Collection[str], variant: str | None) -> dict[str, Any]:
        """Check the files of a pipeline but those of our models, which check their own, and components `given`.

        Returns:
            What model_index.json says.
        """
        records = sealed_files(folder)
        check_sealed([folder / INDEX], records)
        index = read_index(cls, folder / INDEX)
        for name in filter(init_parameters(cls).get, index):
            library, class_name = index[name] if is_component(index[name]) else (None, None)
            if library is None or name in given:
                continue
            part = folder / name
            if not part.is_dir():
                raise ValueError(f"{part} is missing: {folder / INDEX} says that it holds a {class_name}.")
            if (code := part / f"{library}.py").exists():
                raise ValueError(f"{code} must not be there: no code is run.")
            if name in cls._schedulers:
                check_sealed([part / "scheduler_config.json"], records)
                check_scheduler_file(part / "scheduler_config.json")
            elif name in cls._models and [library, class_name] == ["diffusers", "AutoencoderKL"]:
                check_autoencoder_kl(part, variant)
        return index

    # -----------------------------------------------------------------------------------------------------------------
    # Saving
    # -----------------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the pipeline to a folder, whole or not at all, and push it if asked.

        One manifest at the top of the folder lists the files of all components, so that they change together; see
        `files.folders`. Other files in the folder stay.

        Args:
            save_directory: the folder.
            safe_serialization: True; nothing is pickled.
            variant, max_shard_size: as diffusers documents them.
            push_to_hub: push what has been saved; of the folder only what belongs to a pipeline.
            use_flashpack: False; only safetensors are written.
            **kwargs: of `push_to_hub`; its `repo_id` is the name of the folder by default, and a card that lies in the
                folder is pushed.

        Raises:
            ValueError: something else than safetensors is asked for, the folder is a file, another process is saving
                there, or as for `push_to_hub`.
            TypeError: `push_to_hub` does not have such an argument.
            OSError: the disk is full or failed. What was in the folder is still there.
        """
        refuse_unsafe(safe_serialization, use_flashpack)
        folder = Path(save_directory).absolute()
        pushed = kwargs | {"repo_id": kwargs.get("repo_id") or folder.name, "variant": variant, "folder": folder}
        inspect.signature(self.push_to_hub).bind(**pushed)
        self._check_parts()
        save = super().save_pretrained

        def write(path: str) -> None:
            with saving(path, folder):
                save(path, variant=variant, max_shard_size=max_shard_size)
                for config in Path(path).glob("*/config.json"):  # a model of diffusers says where it was loaded from
                    config.write_text(without_origin(config.read_text(encoding="utf-8")), encoding="utf-8")
                self._check_folder(Path(path), (), variant)

        save_folder(folder, write)
        if push_to_hub:
            self.push_to_hub(**pushed)

    def _check_parts(self) -> None:
        """Raise a ValueError if a component is none, of another kind than this pipeline has."""
        for name, kinds in self._models.items():
            part = getattr(self, name)
            if part is None and name in self._optional_components:
                continue
            if not isinstance(getattr(part, "_orig_mod", part), kinds):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"`{name}` must be a {expected} to be saved, got {type(part).__name__}.")

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
        remote_code: bool = False,
        *,
        folder: Path | None = None,
    ) -> str:
        """Push the pipeline to the Hub, with its model card.

        Args:
            repo_id: "user/name", or "name" for the user of the token.
            commit_message: None for "Upload" and the name of the class.
            private: whether a new repository is private; None for the account's default.
            token: access token with write permission; None for the one of `hf auth login` or HF_TOKEN.
            create_pr: propose the files in a pull request instead of committing them.
            safe_serialization: True; pickled weights are not pushed.
            variant: variant of the weights, such as "fp16", named in their files.
            subfolder: folder of the repository to push to; a card belongs to the top, so none is pushed then.
            model_card: from `make_model_card`, which takes the licence, data and metrics that a pipeline cannot know.
                None keeps the card that the repository has, and writes one if it has none.
            sample_image: a PNG that is pushed as samples.png and shown in a card that is written here.
            remote_code: push the pipeline with its code to the branch remote-code as well, which
                `DiffusionPipeline.from_pretrained(..., revision="remote-code", trust_remote_code=True)` loads where
                this package is not installed. A card that is written here shows this first.
            folder: where the pipeline has been saved; None saves it to a temporary one.

        Returns:
            Address of the commit or the pull request.

        Raises:
            ValueError: `repo_id` is not a name of the Hub, there is no token, the Hub cannot be reached or refuses,
                `private` is True and the repository exists and is public, `safe_serialization` is False,
                `sample_image` is no PNG, or a card, an image or code comes with a `subfolder`, or code with
                `create_pr`, or of a class that is none of this package.
            ImportError: the pipeline itself has been loaded with its code, without this package.
        """
        refuse_unsafe(safe_serialization, use_flashpack=False)
        # Not at the top, so that it is no part of the code that goes to the Hub with a pipeline
        from ..hub.push import push_pipeline

        return push_pipeline(
            self,
            repo_id,
            folder=folder,
            commit_message=commit_message,
            private=private,
            token=token,
            create_pr=create_pr,
            variant=variant,
            subfolder=subfolder,
            model_card=model_card,
            sample_image=sample_image,
            remote_code=remote_code,
        )
