# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Makes the classes of this package loadable by diffusers: the one place that touches its internals.

Without it `D2iTPipeline.from_pretrained("user/repo")` fails on components that diffusers does not know (diffusers
issue 6563). Each internal is looked up with care and pinned by a test: a diffusers that moved it fails there, not
here.
"""

import diffusers
from diffusers.loaders import FromOriginalModelMixin


def register(classes: list[type], block_classes: list[type], processor_class: type) -> None:
    """Let `DiffusionPipeline`, `AutoModel`, and the hooks of caches and guiders of diffusers find our classes.

    Args:
        classes: models, pipelines and outputs, by their public names.
        block_classes: transformer blocks whose first output is the hidden states.
        processor_class: processor of their attention.
    """
    for cls in classes:
        setattr(diffusers, cls.__name__, cls)

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
        for cls in classes:
            if issubclass(cls, FromOriginalModelMixin):
                as_saved = {"checkpoint_mapping_fn": lambda checkpoint, **kwargs: checkpoint}
                SINGLE_FILE_LOADABLE_CLASSES[cls.__name__] = as_saved

    try:
        from diffusers.hooks import _helpers as hooks
    except ImportError:  # models work, only FirstBlockCache and its kin do not know their blocks
        return
    for block_class in block_classes:
        metadata = hooks.TransformerBlockMetadata(return_hidden_states_index=0)
        hooks.TransformerBlockRegistry.register(block_class, metadata)
    skipped = hooks.AttentionProcessorMetadata(skip_processor_output_fn=lambda attn, hidden_states, *_: hidden_states)
    hooks.AttentionProcessorRegistry.register(processor_class, skipped)
