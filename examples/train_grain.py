# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Stage 2 (a): train a D2iTGrainModel (sec. 3.2.2 of arXiv:2504.09454) on the grain maps of images.

    accelerate launch examples/train_grain.py --latent_cache cache --vae runs/dvae/vae --preset grain-s \
        --resolution 256 --train_batch_size 64 --max_train_steps 100000 --output_dir runs/grain

From a cache of examples/cache_latents.py, or with --train_data_dir from the images themselves: only their entropy and
the thresholds of the autoencoder are used. `runs/grain/grain_model` and `runs/grain/grain_scheduler` are what
train_d2it.py reads.
"""

import argparse
import os
import sys

import torch
from accelerate.utils import set_seed
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from diffusers_d2it import D2iTGrainModel, load_preset, visualize_grain_map
from diffusers_d2it.data.bad_images import BadImages
from diffusers_d2it.data.latent_cache import read_entropy
from diffusers_d2it.data.loaders import batches_from, make_loader, step_generator
from diffusers_d2it.files.folders import save_folder
from diffusers_d2it.grains import fine_share, grain_map_from_entropy
from diffusers_d2it.hub import check_push, publish
from diffusers_d2it.losses import grain_loss
from diffusers_d2it.pipelines.grain_maps import sample_grain_map
from diffusers_d2it.training.arguments import make_accelerator
from diffusers_d2it.training.averaging import WeightAverage, use_ema
from diffusers_d2it.training.checkpoints import Checkpoints, find_checkpoint
from diffusers_d2it.training.smoke import SmokeTest
from diffusers_d2it.training.states import is_sharded
from diffusers_d2it.training.steps import StepLog, draw_fine_ratio, drop_labels, grain_signals
from diffusers_d2it.training.stopping import StopSignals
from diffusers_d2it.training.training_data import identity_of, load_autoencoder, load_training_data
from flags import (
    add_class_arguments,
    add_data_arguments,
    add_hub_arguments,
    add_second_stage_arguments,
    add_training_arguments,
    hub_arguments,
    make_parser,
    run_arguments,
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data_arguments(parser, required=False)  # or --latent_cache
    add_second_stage_arguments(parser)
    add_class_arguments(parser)
    add_training_arguments(parser)
    add_hub_arguments(parser)
    group = parser.add_argument_group("grain model")
    group.add_argument("--preset", default="grain-s", help="a preset, or a JSON file with a model's configuration")
    group.add_argument("--ratio_dropout", type=float, default=0.5, help="share of maps trained without their ratio")
    return parser.parse_args(arguments)


@torch.no_grad()
def validate(model: D2iTGrainModel, scheduler, class_labels: torch.Tensor | None, seed: int, path: str) -> None:
    """Draw maps sampled for some classes: red is fine."""
    generator = torch.Generator(model.device).manual_seed(seed)
    size = model.config.sample_size
    grain_map = sample_grain_map(model, scheduler, (size, size), class_labels, 16, 20, generator=generator)
    blank = Image.new("RGB", (8 * size, 8 * size), "white")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    make_image_grid([visualize_grain_map(blank, one) for one in grain_map], rows=2, cols=8).save(path)


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    if accelerator.is_main_process:
        check_push(**hub_arguments(args))
    set_seed(args.seed)
    checkpoint = find_checkpoint(accelerator, args)

    # 1. Data
    vae = load_autoencoder(args.vae, args.resolution)
    bad_images = BadImages(os.path.join(args.output_dir, "bad_images.jsonl"))
    data = load_training_data(accelerator, args, vae, bad_images, moments=False)
    num_classes = data.num_classes
    loader = make_loader(accelerator, data, batch_size=args.train_batch_size, num_workers=args.dataloader_num_workers)

    # 2. Model, optimizer, average
    config = load_preset(args.preset)
    config.update(num_grains=vae.num_grains, num_classes=num_classes, sample_size=args.resolution // vae.region_size)
    grain_model = D2iTGrainModel(**config)
    if args.gradient_checkpointing:
        grain_model.enable_gradient_checkpointing()
    if args.compile:
        grain_model.compile_repeated_blocks()
    # Steps of x0-prediction over a one-hot state; the estimate is an expectation, so there is nothing to clip.
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    optimizer = torch.optim.AdamW(
        grain_model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer, loader, lr_scheduler = accelerator.prepare(grain_model, optimizer, loader, lr_scheduler)
    ema = WeightAverage(accelerator, grain_model, args.ema_decay)
    checkpoints = Checkpoints(
        accelerator, args, grain_model, ema, {"optimizer": optimizer}, lr_scheduler, identity=identity_of(data, vae)
    )
    step = checkpoints.resume(checkpoint)
    accelerator.init_trackers("train_grain", config=checkpoints.scalars())
    validates = accelerator.is_main_process and not is_sharded(grain_model)  # alone it has no whole weights
    sample_labels = None
    if num_classes is not None:
        sample_labels = torch.tensor([sorted(data.id2label)[i % len(data.id2label)] for i in range(16)])
        sample_labels = sample_labels.to(accelerator.device)

    # 3. Train
    log, smoke_test = StepLog(accelerator, args.train_batch_size), SmokeTest(args.max_train_steps)
    stop = StopSignals(accelerator)
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process)
    batch_index = step * args.gradient_accumulation_steps
    batches = batches_from(accelerator, loader, batch_index, args.overfit_batches)
    while step < args.max_train_steps:
        batch = next(batches)
        generator = step_generator(accelerator, args.seed, batch_index)
        batch_index += 1
        with accelerator.accumulate(model):
            ratio = draw_fine_ratio(args.fine_ratio, generator)
            grain_map = grain_map_from_entropy(read_entropy(vae, batch), vae.thresholds(ratio))
            state = grain_model.state_from_grain_map(grain_map, vae.num_grains)
            noise = torch.randn(state.shape, generator=generator, device=state.device)
            timesteps = torch.randint(
                scheduler.config.num_train_timesteps, (len(state),), generator=generator, device=state.device
            )
            noised = scheduler.add_noise(state, noise, timesteps)
            class_labels = drop_labels(batch["class_labels"], num_classes, args.label_dropout, generator)
            share = fine_share(grain_map, vae.num_grains)
            dropped = torch.rand(len(share), generator=generator, device=share.device) < args.ratio_dropout
            with accelerator.autocast():
                logits = model(noised, timesteps, class_labels, share.masked_fill(dropped, float("nan"))).logits
            losses = grain_loss(logits, grain_map)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        log.add(losses | grain_signals(vae, grain_map, ratio))
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        ema.step(grain_model.parameters())
        step += 1

        progress.update()
        values = log.take()
        progress.set_postfix(loss=f"{values['loss']:.4f}")
        accelerator.log(values, step=step)
        smoke_test.add(step, values["loss"])
        exit_code = stop.exit_code()
        if exit_code or step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            checkpoints.save(step)
        if exit_code:
            accelerator.end_training()
            sys.exit(exit_code)
        if validates and (step % args.validation_steps == 0 or step == args.max_train_steps):
            with use_ema(ema, grain_model):
                path = os.path.join(args.output_dir, "samples", f"step-{step:07d}.png")
                stop.interruptible(validate, grain_model, scheduler, sample_labels, args.seed, path)
    stop.close()
    if args.overfit_batches:
        accelerator.print(smoke_test.result())

    # 4. What train_d2it.py reads
    if accelerator.is_main_process:
        grain_model = checkpoints.averaged_model()
        grain_model.save_pretrained(os.path.join(args.output_dir, "grain_model"))
        save_folder(os.path.join(args.output_dir, "grain_scheduler"), scheduler.save_pretrained)
        print(f"{args.output_dir}: grain_model and grain_scheduler after {step} steps")
        if bad_images.summary():
            print(bad_images.summary())
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        publish(
            grain_model,
            args.output_dir,
            **hub_arguments(args),
            **run_arguments(args, accelerator.num_processes),
            train_data=data.description,
            sample_image=os.path.join(args.output_dir, "samples", f"step-{step:07d}.png"),
            sample_caption="Maps drawn by the model: red is fine.",
            subfolder="grain_model",
        )


if __name__ == "__main__":
    main(parse_args())
