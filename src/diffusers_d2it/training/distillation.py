# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How a DC-DiT that was made of a DiT (`upcycle_dit`) learns to be one before it learns to be better.

Shapes:
    B batch, C latent channels, H W their sides in cells, D width, T cells that are kept as tokens
    h w sides in patches of the DiT, p = H / h
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..conversion.dit import convert_diffusers_dit, convert_dit_checkpoint
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_dcdit import DCDiTModel
from .alignment import patches_of


class Distillation:
    """Compares what the blocks of a DC-DiT make of its tokens with what those of a frozen DiT make of its patches.

    A token is a cell, and is compared with the patch that it lies in. (The paper's first version says that outputs of
    blocks are compared, and not which with which.)

        distillation = Distillation.from_dit(student, "DiT-XL-2-256x256.pt")
        output = student(noised, timesteps, class_labels)
        loss = distillation(output.kept, output.sample, noised, timesteps, class_labels)

    Args:
        student: of `upcycle_dit`.
        teacher: the DiT, as `convert_dit_checkpoint` or `convert_diffusers_dit` makes it a content model: under a map
            that is all fine it computes what the DiT computes.

    Raises:
        ValueError: the two do not have as many blocks of one width, or do not see the same patches.
    """

    def __init__(self, student: DCDiTModel, teacher: D2iTContentModel):
        for key in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "num_classes"):
            if student.config[key] != teacher.config[key]:
                theirs, ours = teacher.config[key], student.config[key]
                raise ValueError(f"`{key}` must be that of the teacher, {theirs}, got {ours}.")
        if student.config.position_patch_size != teacher.patch_size:
            raise ValueError(
                f"`position_patch_size` must be that of the teacher, {teacher.patch_size}, got"
                f" {student.config.position_patch_size}."
            )
        self.teacher = teacher.requires_grad_(False).eval()
        self._tokens: list[torch.Tensor] = []
        self._patches: list[torch.Tensor] = []
        hooks = [(student, self._keep_tokens), (teacher, self._keep_patches)]
        self._handles = [
            block.register_forward_hook(hook) for model, hook in hooks for block in model.transformer_blocks
        ]

    @classmethod
    def from_dit(cls, student: DCDiTModel, path: str | Path) -> "Distillation":
        """With the DiT of a file of the original or of a folder of diffusers, as `upcycle_dit` reads them.

        Raises:
            ValueError: there is none, or as above.
        """
        config = student.config
        sizes = {"num_grains": config.position_patch_size.bit_length(), "num_refine_layers": 1}
        if Path(path).is_dir():
            teacher, _ = convert_diffusers_dit(path, frequency_shift=config.frequency_shift, **sizes)
        else:
            teacher, _ = convert_dit_checkpoint(path, num_attention_heads=config.num_attention_heads, **sizes)
        return cls(student, teacher.to(student.device))

    def remove(self) -> None:
        """End it: blocks keep nothing any more."""
        for handle in self._handles:
            handle.remove()

    def _keep_tokens(self, block: nn.Module, inputs: tuple, tokens: torch.Tensor) -> None:
        if torch.is_grad_enabled():  # not those of samples drawn meanwhile
            self._tokens.append(tokens)

    def _keep_patches(self, block: nn.Module, inputs: tuple, patches: torch.Tensor) -> None:
        self._patches.append(patches)

    def __call__(
        self,
        kept: torch.Tensor,
        sample: torch.Tensor,
        noised: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Mean over the blocks of the squared difference of their outputs, and that of the noise: a scalar.

        Args:
            kept: (B, H, W) bool, of the student's last forward pass.
            sample: what it predicted, (B, O, H, W).
            noised, timesteps, class_labels: what it was given.
        """
        num_blocks = len(self.teacher.transformer_blocks)
        tokens, self._tokens = self._tokens[-num_blocks:], []  # checkpointed ones have run again since the last call
        size = tuple(side // self.teacher.patch_size for side in kept.shape[1:])
        grain_map = torch.full((len(kept), *size), self.teacher.config.num_grains - 1, device=kept.device)
        with torch.no_grad():
            expected = self.teacher(noised, timesteps, grain_map, class_labels).sample
        patches, self._patches = self._patches, []
        places = patches_of(kept, size)
        differences = [
            F.mse_loss(ours.float(), theirs.flatten(0, 1)[places].float()) for ours, theirs in zip(tokens, patches)
        ]
        channels = noised.shape[1]
        of_noise = F.mse_loss(sample[:, :channels].float(), expected[:, :channels].float())
        return torch.stack(differences).mean() + of_noise
