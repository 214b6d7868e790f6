# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Put together what a Space on the Hub needs for the page of `app.py`: README, requirements, scripts and package.

    python examples/make_space.py
    hf upload user/name examples/space . --repo-type space

The folder stands alone: the package with its checkpoint lies in it, beside the versions that are seen to work.
"""

import argparse
import re
import shutil
from pathlib import Path

from command_line import begin, make_parser, output_folder


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("app.py", "page_actions.py", "command_line.py")
NOT_NEEDED = ("tiny-imagenet-20-64", "__pycache__")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", type=output_folder, default="examples/space", help="folder of the Space")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    ARGS = begin(parse_args)


def requirements() -> str:
    """What setup.py asks for, and gradio, at the versions of constraints.txt where it has one."""
    text = (ROOT / "setup.py").read_text()
    needed = re.findall(r'^        "([\w-]+)[^"]*",', text.split("install_requires=[")[1].split("]")[0], re.M)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].replace("_", "-"): line for line in lines if "==" in line}
    return "\n".join(sorted(pins.get(name, name) for name in [*needed, "gradio"])) + "\n"


def readme() -> str:
    """The card of the Space: its front matter says what the Hub runs."""
    gradio = re.search(r"^gradio==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    return f"""---
title: D2iT
emoji: 🎨
colorFrom: blue
colorTo: red
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
short_description: Draw and edit, with the detail where you paint it
---

# D²iT: detail where you want it

Pictures of a small demonstration model of D²iT, the Dynamic Diffusion Transformer
([arXiv:2504.09454](https://arxiv.org/abs/2504.09454)), whose map of detail is in your hands: draw, paint it, edit,
compare. Its 128x128 pixels and the ten classes of Imagenette were trained on two CPU cores, and need no more.
"""


def main(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    for name in SCRIPTS:
        shutil.copy(ROOT / "examples" / name, folder / name)
    package = ROOT / "src" / "diffusers_d2it"
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns(*NOT_NEEDED), dirs_exist_ok=True)
    for name, text in (("README.md", readme()), ("requirements.txt", requirements())):
        (folder / name).write_text(text, encoding="utf-8")
    print(f"next: hf upload user/name {folder} . --repo-type space")


if __name__ == "__main__":
    main(ARGS)
