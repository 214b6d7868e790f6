# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Loading that never replaces weights silently."""

from diffusers.models.modeling_utils import ModelMixin


class StrictModelMixin(ModelMixin):
    """A `ModelMixin` whose `from_pretrained` refuses a checkpoint that does not hold exactly the model's weights.

    diffusers initialises what is missing at random and drops what is foreign, with a warning.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a model, as `diffusers.ModelMixin.from_pretrained`.

        Raises:
            ValueError: weights are missing from the checkpoint, foreign to the model, or have another shape.
        """
        return_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        problems = [
            f"{len(info[kind])} {text}, such as {sorted(str(key) for key in info[kind])[0]}"
            for kind, text in (
                ("missing_keys", "weights are missing"),
                ("unexpected_keys", "weights are foreign to the model"),
                ("mismatched_keys", "weights have another shape"),
            )
            if info[kind]
        ]
        if problems:
            source = "/".join(str(part) for part in (pretrained_model_name_or_path, kwargs.get("subfolder")) if part)
            raise ValueError(f"the checkpoint {source} does not fit {cls.__name__}: {'; '.join(problems)}.")
        return (model, info) if return_info else model
