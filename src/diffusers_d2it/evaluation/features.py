# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Features in which sets of images are compared, of networks of others.

Features are those of Inception, of DINOv2 and other ViTs, or of any module. They take images as they lie on disk,
uint8, and do the rest themselves: how they resize and normalise is part of the protocol of a metric.

Shapes:
    B images, H W their sides in pixels, D features, K classes
"""

import hashlib
import importlib
import io
import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..optional import import_optional
from ..pixels import check_uint8, from_uint8
from ..words import printable
from .vision_networks import EFFICIENTNET_LITE, EfficientNetLite, load_vision_model, run_vision_model


_INCEPTION_SHA256 = "6726825d"  # as its authors put it into the name of the file
_ON_A_CPU = 4  # images at once: layers of more are new memory each, which the system hands out page by page
_IN_A_MODULE = re.compile(r"[\w.]+:\w+")
_RESIZED = "resized to {0}x{0}, bicubic, antialiased, not rounded to 8 bits"


class FeatureExtractor(nn.Module, ABC):
    """A frozen network, called with images; its features are float32.

        features = load_features("inception")
        features(images)  # uint8 (B, 3, H, W) -> {"pool": (B, 2048), "spatial": (B, 2023), "logits": (B, 1008)}

    Attributes:
        name: short, for names of metrics: "inception", "dinov2".
        preprocessing: what happens to the images first, in words.
        package: where the network comes from, for the versions in a protocol; None for this package.
    """

    name: str
    preprocessing: str
    package: str | None = None

    @abstractmethod
    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of images (B, 3, H, W), uint8: "pool" (B, D), and some of "spatial", "logits", "imagenet"."""

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of uint8 images (B, 3, H, W), others are a ValueError: each (B, D), as `extract` has them."""
        check_uint8(images)
        # TensorFloat-32, which cuDNN uses unasked, would give each GPU and each batch size results of its own
        cudnn = torch.backends.cudnn
        exact = cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)
        with exact, torch.autocast(images.device.type, enabled=False):
            found = [self.extract(part) for part in images.split(_ON_A_CPU if images.is_cpu else len(images) or 1)]
            return {name: torch.cat([one[name] for one in found]).float() for name in found[0]}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def widths(self, size: tuple[int, int]) -> dict[str, int]:
        """The features of images of a size (H, W), and how many of each: {"pool": 2048, ...}."""
        black = torch.zeros(1, 3, *size, dtype=torch.uint8, device=self.device)
        return {name: feature.shape[1] for name, feature in self(black).items()}

    @cached_property
    def digest(self) -> str:
        return weights_digest(self)

    def describe(self) -> dict[str, str]:
        """What a protocol says of the features."""
        return {"name": self.name, "digest": self.digest, "preprocessing": self.preprocessing}


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of the names and values of all weights of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_features(name: str, weights: str | None = None) -> FeatureExtractor:
    """Features by name.

    Args:
        name: "inception", the network of FID, from torch-fidelity; "efficientnet-lite2" or "efficientnet-lite0", a
            classifier of ImageNet; the folder or Hub name of a DINOv2 or another vision transformer that transformers
            loads; or "package.module:callable" that returns an nn.Module, for `ModuleFeatures`.
        weights: with "inception" the file of its weights; downloaded by default.

    Raises:
        ValueError: the network cannot be loaded, or a package is missing or broken; what it is, and how to get it.
    """
    if name == "inception":
        return InceptionFeatures(weights)
    if weights is not None:
        raise ValueError(f"`weights` belong to the features 'inception', got {weights!r} for {name!r}.")
    if name in EFFICIENTNET_LITE:
        return EfficientNetFeatures(name)
    if _IN_A_MODULE.fullmatch(name):
        return _from_callable(name)
    return VisionTransformerFeatures(name)


class InceptionFeatures(FeatureExtractor):
    """The Inception network of FID, as torch-fidelity has it: TensorFlow's of 2015-12-05, with its weights.

    "pool" are the 2048 features of FID, KID, precision and recall, "logits" those without bias that the Inception
    Score is computed on, "spatial" the 2023 features of sFID. Argument and errors are those of `load_features`.
    """

    name = "inception"
    preprocessing = "resized to 299x299 by torch-fidelity: bilinear as in TensorFlow 1, not antialiased"
    package = "torch-fidelity"

    def __init__(self, weights: str | None = None):
        super().__init__()
        module = import_optional("torch_fidelity.feature_extractor_inceptionv3", "the Inception network", "inception")
        url = module.URL_INCEPTION_V3
        path = _download_inception(url) if weights is None else Path(weights)
        checked, outputs = _read_tensors(path, url), ["2048", "logits_unbiased"]
        try:
            network = module.FeatureExtractorInceptionV3("inception", outputs, feature_extractor_weights_path=checked)
        except (AttributeError, RuntimeError, TypeError) as error:  # other weights, or no dictionary of them
            raise ValueError(f"{path} holds the weights of another network, expected those of {url}.") from error
        self.network, self._spatial = network, None
        # ADM's evaluator, which sFID is compared with, reads `mixed_6/conv:0`: in the network that was ported the
        # blocks mixed_4 to mixed_7 are Mixed_6b to Mixed_6e, and `conv` is their 1x1 branch after its ReLU.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        # Its first seven channels, and the channel last, as in statistics that others have saved
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pool, logits = self.network(images)
        spatial, self._spatial = self._spatial, None
        return {"pool": pool, "spatial": spatial, "logits": logits}


class EfficientNetFeatures(FeatureExtractor):
    """A classifier of ImageNet that comes with packages: "pool" are its 1280 features, "logits" those of its classes.

    "imagenet" are the same logits, for the metric top1. Argument and errors are those of `EfficientNetLite`. Use one
    size to train with and another one to judge.
    """

    package = "efficientnet-lite-pytorch"

    def __init__(self, name: str):
        super().__init__()
        self.name, self.network = name, EfficientNetLite(name)
        self.preprocessing = _RESIZED.format(self.network.image_side) + "; mean 127, deviation 128"

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pool, logits = self.network.classify(from_uint8(images), (self.network.image_side,) * 2)
        return {"pool": pool, "logits": logits, "imagenet": logits}


class VisionTransformerFeatures(FeatureExtractor):
    """The class token of a vision transformer; of DINOv2 ViT-L/14 it is that of FD-DINOv2 (arXiv:2306.04675).

    Argument and errors are those of `load_vision_model`; the size of the input must be a multiple of the patches.
    """

    package = "transformers"

    def __init__(self, name: str):
        super().__init__()
        model, preprocessing = load_vision_model(name)
        self.model = model.float()
        self.name = model.config.model_type
        self.side = _input_side(preprocessing, model.config)
        patch = model.config.patch_size
        if self.side % patch:
            raise ValueError(f"{name!r} wants images of {self.side} pixels, no multiple of its patches of {patch}.")
        self.num_patches = (self.side // patch) ** 2
        mean, std = preprocessing["image_mean"], preprocessing["image_std"]
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        how = f"; mean {mean}, std {std}; the class token after the last norm"
        self.preprocessing = _RESIZED.format(self.side) + how

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        resized = F.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True)
        normalised = (resized.clamp(0, 255) / 255 - self.mean) / self.std
        tokens = run_vision_model(self.model, normalised).last_hidden_state
        if tokens.shape[1] <= self.num_patches:
            raise ValueError(f"the vision model {self.name} has no class token, and its features are that token.")
        return {"pool": tokens[:, 0]}


class ModuleFeatures(FeatureExtractor):
    """Features of any network.

    Args:
        module: images (B, 3, H, W) in [-1, 1], float32 -> features (B, D), or a dictionary that holds them as "pool"
            and may hold "logits" (B, K) for Inception Scores, and "spatial" (B, E). In eval mode.
        name: for names of metrics, such as "fd_<name>".

    Raises:
        ValueError: the module is in training mode, where features depend on the batch, or the name is taken.
    """

    preprocessing = "not resized, scaled to [-1, 1]"

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        if name in ("", "inception"):
            raise ValueError(f"`name` must be one of its own, metrics are named after it, got {name!r}.")
        if module.training:
            raise ValueError(f"the network of the features {name!r} is in training mode: call its eval() first.")
        self.module, self.name = module, name

    def describe(self) -> dict[str, str]:
        """As of every `FeatureExtractor`, and "layers": weights alone do not tell one network from another."""
        return super().describe() | {"layers": hashlib.sha256(repr(self.module).encode()).hexdigest()}

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the module returns, as a dictionary, if its shapes fit; (B, 3, H, W), uint8, as of every extractor."""
        output = self.module(from_uint8(images))
        output = output if isinstance(output, dict) else {"pool": output}
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in output.items()}
        fits = all(len(shape) == 2 and shape[0] == len(images) for shape in shapes.values())
        if not (fits and {"pool"} <= set(output) <= {"pool", "spatial", "logits"}):
            raise ValueError(
                f"the network of the features {self.name!r} must return (B, D), or `pool`, `logits`, `spatial` of such"
                f" shapes; for {len(images)} images it returned {shapes}."
            )
        return output


