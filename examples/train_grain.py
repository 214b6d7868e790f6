# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Stage 2 (a): train a D2iTGrainModel (sec. 3.2.2 of arXiv:2504.09454) on the grain maps of images.

    python examples/train_grain.py --latent_cache cache --vae runs/dvae/vae --preset grain-s \
        --resolution 256 --train_batch_size 64 --max_train_steps 100000 --output_dir runs/grain

From a cache of examples/cache_latents.py, or with --train_data_dir from the images themselves: only their entropy and
the thresholds of the autoencoder are used. `runs/grain/grain_model` and `runs/grain/grain_scheduler` are what
train_d2it.py reads.
"""

import argparse

from command_line import begin, next_command, share
from flags import check_second_stage, second_stage_parser, where


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = second_stage_parser(__doc__)
    group = parser.add_argument_group("grain model")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--preset", default="grain-s", help="a preset, or a JSON file with a model's configuration")
    start.add_argument(
        "--init_from", help="folder of a D2iTGrainModel or of a pipeline to start from; other classes begin anew"
    )
    group.add_argument("--ratio_dropout", type=share, default=0.5, help="share of maps trained without their ratio")
    args = parser.parse_args(arguments)
    check_second_stage(parser, args)
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import os
import sys

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from diffusers_d2it import D2iTGrainModel, sample_grain_map, visualize_grain_map
from diffusers_d2it.data import BadImages, read_entropy
from diffusers_d2it.files import save_folder
from diffusers_d2it.grains import fine_share
from diffusers_d2it.losses import grain_loss
from diffusers_d2it.training import (
    FiniteGate,
    draw_grain_map,
    draw_integers,
    draw_uniform,
    drop_labels,
    find_checkpoint,
    grain_signals,
    identity_of,
    load_autoencoder,
    trained_weights,
    use_ema,
)
from set_up import (
    checkpoints_of,
    load_start,
    loader_of,
    make_model,
    publish_result,
    run_of,
    schedule_of,
    second_stage_data,
    start,
)


@torch.no_grad()
def validate(model: D2iTGrainModel, scheduler, class_labels: torch.Tensor | None, seed: int, path: str) -> None:
    """Draw maps sampled for some classes: red is fine."""
    generator = torch.Generator(model.device).manual_seed(seed)
    size = model.config.sample_size
    grain_map = sample_grain_map(model, scheduler, (size, size), class_labels, 16, 20, generator=generator)
    blank = Image.new("RGB", (8 * size, 8 * size), "white")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    make_image_grid([visualize_grain_map(blank, one, min_side=1) for one in grain_map], rows=2, cols=8).save(path)


def main(args: argparse.Namespace) -> None:
    accelerator = start(args)
    checkpoint = find_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    begun = load_start(args, D2iTGrainModel, "grain_model")

    # 1. Data
    vae = load_autoencoder(args.vae, args.resolution, with_grains=True)
    bad_images = BadImages(os.path.join(args.output_dir, "bad_images.jsonl"))
    data = second_stage_data(args, accelerator, vae, bad_images, moments=False)
    num_classes = data.num_classes
    loader = loader_of(args, accelerator, data)

    # 2. Model, optimizer, average
    sizes = {
        "num_grains": vae.num_grains,
        "num_classes": num_classes,
        "sample_size": args.resolution // vae.region_size,
    }
    grain_model = make_model(D2iTGrainModel, begun, sizes, other_classes=True)
    if args.gradient_checkpointing:
        grain_model.enable_gradient_checkpointing()
    if args.compile:
        grain_model.compile_repeated_blocks()
    # Steps of x0-prediction over a one-hot state; the estimate is an expectation, so there is nothing to clip.
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    optimizer = torch.optim.AdamW(
        grain_model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    lr_scheduler = schedule_of(args, optimizer)
    model, optimizer, lr_scheduler = accelerator.prepare(grain_model, optimizer, lr_scheduler)
    ema = EMAModel(trained_weights(grain_model), decay=args.ema_decay, foreach=True)
    gate = FiniteGate(accelerator, args.skip_nonfinite_steps)
    identity = identity_of(data, vae)
    checkpoints = checkpoints_of(
        args, accelerator, grain_model, ema, {"optimizer": optimizer}, lr_scheduler, gate, identity
    )
    step = checkpoints.resume(checkpoint)
    accelerator.init_trackers("train_grain", config=checkpoints.scalars())
    sample_labels = None
    if num_classes is not None:
        sample_labels = torch.tensor([sorted(data.id2label)[i % len(data.id2label)] for i in range(16)])
        sample_labels = sample_labels.to(accelerator.device)

    # 3. Train
    run = run_of(args, accelerator, step)
    for batch, generators in run.batches(loader):
        with accelerator.accumulate(model):
            grain_map, ratio = draw_grain_map(vae, read_entropy(vae, batch), args.fine_ratio, args.seed, run.step)
            state = grain_model.state_from_grain_map(grain_map, vae.num_grains)
            noise = randn_tensor(state.shape, generator=generators, device=state.device)
            timesteps = draw_integers(scheduler.config.num_train_timesteps, generators)
            noised = scheduler.add_noise(state, noise, timesteps)
            class_labels = drop_labels(batch["class_labels"], num_classes, args.label_dropout, generators)
            share = fine_share(grain_map, vae.num_grains)
            dropped = draw_uniform(generators) < args.ratio_dropout
            with accelerator.autocast():
                logits = model(noised, timesteps, class_labels, share.masked_fill(dropped, float("nan"))).logits
            losses = grain_loss(logits, grain_map)
            accelerator.backward(gate.watch(losses["loss"]))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                if gate.lets_through(norm):
                    optimizer.step()
                    ema.step(trained_weights(grain_model))
                optimizer.zero_grad()
                lr_scheduler.step()

        run.note(losses | grain_signals(vae, grain_map, ratio))
        if not accelerator.sync_gradients:
            continue
        run.end_of_step(gradient_norm=norm)
        if run.saves or checkpoints.failed:
            checkpoints.save(run.step)
        if run.exit_code:
            checkpoints.finish()
            accelerator.end_training()
            sys.exit(run.exit_code)
        if run.validates(grain_model):
            with use_ema(ema, grain_model):
                run.interruptible(validate, grain_model, scheduler, sample_labels, args.seed, run.sample_path)

    # 4. What train_d2it.py reads
    checkpoints.finish()
    if accelerator.is_main_process:
        grain_model = checkpoints.averaged_model()
        grain_model.save_pretrained(os.path.join(args.output_dir, "grain_model"))
        save_folder(os.path.join(args.output_dir, "grain_scheduler"), scheduler.save_pretrained)
        print(f"{args.output_dir}: grain_model and grain_scheduler after step {run.step}")
        if bad_images.summary():
            print(bad_images.summary())
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        publish_result(
            args,
            accelerator,
            grain_model,
            args.output_dir,
            train_data=data.description,
            sample_image=run.sample_path,
            sample_caption="Maps drawn by the model: red is fine.",
            subfolder="grain_model",
        )
        given = where(args) | {"streaming": args.streaming, "latent_cache": args.latent_cache}
        print(next_command("train_d2it.py", grain=args.output_dir, vae=args.vae, resolution=args.resolution, **given))


if __name__ == "__main__":
    main(ARGS)
