# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Models of one shape: ours, diffusers' DiT and the original DiT, with the same weights where they are one function.

The backbone of a content model, all that is left when its RefineNets are taken away, is a DiT wherever the map is
fine. So `original_dit_of(backbone)` and `diffusers_dit_of(backbone)` compute what the backbone computes, and
`check_equal` holds benchmarks to it.
"""

import copy
import dataclasses
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel
from original_dit import CHANNELS, LAYER_NORM_EPS, PATCH_SIZE, DiTShape, OriginalDiT
from torch import nn

from diffusers_d2it import D2iTContentModel, D2iTGrainModel, D2iTPipeline, DynamicAutoencoderKL, load_preset
from diffusers_d2it.grains import tie


XL = DiTShape(num_layers=28, heads=16, head_dim=72, sample_size=32)  # DiT-XL/2 at 256x256 pixels
ORIGINAL, DIFFUSERS = "original DiT", "diffusers' DiT"
Forward = Callable[[], torch.Tensor]


def content_model(shape: DiTShape, num_refine_layers: int, num_grains: int = 2) -> D2iTContentModel:
    """Content model of as many blocks: `num_refine_layers` of RefineNet, the others of the Multi-grained Net."""
    return randomized(
        D2iTContentModel(
            sample_size=shape.sample_size,
            in_channels=CHANNELS,
            num_grains=num_grains,
            num_layers=shape.num_layers - num_refine_layers,
            num_refine_layers=num_refine_layers,
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            num_classes=shape.num_classes,
        )
    )


def randomized(model: D2iTContentModel) -> D2iTContentModel:
    """Give every weight a random value, so that every path matters to the output.

    Only the embedding of the grains stays zero: where a map is fine, the Multi-grained Net is then a DiT.
    """
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.03)
    nn.init.zeros_(model.grain_embed.linear_2.weight)
    nn.init.zeros_(model.grain_embed.linear_2.bias)
    return model.eval()


def backbone(shape: DiTShape) -> D2iTContentModel:
    """The Multi-grained Net with all blocks of the shape: a content model whose RefineNets are taken away."""
    model = content_model(dataclasses.replace(shape, num_layers=shape.num_layers + 1), num_refine_layers=1)
    model.refine_nets = nn.ModuleList()
    return model


def original_dit_of(model: D2iTContentModel) -> OriginalDiT:
    """The original DiT with the weights of a backbone."""
    dit = OriginalDiT(_shape_of(model)).eval()
    pairs = {
        "patch_embed": model.patch_embed,
        "time_mlp.0": model.time_embed.mlp.linear_1,
        "time_mlp.2": model.time_embed.mlp.linear_2,
        "label_embed": model.label_embed,
        "final_layer.adaln.1": model.norm_out.adaln,
        "final_layer.proj": model.norm_out.proj_out,
    }
    state = {}
    for i, block in enumerate(model.transformer_blocks):
        pairs |= {
            f"blocks.{i}.proj": block.attn.to_out[0],
            f"blocks.{i}.mlp.0": block.ff.linear_1,
            f"blocks.{i}.mlp.3": block.ff.linear_2,
            f"blocks.{i}.adaln.1": block.adaln,
        }
        projections = (block.attn.to_q, block.attn.to_k, block.attn.to_v)
        for name in ("weight", "bias"):
            state[f"blocks.{i}.qkv.{name}"] = torch.cat([getattr(projection, name) for projection in projections])
    return _loaded(dit, state | _state_of(pairs), missing={"positions"})


def diffusers_dit_of(model: D2iTContentModel) -> DiTTransformer2DModel:
    """diffusers' DiT with the weights of a backbone."""
    shape = _shape_of(model)
    dit = DiTTransformer2DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        in_channels=CHANNELS,
        num_layers=shape.num_layers,
        sample_size=shape.sample_size,
        patch_size=PATCH_SIZE,
        num_embeds_ada_norm=shape.num_classes,
        norm_eps=LAYER_NORM_EPS,
    ).eval()
    pairs = {"pos_embed.proj": model.patch_embed}
    pairs |= {"proj_out_1": model.norm_out.adaln, "proj_out_2": model.norm_out.proj_out}
    for i, block in enumerate(model.transformer_blocks):
        theirs = f"transformer_blocks.{i}"
        pairs |= {
            f"{theirs}.attn1.to_q": block.attn.to_q,
            f"{theirs}.attn1.to_k": block.attn.to_k,
            f"{theirs}.attn1.to_v": block.attn.to_v,
            f"{theirs}.attn1.to_out.0": block.attn.to_out[0],
            f"{theirs}.ff.net.0.proj": block.ff.linear_1,
            f"{theirs}.ff.net.2": block.ff.linear_2,
            f"{theirs}.norm1.linear": block.adaln,
            # Every block of diffusers' DiT embeds timestep and label anew.
            f"{theirs}.norm1.emb.timestep_embedder": model.time_embed.mlp,
            f"{theirs}.norm1.emb.class_embedder.embedding_table": model.label_embed,
        }
        dit.transformer_blocks[i].norm1.emb.time_proj.downscale_freq_shift = 0  # the original's frequencies
    return _loaded(dit, _state_of(pairs), missing=set())


