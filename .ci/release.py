# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a release is made of: sdist and wheel in dist/, looked into, and the wheel tried in an empty environment.

    python .ci/release.py [--no_install]

The wheel is built from the sdist, so that the sdist is known to be whole. Nothing is uploaded.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = "diffusers_d2it/"
BESIDE = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}  # what an sdist has besides the package
LIMIT = 60e6  # bytes of each: an index takes 100 MB; most of it are the bundled checkpoints
TRY = """
import diffusers_d2it
from diffusers_d2it import D2iTPipeline, bundled_checkpoint, list_bundled_checkpoints, list_presets, load_preset
assert "site-packages" in diffusers_d2it.__file__, diffusers_d2it.__file__
for name in list_presets():
    load_preset(name)
for name in list_bundled_checkpoints():
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint(name))
    image = pipe(class_labels=[0 if "nette" in name else 1]).images[0]
    assert len(image.getcolors(2**24)) > 100
    print(f"the wheel, installed, drew {image.width}x{image.height} pixels with {name}")
    image.save("image.png")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no_install", action="store_true", help="build and look, and do not try the wheel")
    args = parser.parse_args()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    package = {path.removeprefix("src/") for path in tracked if path.startswith(f"src/{PACKAGE}")}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"  # what is committed, without whatever else lies in this folder
        run("git", "clone", "--quiet", ROOT, clone)
        run(sys.executable, "-m", "build", "--outdir", ROOT / "dist", clone)
        version = released_version(clone)
        sdist, wheel = (ROOT / "dist" / f"{PACKAGE[:-1]}-{version}{end}" for end in (".tar.gz", "-py3-none-any.whl"))
        check(wheel, {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}, package)
        with tarfile.open(sdist) as archive:
            names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        check(sdist, {name.removeprefix("src/") for name in names if name.startswith(f"src/{PACKAGE}")}, package)
        if missing := BESIDE - names:
            sys.exit(f"{sdist.name} lacks {sorted(missing)}")
        if not args.no_install:
            try_wheel(wheel, Path(folder))


def released_version(clone: Path) -> str:
    """The version of the package, which CITATION.cff and the changelog must know."""
    version = re.search(r'^__version__ = "(.+)"$', (clone / "src" / PACKAGE / "__init__.py").read_text(), re.M)[1]
    for name, line in (("CITATION.cff", f"version: {version}\n"), ("CHANGELOG.md", version)):
        if line not in (clone / name).read_text():
            sys.exit(f"{name} does not know version {version}")
    return version


def check(archive: Path, names: set[str], expected: set[str]) -> None:
    """End unless an archive holds the files of the package that are committed, no others, and is small enough."""
    size = archive.stat().st_size
    print(f"{archive.name}: {len(names)} files of the package, {size / 1e6:.1f} MB")
    if names != expected:
        sys.exit(f"missing: {sorted(expected - names)}, unexpected: {sorted(names - expected)}")
    if size > LIMIT:
        sys.exit(f"{archive.name} has {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")


def try_wheel(wheel: Path, folder: Path) -> None:
    """Install a wheel where nothing else is, and draw an image with each bundled checkpoint."""
    venv.create(folder / "empty", with_pip=True)
    python = folder / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    print(run(python, "-I", "-c", TRY, cwd=folder), end="")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The output of a command; its end is the end of this one where it fails."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
