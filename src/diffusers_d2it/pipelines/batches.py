# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Which labels, pictures, maps, budgets and seeds belong together in the images of a call."""

from dataclasses import dataclass

import torch

from ..words import counted


Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class Batch:
    """What each of B images is made of."""

    size: int  # B
    ids: list[int] | None  # class of each image; None for an unconditional model
    pictures: list[int]  # which of the pictures that were given
    each: dict[str, list]  # by the name of an argument what each image has of it
    map_generator: Generators  # of maps that are drawn; one, or one for each image
    generator: Generators  # of all noise


def make_batch(
    ids: list[int] | None,
    num_images_per_prompt: int,
    generator: Generators,
    num_pictures: int = 1,
    **each: list,
) -> Batch:
    """Pair what a call was given.

    Labels and pictures are paired, a single one with all others, and each pair gives `num_images_per_prompt` images.
    What they may `each` have (maps, shares, budgets) is one for all, one a pair, or one an image. Several for a single
    image give as many images of the same noise, in the start and in every step, so that they differ by these alone.

    Raises:
        ValueError: their numbers do not fit; the argument and its number are named.
    """
    labels = [None] if ids is None else ids
    prompts = max(len(labels), num_pictures)
    if {len(labels), num_pictures} - {1, prompts}:
        raise ValueError(f"`class_labels` must be one, or one for each image, got {len(labels)} for {num_pictures}.")
    several = max(map(len, each.values()))
    same_noise = prompts == num_images_per_prompt == 1 < several
    if same_noise:
        prompts = several
    size = prompts * num_images_per_prompt

    def paired(values: list, name: str, prompts: int = prompts) -> list:
        if len(values) == size:
            return values
        if len(values) not in (1, prompts):
            raise ValueError(f"`{name}` must be one, or one for each of {counted(size, 'image')}, got {len(values)}.")
        per_prompt = values if len(values) == prompts else values * prompts
        return [value for value in per_prompt for _ in range(num_images_per_prompt)]

    map_generator = generator
    if same_noise:  # also where the map of one is drawn and that of another is given
        map_generator, generator = _same_noise(generator, size)
    return Batch(
        size=size,
        ids=None if ids is None else paired(ids, "class_labels"),
        pictures=paired(list(range(num_pictures)), "image"),
        each={name: paired(values, name) for name, values in each.items()},
        map_generator=map_generator,
        generator=generator,
    )


def _same_noise(generator: Generators, number: int) -> tuple[list[torch.Generator], list[torch.Generator]]:
    """Generators for maps and for noise that all draw what one would, which goes on with them."""
    if isinstance(generator, list):
        return generator, generator
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    copies = [torch.Generator(generator.device).set_state(generator.get_state()) for _ in range(2 * number - 1)]
    return copies[:number], [generator, *copies[number:]]
