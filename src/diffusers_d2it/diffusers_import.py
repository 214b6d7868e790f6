# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The first import of diffusers, around what is broken: every other module then finds it imported."""

from .broken_packages import call_around


def _import_diffusers() -> type:
    """Import what our modules use, and what diffusers would import later, for a pipeline that is loaded or trained.

    That takes a hundredth of a second more, and what is broken is found and named now.
    """
    import diffusers
    import diffusers.guiders
    import diffusers.pipelines.onnx_utils
    import diffusers.training_utils
    from diffusers.schedulers import KarrasDiffusionSchedulers

    for scheduler in KarrasDiffusionSchedulers:
        getattr(diffusers, scheduler.name)
    return diffusers.ModelMixin


ModelMixin = call_around(_import_diffusers)
