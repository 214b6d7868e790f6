# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What is random of an image is a function of the seed, of what it is for, and of the number of the image alone."""

import torch

from diffusers_d2it.draws import NUM_SEEDS, draw_integers, draw_uniform, generators_of


def test_what_is_random_of_an_image_is_its_own():
    generators = generators_of(range(100), 5, 7)
    assert len({one.initial_seed() % NUM_SEEDS for one in generators}) == 100  # a CPU reads no more of it
    for other, same in ((generators_of(range(42, 43), 5, 7), True), (generators_of(range(42, 43), 6, 7), False)):
        assert torch.equal(torch.randn(3, generator=other[0]), torch.randn(3, generator=generators[42])) == same
        generators = generators_of(range(100), 5, 7)
    assert generators_of(range(1), 5, 6)[0].initial_seed() != generators_of(range(1), 5, 7)[0].initial_seed()


def test_a_number_of_each_image():
    generators = generators_of(range(20_000), 0)
    uniform, integers = draw_uniform(generators), draw_integers(10, generators)
    assert uniform.shape == (20_000,) and 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.std() - 12**-0.5) < 0.01
    assert integers.dtype == torch.int64 and all(abs(n - 2000) < 200 for n in integers.bincount().tolist())
    alone = draw_uniform(generators_of(range(7, 8), 0))
    assert alone == uniform[7]