def _shape_of(model: D2iTContentModel) -> DiTShape:
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "num_classes")
    return DiTShape(*(model.config[name] for name in names))


def peers_of(model: D2iTContentModel) -> dict[str, nn.Module]:
    """Both DiTs, by name, with the weights of a backbone."""
    return {ORIGINAL: original_dit_of(model), DIFFUSERS: diffusers_dit_of(model)}


def _state_of(pairs: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{theirs}.{name}": value for theirs, ours in pairs.items() for name, value in ours.state_dict().items()}


def _loaded(dit: nn.Module, state: dict[str, torch.Tensor], missing: set[str]) -> nn.Module:
    """The peer with these weights, a linear patch embedding as the convolution's; all but `missing` must be there."""
    expected = dit.state_dict()
    state = {name: value.view_as(expected[name]) for name, value in state.items()}
    left_out = set(dit.load_state_dict(state, strict=False).missing_keys)
    if left_out != missing:
        raise RuntimeError(f"no weights for {sorted(left_out - missing)} of {type(dit).__name__}.")
    return dit


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What one step of sampling works on, the same for all sides."""

    latents: torch.Tensor  # tied, (B, C, H, W)
    timestep: torch.Tensor  # (B,)
    class_labels: torch.Tensor  # (B,)
    grain_map: torch.Tensor  # (B, h, w)

    @classmethod
    def random(cls, grain_map: torch.Tensor, num_classes: int = 1000, cells: int = PATCH_SIZE) -> "Inputs":
        """For a map (B, h, w) whose regions have so many cells a side."""
        batch_size, (height, width) = len(grain_map), (cells * side for side in grain_map.shape[1:])
        latents = tie(torch.randn(batch_size, CHANNELS, height, width, device=grain_map.device), grain_map)
        timestep = torch.randint(1000, (batch_size,), device=grain_map.device)
        return cls(latents, timestep, torch.randint(num_classes, (batch_size,), device=grain_map.device), grain_map)

    def guided(self, num_classes: int = 1000) -> "Inputs":
        """Twice the batch: with class labels and without."""
        labels = torch.cat([self.class_labels, torch.full_like(self.class_labels, num_classes)])
        latents, grain_map = self.latents.repeat(2, 1, 1, 1), self.grain_map.repeat(2, 1, 1)
        return Inputs(latents, self.timestep.repeat(2), labels, grain_map)

    def all_fine(self) -> "Inputs":
        """On a map without coarse regions, where a backbone is a DiT."""
        return dataclasses.replace(self, grain_map=torch.ones_like(self.grain_map))

    def to(self, dtype: torch.dtype) -> "Inputs":
        return dataclasses.replace(self, latents=self.latents.to(dtype))


def forward_of(model: nn.Module, inputs: Inputs) -> Forward:
    """What one step of sampling calls. What depends on the map alone is prepared here, once for all steps."""
    latents, timestep, labels = inputs.latents, inputs.timestep, inputs.class_labels
    if isinstance(model, OriginalDiT):
        return lambda: model(latents, timestep, labels)
    if isinstance(model, DiTTransformer2DModel):
        return lambda: model(latents, timestep=timestep, class_labels=labels, return_dict=False)[0]
    layout = model.prepare_grain_map(inputs.grain_map)
    return lambda: model(latents, timestep, layout, labels, return_dict=False)[0]


def cast(model: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """The model, moved in place. The `to` of diffusers would warn of modules kept in fp32, of which there are none."""
    return nn.Module.to(model, device=device, dtype=dtype)


def compiled(model: nn.Module) -> nn.Module:
    """A copy, compiled as one graph."""
    model = copy.deepcopy(model)
    model.compile()
    return model


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules, not of their weights: it may be checkpointed or compiled by itself."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def random_pipeline(
    transformer: D2iTContentModel, vae: str, grain_model: str | None, device: str, dtype: torch.dtype
) -> D2iTPipeline:
    """A pipeline of a content model and of presets of the other two with random weights, whose maps mean nothing."""
    grains = None
    if grain_model is not None:
        num_classes = transformer.config.num_classes
        grains = D2iTGrainModel(**load_preset(grain_model) | {"num_classes": num_classes}).eval()
        for parameter in grains.parameters():
            nn.init.normal_(parameter, std=0.02)
    parts = (DynamicAutoencoderKL(**load_preset(vae)).eval(), grains, transformer)
    for part in filter(None, parts):
        cast(part, device, dtype)
    ddim = {"clip_sample": False, "timestep_spacing": "trailing"}
    grain_scheduler = None if grains is None else DDIMScheduler(prediction_type="sample", **ddim)
    return quiet(D2iTPipeline(*parts, DDIMScheduler(**ddim), grain_scheduler))


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline, without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((output.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def check_equal(outputs: dict[str, torch.Tensor], tolerance: float) -> float:
    """The largest relative error of all sides against the first one, which must lie within the tolerance."""
    (first, expected), *others = outputs.items()
    errors = {name: relative_error(output, expected) for name, output in others}
    for name, error in errors.items():
        if not error <= tolerance:  # NaN is no equality
            raise RuntimeError(f"{name} does not compute what {first} computes: relative error {error:.2g}.")
    return max(errors.values())
