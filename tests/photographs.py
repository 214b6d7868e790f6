# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Eight photographs that come with scikit-image."""

from functools import cache

import numpy as np
import PIL.Image
import PIL.ImageOps
import skimage.data
import torch

from diffusers_d2it.pixels import from_uint8


_PHOTOS = (  # come with the scikit-image wheel; nothing is downloaded
    skimage.data.astronaut,
    skimage.data.chelsea,
    skimage.data.coffee,
    skimage.data.rocket,
    skimage.data.retina,
    skimage.data.hubble_deep_field,
    skimage.data.immunohistochemistry,
    lambda: skimage.data.stereo_motorcycle()[0],
)


@cache
def load_photographs(resolution: int) -> torch.Tensor:
    """(8, 3, R, R) in [-1, 1]; the same tensor at every call: clone it before changing it."""
    arrays = []
    for photo in _PHOTOS:
        image = PIL.Image.fromarray(photo())
        image = PIL.ImageOps.fit(image.convert("RGB"), (resolution, resolution), PIL.Image.Resampling.BICUBIC)
        arrays.append(np.asarray(image))
    return from_uint8(torch.from_numpy(np.stack(arrays))).permute(0, 3, 1, 2).contiguous()
