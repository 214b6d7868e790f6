# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Callbacks between the steps of a call, of diffusers' kind."""

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback


class D2iTCFGCutoffCallback(PipelineCallback):
    """Ends classifier-free guidance after a step, as `SDCFGCutoffCallback` does for Stable Diffusion.

    pipe(class_labels=[207], callback_on_step_end=D2iTCFGCutoffCallback(cutoff_step_ratio=0.4))

    `guidance_interval` of the call says the same without a callback, and when guidance begins besides.

    Args:
        cutoff_step_ratio: where among the steps guidance ends, in [0, 1].
        cutoff_step_index: the last step that is guided; the ratio is None then.
    """

    tensor_inputs = []

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by the pipeline after every step."""
        last = self.config.cutoff_step_index
        if last is None:
            last = int(pipeline.num_timesteps * self.config.cutoff_step_ratio)
        if step_index == last:
            pipeline._guidance_scale = 1.0
        return callback_kwargs
