# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Makes the classes of this package loadable by diffusers: the one place that touches its internals.

Without it `D2iTPipeline.from_pretrained("user/repo")` fails on components that diffusers does not know (diffusers
issue 6563). Each internal is looked up with care and pinned by a test: a diffusers that moved it fails there, not
here.
"""

import diffusers


def register(classes: list[type], block_classes: list[type]) -> None:
    """Let `DiffusionPipeline`, `AutoModel` and the cache hooks of diffusers find our classes.

    Args:
        classes: models, pipelines and outputs, by their public names.
        block_classes: transformer blocks whose first output is the hidden states.
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
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError:  # models work, only FirstBlockCache and its kin do not know their blocks
        return
    for block_class in block_classes:
        TransformerBlockRegistry.register(block_class, TransformerBlockMetadata(return_hidden_states_index=0))
