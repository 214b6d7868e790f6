# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Parts of DC-DiT: a block over images of mixed lengths, and the way back from tokens to cells.

    python benchmarks/packed_chunks.py                    # width of dcdit-b, eight images, fp32
    python benchmarks/packed_chunks.py --device cuda      # width of dcdit-xl, 64 images, bf16

A packed block is measured against a block of DiT with the same weights on as many tokens, of images that all have the
same number: whatever packing costs is the difference. The mixed images keep shares that rise evenly from 22 to 45 % of
their cells, which is what DC-DiT keeps from noise to clean latents in its paper; with half of them at a tenth, as the
half without labels is in cheap guidance, the attention itself has more to do, and that ratio is a note.

Back to the cells, the peer is the form in which the paper writes it: weights of all pairs of kept cells, and the
nearest of all kept cells for every cell, image by image, so without padding. Both run in fp32, as in the model. Cells
are kept at random; the time of neither side depends on which.
"""

import torch
from common import Bench, Flag, main
from peers import cast, relative_error

from diffusers_d2it import load_preset
from diffusers_d2it.models.chunking import Chunks, dechunk
from diffusers_d2it.models.layers import DiTBlock
from diffusers_d2it.models.transformer_dcdit import ChunkBlock


SIDE, FEWEST, MOST = 32, 0.22, 0.45  # cells along a side, shares that are kept
# Images, cells along a side, share kept, sigma, and what is promised
BACK = {"45 % of 32x32": (4, 32, 0.45, 1.0, 0.6), "25 % of 64x64": (1, 64, 0.25, 2.0, 0.5)}


def chunks_of(lengths: list[int], side: int, device: str) -> Chunks:
    """Images that keep so many cells, anywhere."""
    rank = torch.rand(len(lengths), side**2, device=device).argsort(dim=1).argsort(dim=1)
    return Chunks.of((rank < torch.tensor(lengths, device=device)[:, None]).view(-1, side, side))


def dense_dechunk(tokens: torch.Tensor, probability: torch.Tensor, chunks: Chunks, sigma: float) -> torch.Tensor:
    """`chunking.dechunk` by tables over all pairs, of each image (M, M) and (H * W, M)."""
    images = []
    for own, kept, surety in zip(tokens.split(chunks.lengths), chunks.kept, probability):  # own (M, D)
        row, column = kept.nonzero().to(tokens.dtype).T  # (M,)
        squares = (row[:, None] - row).square() + (column[:, None] - column).square()  # (M, M)
        sure = surety[kept].clamp(1e-4, 1 - 1e-4)[:, None]  # (M, 1)
        weights = (squares / (-2 * sigma**2)).exp() * sure.T
        neighbours = weights @ own / (weights.sum(dim=1, keepdim=True) + 1e-8)
        smoothed = sure * own + (1 - sure) * neighbours
        rows, columns = torch.ones_like(kept).nonzero().to(tokens.dtype).T  # (H * W,)
        away = (rows[:, None] - row).square() + (columns[:, None] - column).square()  # (H * W, M)
        images.append(smoothed[away.argmin(dim=1)].view(*kept.shape, -1))
    return torch.stack(images)


@torch.no_grad()
def measure(bench: Bench, preset: str, batch_size: int) -> str:
    torch.manual_seed(0)
    config = load_preset(preset)
    heads, dim = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
    measure_block(bench, dim, heads, batch_size)
    for name, form in BACK.items():
        measure_way_back(bench, dim, name, *form)
    return f"Blocks of {preset}, {batch_size} images of {SIDE}x{SIDE} cells, and back to cells at width {dim}"


def measure_block(bench: Bench, dim: int, heads: int, batch_size: int) -> None:
    block, plain = ChunkBlock(dim, heads), DiTBlock(dim, heads)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    plain.load_state_dict(block.state_dict())
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    for net in (block, plain):
        cast(net, bench.device, dtype)

    shares = torch.linspace(FEWEST, MOST, batch_size).tolist()
    lengths = {"mixed": [round(SIDE**2 * share) for share in shares]}
    each = round(sum(lengths["mixed"]) / batch_size)
    lengths["mixed"][0] += each * batch_size - sum(lengths["mixed"])  # the same total
    lengths["equal"] = [each] * batch_size
    most = round(2 * each / 1.1)
    lengths["half at a tenth"] = [2 * each - most] * (batch_size // 2) + [most] * (batch_size // 2)
    chunks = {name: chunks_of(of_images, SIDE, bench.device) for name, of_images in lengths.items()}

    tokens = torch.randn(each * batch_size, dim, device=bench.device, dtype=dtype)
    conditioning = torch.randn(batch_size, dim, device=bench.device, dtype=dtype)
    in_rows = tokens.view(batch_size, each, dim)
    error = relative_error(block(tokens, conditioning, chunks["equal"]), plain(in_rows, conditioning).flatten(0, 1))
    median = bench.time(
        {"block of DiT, equal lengths": lambda: plain(in_rows, conditioning)}
        | {f"packed block, {name}": lambda of=of: block(tokens, conditioning, of) for name, of in chunks.items()}
    )
    reference = median["block of DiT, equal lengths"]
    bench.claim("packed block, mixed lengths / DiT's, equal", median["packed block, mixed"] / reference, 1.2, goal=13)
    bench.claim("difference on equal lengths, relative", error, 1e-2 if bench.cuda else 1e-5, goal=13)
    for name in ("equal", "half at a tenth"):
        bench.note(f"packed block, {name} / DiT's, equal", median[f"packed block, {name}"] / reference)


def measure_way_back(
    bench: Bench, dim: int, name: str, images: int, side: int, share: float, sigma: float, limit: float
) -> None:
    chunks = chunks_of([round(share * side**2)] * images, side, bench.device)
    tokens = torch.randn(len(chunks.cells), dim, device=bench.device)
    probability = torch.rand(images, side, side, device=bench.device).clamp(min=0.5)
    sides = {
        f"back to cells, {name}": lambda: dechunk(tokens, probability, chunks, sigma),
        f"the same by all pairs, {name}": lambda: dense_dechunk(tokens, probability, chunks, sigma),
    }
    error = relative_error(*(function() for function in sides.values()))
    ours, dense = bench.time(sides).values()
    bench.claim(f"back to cells / by all pairs, {name}", ours / dense, limit, goal=14)
    bench.claim(f"difference of the two, relative, {name}", error, 1e-6, goal=14)
    for form, function in sides.items():
        bench.note(f"peak MiB, {form}", bench.peak_memory(function))


if __name__ == "__main__":
    main(
        measure,
        preset=Flag({"cpu": "dcdit-b", "cuda": "dcdit-xl"}, "preset of DC-DiT, for its width and heads"),
        batch_size=Flag({"cpu": 8, "cuda": 64}, "images of the block, even", lambda size: size > 0 and size % 2 == 0),
    )
