# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Weights that lie elsewhere and come for each call: the same images, bit for bit."""

import accelerate
import pytest
import torch

from diffusers_d2it import GrainLayout


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = ("vae", "grain_model", "transformer")


def cpu_offload(model, folder):
    accelerate.cpu_offload(model, execution_device=DEVICE)


def cpu_offload_with_buffers(model, folder):
    accelerate.cpu_offload(model, execution_device=DEVICE, offload_buffers=True)


def disk_offload(model, folder):
    accelerate.disk_offload(model, folder, execution_device=DEVICE)


def group_offload(**settings):
    def offload(model, folder):
        path = {"offload_to_disk_path": str(folder)} if settings.get("to_disk") else {}
        others = {name: value for name, value in settings.items() if name != "to_disk"}
        model.enable_group_offload(DEVICE, torch.device("cpu"), **path, **others)

    return offload


leaf, block = {"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}
WAYS = {
    "cpu_offload": cpu_offload,
    "cpu_offload with buffers": cpu_offload_with_buffers,
    "disk_offload": disk_offload,
    "leaf by leaf": group_offload(**leaf),
    "leaf by leaf to disk": group_offload(**leaf, to_disk=True),
    "block by block": group_offload(**block),
    "block by block to disk": group_offload(**block, to_disk=True),
}
STREAMS = {
    "leaf by leaf in a stream": group_offload(**leaf, use_stream=True),
    "block by block in a stream": group_offload(**block, use_stream=True, record_stream=True),
}
on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="streams need a GPU")


def draw(pipe):
    settings = {"num_inference_steps": 2, "grain_num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    return pipe([1, 2], fine_ratio=0.4, generator=torch.Generator().manual_seed(0), **settings).images.cpu()


@pytest.fixture(scope="module")
def expected(make_pipeline):
    return draw(make_pipeline().to(DEVICE))


@pytest.mark.parametrize(
    "way, names",
    [
        *((way, MODELS) for way in WAYS),
        *(pytest.param(way, MODELS, marks=on_gpu) for way in STREAMS),
        *((way, [name]) for way in ("cpu_offload", "leaf by leaf") for name in MODELS),
    ],
)
def test_offloading_changes_no_image(make_pipeline, expected, tmp_path, way, names):
    pipe = make_pipeline()
    for name in MODELS:
        if name not in names:
            getattr(pipe, name).to(DEVICE)
    for name in names:
        (WAYS | STREAMS)[way](getattr(pipe, name), tmp_path / name)
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), expected)  # the weights have gone back, and come again


def test_offloading_the_whole_pipeline(make_pipeline, expected):
    pipe = make_pipeline()
    pipe.enable_group_offload(onload_device=DEVICE, **leaf)
    assert torch.equal(draw(pipe), expected)


@on_gpu
@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_by_diffusers(make_pipeline, expected, way):
    pipe = make_pipeline()
    getattr(pipe, way)(device=DEVICE)
    assert torch.equal(draw(pipe), expected)


def test_a_layout_is_moved_like_a_tensor(make_pipeline):
    layout = make_pipeline().transformer.prepare_grain_map(torch.tensor([[[0, 1], [1, 1]]]))
    assert layout.to(None) is layout
    leaves, structure = torch.utils._pytree.tree_flatten(layout)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves if not isinstance(leaf, int))
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, structure), GrainLayout)
    moved = layout.to("meta", non_blocking=True)
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(moved) if isinstance(leaf, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and len(tensors) > len(layout.masks) + 1
