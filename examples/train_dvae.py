# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Stage 1: train a DynamicAutoencoderKL (sec. 3.1 of arXiv:2504.09454).

    accelerate launch examples/train_dvae.py --train_data_dir photos --preset dvae-f8f16 --resolution 256 \
        --train_batch_size 16 --max_train_steps 100000 --output_dir runs/dvae

The script counts the entropy thresholds of the data first, trains with a fine ratio drawn anew for every batch (one
autoencoder then serves every ratio), and measures the scale of the latents last. `runs/dvae/vae` is what
train_grain.py and train_d2it.py read.
"""

import argparse
import json
import os

import torch
from accelerate.utils import set_seed
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from diffusers_d2it import DynamicAutoencoderKL, load_preset, visualize_grain_map
from diffusers_d2it.grains import grain_map_to_cells, split
from diffusers_d2it.losses import dvae_loss
from diffusers_d2it.training import (
    Checkpoints,
    ImageDataset,
    add_data_arguments,
    add_training_arguments,
    batches_from,
    count_entropy,
    describe_source,
    load_images,
    make_accelerator,
    make_loader,
    psnr,
    save_aside,
    step_generator,
    use_ema,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("autoencoder")
    group.add_argument("--preset", default="dvae-f8f16", help="a preset, or a JSON file with a model's configuration")
    group.add_argument("--kl_weight", type=float, default=1e-6, help="weight of the KL term per pixel value")
    group.add_argument("--fine_ratio", type=float, help="train at one fine ratio instead of a random one")
    group.add_argument(
        "--calibration_images",
        type=int,
        default=50_000,
        help="images to measure thresholds and latent scale on",
    )
    return parser.parse_args()


class DvaeStep(torch.nn.Module):
    """Encode, sample, decode, compare: one forward pass, as distributed training needs it."""

    def __init__(self, vae: DynamicAutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def forward(self, pixels: torch.Tensor, fine_ratio: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        posterior = self.vae.encode(pixels, fine_ratio=fine_ratio).latent_dist
        reconstruction = self.vae.decode(posterior.sample(generator)).sample
        return dvae_loss(pixels, reconstruction, posterior.kl(), self.kl_weight)


@torch.no_grad()
def measure_latents(vae: DynamicAutoencoderKL, loader: DataLoader, generator: torch.Generator) -> dict[str, float]:
    """Shift and scale of sampled codes at the default ratio, and the deviation of each grain."""
    moments = torch.zeros(vae.num_grains, 3, dtype=torch.float64)  # per grain: number of values, sum, sum of squares
    for batch in tqdm(loader, desc="latents"):
        encoded = vae.encode(batch["pixels"].to(vae.device))
        latents = encoded.latent_dist.sample(generator)
        for grain, codes in enumerate(split(latents, encoded.grain_map)):
            codes_per_side = codes.shape[-1] // encoded.grain_map.shape[-1]
            of_grain = grain_map_to_cells(encoded.grain_map, codes_per_side) == grain
            values = codes.movedim(1, -1)[of_grain].double().cpu()
            moments[grain] += torch.tensor([values.numel(), values.sum(), values.pow(2).sum()], dtype=torch.float64)
    counts, sums, squares = moments.sum(dim=0)
    mean = sums / counts
    statistics = {"shift_factor": mean.item(), "scaling_factor": (squares / counts - mean**2).rsqrt().item()}
    for grain, (count, total, square) in enumerate(moments):
        statistics[f"latent_std_grain_{grain}"] = (square / count - (total / count) ** 2).sqrt().item()
    return statistics


@torch.no_grad()
def validate(vae: DynamicAutoencoderKL, pixels: torch.Tensor, path: str) -> dict[str, float]:
    """Draw originals, reconstructions and maps at the default ratio; PSNR in dB at ratios 0, 0.5 and 1."""
    scores = {}
    for ratio in (0.0, 0.5, 1.0):
        latents = vae.encode(pixels, fine_ratio=ratio).latent_dist.mode()
        scores[f"psnr_{ratio}"] = psnr(pixels, vae.decode(latents).sample).mean()
    encoded = vae.encode(pixels)
    decoded = vae.decode(encoded.latent_dist.mode()).sample
    processor = VaeImageProcessor()
    originals, reconstructions = processor.postprocess(pixels), processor.postprocess(decoded)
    maps = [visualize_grain_map(image, grain_map) for image, grain_map in zip(originals, encoded.grain_map)]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    make_image_grid(originals + reconstructions + maps, rows=3, cols=len(originals)).save(path)
    return {name: score.item() for name, score in scores.items()}


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    set_seed(args.seed)

    # 1. Data and thresholds
    images = load_images(args).shuffle(seed=args.seed)  # the first images are then a fair sample
    config = load_preset(args.preset)
    config["sample_size"] = args.resolution
    region_size = config["downsample_factors"][-1]
    calibration = count_entropy(accelerator, images, args, region_size, max_images=args.calibration_images)
    config["calibration"] = calibration.to_config(source=describe_source(args))
    dataset = ImageDataset(images, args.resolution, args.image_column, label_column=None, seed=args.seed)
    loader = make_loader(accelerator, dataset, args)
    samples = torch.stack([dataset[index]["pixels"] for index in range(min(8, len(dataset)))])

    # 2. Model, average, optimizer
    vae = DynamicAutoencoderKL(**config)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    ema = EMAModel(
        vae.parameters(),
        decay=args.ema_decay,
        foreach=True,
        model_cls=DynamicAutoencoderKL,
        model_config=vae.config,
    )
    optimizer = torch.optim.AdamW(
        vae.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(0.9, 0.95),  # what the bundled autoencoder was trained with
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model = DvaeStep(vae, args.kl_weight)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    ema.to(accelerator.device)
    checkpoints = Checkpoints(accelerator, args.output_dir, vae, ema, args.checkpoints_total_limit)
    step = checkpoints.resume(args.resume_from_checkpoint)
    accelerator.init_trackers("train_dvae")

    # 3. Train
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process)
    batch_index = step * args.gradient_accumulation_steps
    batches = batches_from(accelerator, loader, batch_index)
    while step < args.max_train_steps:
        batch = next(batches)
        generator = step_generator(accelerator, args.seed, batch_index)
        batch_index += 1
        with accelerator.accumulate(model):
            ratio = args.fine_ratio
            if ratio is None:
                ratio = torch.rand((), generator=generator, device=accelerator.device).item()
            with accelerator.autocast():
                losses = model(batch["pixels"], ratio, generator)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        ema.step(vae.parameters())
        step += 1

        progress.update()
        progress.set_postfix(loss=f"{losses['loss'].item():.4f}")
        accelerator.log({name: value.item() for name, value in losses.items()}, step=step)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            checkpoints.save(step)
        if accelerator.is_main_process and (step % args.validation_steps == 0 or step == args.max_train_steps):
            with use_ema(ema, vae):
                path = os.path.join(args.output_dir, "samples", f"step-{step:07d}.png")
                accelerator.log(validate(vae, samples.to(accelerator.device), path), step=step)

    # 4. Scale of the latents, and the model that the next stages read
    if accelerator.is_main_process:
        ema.copy_to(vae.parameters())
        generator = torch.Generator(accelerator.device).manual_seed(args.seed)
        subset = Subset(dataset, range(min(args.calibration_images, len(dataset))))
        measured = DataLoader(subset, args.train_batch_size, num_workers=args.dataloader_num_workers)
        statistics = measure_latents(vae, measured, generator)
        vae.register_to_config(**{key: statistics[key] for key in ("shift_factor", "scaling_factor")})
        save_aside(vae.save_pretrained, os.path.join(args.output_dir, "vae"))
        print(json.dumps(statistics, indent=2))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
