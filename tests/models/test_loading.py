# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""No model loads a checkpoint that does not hold exactly its weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("fault", ["missing", "foreign", "shape"])
@pytest.mark.parametrize("factory", ["make_vae", "make_grain_model", "make_content_model"])
def test_a_checkpoint_with_other_weights_is_refused_by_name(request, tmp_path, factory, fault):
    model = request.getfixturevalue(factory)()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    key = sorted(weights)[len(weights) // 2]
    if fault == "missing":
        del weights[key]
    elif fault == "foreign":
        key = "quant_conv.weight"
        weights[key] = torch.zeros(8, 8, 1, 1)
    else:
        weights[key] = torch.zeros(*weights[key].shape, 2)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        type(model).from_pretrained(tmp_path)
