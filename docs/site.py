# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the site takes from where (a hook of MkDocs, see `mkdocs.yml`).

Pages lie in the site as they lie in the repository, so that the same links lead to the same pages in both.
"""

import ast
import logging
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[1]
PAGES = ["*.md", "docs/*.md", "examples/*.md", "benchmarks/**/*.md", "src/diffusers_d2it/checkpoints/*/*.md"]
ASSETS = [
    "docs/**/*.png",
    "docs/**/*.jpg",
    "docs/**/*.gif",
    "docs/**/*.svg",
    "docs/**/*.ipynb",
    "docs/site.css",
    "src/diffusers_d2it/checkpoints/*/*.png",
]
NOT_HERE = {"docs/index.md"}  # the index of those who read in the repository; here it is the navigation
FOREIGN = {"ModelMixin"}  # of diffusers
LARGEST = 500_000  # bytes of a picture

log = logging.getLogger("mkdocs.hooks.site")  # with --strict a warning fails the build


def on_files(files: Files, config) -> Files:
    """The pages and pictures of the repository, and what the theme brings."""
    paths = {str(path.relative_to(ROOT)) for pattern in PAGES + ASSETS for path in ROOT.glob(pattern)} - NOT_HERE
    ours = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in sorted(paths)]
    for file in ours:
        if file.is_media_file() and (size := (ROOT / file.src_uri).stat().st_size) > LARGEST:
            log.warning("%s has %d bytes, a picture may have %d", file.src_uri, size, LARGEST)
    return Files(ours + [file for file in files if file.src_dir != config.docs_dir])


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Pictures have a text; links to sources, which are no pages, lead to the repository, or are text without one."""
    here = (ROOT / page.file.src_uri).parent
    for silent in re.findall(r"!\[\s*\]\([^)]*\)", markdown):
        log.warning("%s shows a picture without words for who cannot see it: %s", page.file.src_uri, silent)

    def lead(match: re.Match) -> str:
        target = (here / match["path"]).resolve()
        if not target.exists() or files.get_file_from_path(str(target.relative_to(ROOT))):
            return match[0]  # a page, or a mistake, which MkDocs names
        if not config.repo_url:
            return match["text"]
        kind = "tree" if target.is_dir() else "blob"
        return f"[{match['text']}]({config.repo_url.rstrip('/')}/{kind}/main/{target.relative_to(ROOT)})"

    return re.sub(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)(?:#[^)\s]*)?\)", lead, markdown)


def on_post_page(output: str, page, config) -> str:
    """Whoever reads a page asks no other server for anything."""
    for part in re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>", output):
        log.warning("%s asks another server: %s", page.file.src_uri, part)
    return output


def on_env(env, config, files: Files):
    """Every public name has its place in docs/api.md, says what it and its methods are, and has types throughout."""
    entries = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.M)
    package = griffe.load("diffusers_d2it", search_paths=[str(ROOT / "src")])
    names = ast.literal_eval(str(package["__all__"].value))
    for name in sorted(set(names) - FOREIGN - {entry.split(".")[-1] for entry in entries}):
        log.warning("%s is public and is not in docs/api.md", name)
    for entry in entries:
        _check(package[entry.removeprefix("diffusers_d2it.")], entry)
    return env


def _check(thing, name: str) -> None:
    if not thing.has_docstring:
        log.warning("%s has no docstring", name)
    if thing.is_class:
        for key, member in thing.all_members.items():
            if member.is_function and member.is_public and (key == "__call__" or not key.startswith("__")):
                _check(member, f"{name}.{key}")
    if thing.is_function and not name.endswith("__init__"):
        untyped = [one.name for one in thing.parameters if one.annotation is None and one.name not in ("self", "cls")]
        if untyped or thing.returns is None:
            log.warning("%s lacks the type of %s", name, ", ".join(untyped) or "what it returns")
    if thing.is_function and thing.has_docstring:
        sections = thing.docstring.parse("google", warnings=False)
        said = [item.name for section in sections if section.kind.value == "parameters" for item in section.value]
        given = {parameter.name.lstrip("*") for parameter in thing.parameters}
        for unknown in {part.lstrip("*") for item in said for part in item.split(", ")} - given - {"..."}:
            log.warning("%s documents %s, which is no argument of it", name, unknown)
