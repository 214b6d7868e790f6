# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Stage 2 (b): train a D2iTContentModel (sec. 3.2.3 of arXiv:2504.09454) and put the pipeline together.

    accelerate launch examples/train_d2it.py --train_data_dir photos --vae runs/dvae/vae --grain runs/grain \
        --preset content-b --resolution 256 --train_batch_size 32 --max_train_steps 400000 --output_dir runs/d2it

`runs/d2it/pipeline` is a complete D2iTPipeline.
"""

import argparse
import os

import torch
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from diffusers_d2it import (
    D2iTContentModel,
    D2iTGrainModel,
    D2iTPipeline,
    DynamicAutoencoderKL,
    load_preset,
    visualize_grain_map,
)
from diffusers_d2it.grains import tie
from diffusers_d2it.losses import multi_grained_loss
from diffusers_d2it.training import (
    Checkpoints,
    ImageDataset,
    add_class_arguments,
    add_data_arguments,
    add_training_arguments,
    batches_from,
    drop_labels,
    load_images,
    make_accelerator,
    make_loader,
    read_classes,
    save_aside,
    step_generator,
    use_ema,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_class_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("content model")
    group.add_argument("--vae", required=True, help="folder or Hub name of a DynamicAutoencoderKL from train_dvae.py")
    group.add_argument("--grain", required=True, help="output folder of train_grain.py")
    group.add_argument("--preset", default="content-b", help="a preset, or a JSON file with a model's configuration")
    group.add_argument(
        "--grain_weights", type=float, nargs="+", help="loss weight of a cell of each grain, coarsest first (Eq. 11)"
    )
    return parser.parse_args()


def validate(pipe: D2iTPipeline, class_labels: list[int] | None, seed: int, path: str) -> None:
    """Draw samples of some classes above their grain maps."""
    generator = torch.Generator(pipe.device).manual_seed(seed)
    count = 1 if class_labels else 8
    output = pipe(class_labels, num_images_per_prompt=count, num_inference_steps=25, generator=generator)
    maps = [visualize_grain_map(image, grain_map) for image, grain_map in zip(output.images, output.grain_maps)]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    make_image_grid(output.images + maps, rows=2, cols=len(maps)).save(path)


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    set_seed(args.seed)

    # 1. Data
    images = load_images(args)
    id2label, num_classes = read_classes(images, args)
    dataset = ImageDataset(images, args.resolution, args.image_column, args.label_column, args.seed)
    loader = make_loader(accelerator, dataset, args)

    # 2. Model, average, optimizer
    vae = DynamicAutoencoderKL.from_pretrained(args.vae).requires_grad_(False).eval().to(accelerator.device)
    config = load_preset(args.preset)
    config.update(
        num_grains=vae.num_grains,
        num_classes=num_classes,
        in_channels=vae.config.latent_channels,
        sample_size=args.resolution // vae.downsample_factor,
    )
    transformer = D2iTContentModel(**config)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False)  # sec. 4.1
    ema = EMAModel(
        transformer.parameters(),
        decay=args.ema_decay,
        foreach=True,
        model_cls=D2iTContentModel,
        model_config=transformer.config,
    )
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer, loader, lr_scheduler = accelerator.prepare(transformer, optimizer, loader, lr_scheduler)
    ema.to(accelerator.device)
    checkpoints = Checkpoints(accelerator, args.output_dir, transformer, ema, args.checkpoints_total_limit)
    step = checkpoints.resume(args.resume_from_checkpoint)
    accelerator.init_trackers("train_d2it")
    pipe = D2iTPipeline(
        vae=vae,
        grain_model=D2iTGrainModel.from_pretrained(args.grain, subfolder="grain_model").to(accelerator.device),
        transformer=transformer,
        scheduler=DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing"),
        grain_scheduler=DDIMScheduler.from_pretrained(args.grain, subfolder="grain_scheduler"),
        id2label=id2label,
    )
    pipe.set_progress_bar_config(disable=True)

    # 3. Train
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process)
    batch_index = step * args.gradient_accumulation_steps
    batches = batches_from(accelerator, loader, batch_index)
    model.train()
    while step < args.max_train_steps:
        batch = next(batches)
        generator = step_generator(accelerator, args.seed, batch_index)
        batch_index += 1
        with accelerator.accumulate(model):
            with torch.no_grad():
                encoded = vae.encode(batch["pixels"])
                latents = vae.scale_latents(encoded.latent_dist.sample(generator))
            grain_map = encoded.grain_map
            noise = tie(torch.randn(latents.shape, generator=generator, device=latents.device), grain_map)
            timesteps = torch.randint(
                scheduler.config.num_train_timesteps, (len(latents),), generator=generator, device=latents.device
            )
            noised = scheduler.add_noise(latents, noise, timesteps)
            class_labels = drop_labels(batch["class_labels"], num_classes, args.label_dropout, generator)
            with accelerator.autocast():
                prediction = model(noised, timesteps, grain_map, class_labels).sample
            losses = multi_grained_loss(prediction, noise, grain_map, args.grain_weights)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        ema.step(transformer.parameters())
        step += 1

        progress.update()
        progress.set_postfix(loss=f"{losses['loss'].item():.4f}")
        accelerator.log({name: value.item() for name, value in losses.items()}, step=step)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            checkpoints.save(step)
        if accelerator.is_main_process and (step % args.validation_steps == 0 or step == args.max_train_steps):
            with use_ema(ema, transformer):
                path = os.path.join(args.output_dir, "samples", f"step-{step:07d}.png")
                validate(pipe, id2label and sorted(id2label)[:20], args.seed, path)

    # 4. The pipeline
    if accelerator.is_main_process:
        ema.copy_to(transformer.parameters())
        for model in (vae, pipe.grain_model):
            model.register_to_config(_name_or_path=None)  # where they were loaded from is nobody's business
        save_aside(pipe.save_pretrained, os.path.join(args.output_dir, "pipeline"))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
