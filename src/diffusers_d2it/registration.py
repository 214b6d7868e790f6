# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Makes the classes of this package loadable by diffusers: the one place that touches its internals.

Without it `D2iTPipeline.from_pretrained("user/repo")` fails on components that diffusers does not know (diffusers
issue 6563). Each internal is looked up with care and pinned by a test: a diffusers that moved it fails there, not
here.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import diffusers


_AUTO_PIPELINE = "diffusers.pipelines.auto_pipeline"


def register(
    models: list[type], families: dict[str, dict[str, type]], block_classes: list[type], processor_class: type
) -> None:
    """Let `DiffusionPipeline`, `AutoModel`, and the hooks of caches and guiders of diffusers find our classes.

    Args:
        models: by their public names.
        families: pipelines of the same components, which `AutoPipeline` makes of one another, by what it calls their
            tasks.
        block_classes: transformer blocks whose first output is the hidden states.
        processor_class: processor of their attention.
    """
    for cls in (*models, *(pipeline for family in families.values() for pipeline in family.values())):
        setattr(diffusers, cls.__name__, cls)

    def register_tasks(auto_pipeline: ModuleType) -> None:
        for name, family in families.items():
            for task, pipeline in family.items():
                getattr(auto_pipeline, f"AUTO_{task.upper()}_PIPELINES_MAPPING", {})[name] = pipeline

    _once_imported(_AUTO_PIPELINE, register_tasks)

    try:
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    except ImportError:  # D2iTPipeline still loads from a local folder
        pass
    else:
        LOADABLE_CLASSES["diffusers_d2it"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}

    try:
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
    except ImportError:  # all but `from_single_file`
        pass
    else:
        for cls in models:
            SINGLE_FILE_LOADABLE_CLASSES[cls.__name__] = {"checkpoint_mapping_fn": lambda checkpoint, **_: checkpoint}

    try:
        from diffusers.hooks import _helpers as hooks
    except ImportError:  # models work, only FirstBlockCache and its kin do not know their blocks
        return
    for block_class in block_classes:
        metadata = hooks.TransformerBlockMetadata(return_hidden_states_index=0)
        hooks.TransformerBlockRegistry.register(block_class, metadata)
    skipped = hooks.AttentionProcessorMetadata(skip_processor_output_fn=lambda attn, hidden_states, *_: hidden_states)
    hooks.AttentionProcessorRegistry.register(processor_class, skipped)


def _once_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with a module: now, or as soon as somebody imports it. This one takes seconds, as it imports all."""
    if name in sys.modules:
        then(sys.modules[name])
        return

    class Finder:
        @staticmethod
        def find_spec(asked: str, path=None, target=None):
            if asked != name:
                return None
            sys.meta_path.remove(Finder)
            spec = find_spec(name)
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                then(module)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder)