def _download_inception(url: str) -> Path:
    """Where torch.hub keeps the weights, which are downloaded first."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"features of Inception need weights (91 MB), and {url} could not be downloaded: {error}. Download it"
            f" elsewhere and pass its path as `weights`, or put it at {path}."
        ) from error
    return path


def _read_tensors(path: Path, url: str) -> io.BytesIO:
    """A file of weights for torch-fidelity, which would unpickle whatever is in there: tensors, nothing else."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # more than tensors, cut off, overwritten: there is no end to what its bytes can raise
        raise ValueError(
            f"{path} cannot be read as tensors and nothing else, which could run code ({printable(error)}); expected"
            f" the weights of {url}."
        ) from error
    torch.save(weights, checked := io.BytesIO())
    checked.seek(0)
    return checked


def _input_side(preprocessing: dict, config: object) -> int:
    """The side of a vision model's images in pixels: its crop, else its size."""
    for key in ("crop_size", "size"):
        side = preprocessing.get(key)
        if isinstance(side, dict):
            side = side.get("height", side.get("shortest_edge"))
        if isinstance(side, int):
            return side
    return config.image_size


def _from_callable(name: str) -> FeatureExtractor:
    module, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {name!r} cannot be imported: {error}.") from error
    network = make()
    if isinstance(network, FeatureExtractor):
        return network
    if not isinstance(network, nn.Module):
        raise ValueError(f"features {name!r} must return an nn.Module, got {type(network).__name__}.")
    return ModuleFeatures(network, attribute)
