# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Stage 2 (b): train a D2iTContentModel (sec. 3.2.3 of arXiv:2504.09454) and put the pipeline together.

    python examples/train_d2it.py --latent_cache cache --vae runs/dvae/vae --grain runs/grain \
        --preset content-b --resolution 256 --train_batch_size 32 --max_train_steps 400000 --output_dir runs/d2it

From a cache of examples/cache_latents.py, or with --train_data_dir from the images themselves. `runs/d2it/pipeline` is
a complete D2iTPipeline.
"""

import argparse

from command_line import begin, next_command, positive, weight
from flags import add_denoiser_arguments, check_second_stage, second_stage_parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = second_stage_parser(__doc__)
    group = parser.add_argument_group("content model")
    group.add_argument("--grain", required=True, help="output folder of train_grain.py")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--preset", default="content-b", help="a preset, or a JSON file with a model's configuration")
    start.add_argument(
        "--init_from", help="folder of a D2iTContentModel or of a pipeline to start from; other classes begin anew"
    )
    group.add_argument(
        "--lora_rank", type=positive, help="train adapters (LoRA) of --init_from instead of its weights"
    )
    group.add_argument(
        "--grain_weights", type=weight, nargs="+", help="loss weight of a cell of each grain, coarsest first (Eq. 11)"
    )
    group.add_argument(
        "--residual_dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the residual stream under --mixed_precision: bfloat16 takes less memory and time, and rounds more",
    )
    add_denoiser_arguments(parser)
    args = parser.parse_args(arguments)
    check_second_stage(parser, args)
    if args.lora_rank is not None and args.init_from is None:
        parser.error("--lora_rank needs --init_from, the model that gets the adapters")
    if args.lora_rank is not None and args.hub_remote_code:
        parser.error("--hub_remote_code pushes the code of a pipeline, and --lora_rank trains adapters alone")
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

from diffusers_d2it import (
    D2iTContentModel,
    D2iTGrainModel,
    D2iTPipeline,
    GrainLayout,
    load_sampler,
    visualize_grain_map,
)
from diffusers_d2it.data import BadImages, read_codes
from diffusers_d2it.evaluation import load_vision_network
from diffusers_d2it.losses import multi_grained_loss, variance_loss, weights_of_cells
from diffusers_d2it.objectives import DiffusionObjective, FlowMatchingObjective, make_objective
from diffusers_d2it.training import (
    Alignment,
    FiniteGate,
    add_adapters,
    draw_grain_map,
    drop_labels,
    find_checkpoint,
    grain_signals,
    identity_of,
    load_autoencoder,
    save_adapters,
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


def content_losses(
    args: argparse.Namespace,
    objective: DiffusionObjective | FlowMatchingObjective,
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    noised: torch.Tensor,
    timesteps: torch.Tensor,
    layout: GrainLayout,
) -> dict[str, torch.Tensor]:
    """The multi-grained loss (Eq. 11) of the objective, and with --learn_sigma the variational bound."""
    channels = latents.shape[1]
    prediction, variance = prediction[:, :channels], prediction[:, channels:]
    target, weights = objective.target(latents, noise, timesteps), objective.weights(timesteps)
    losses = multi_grained_loss(prediction, target, layout, args.grain_weights, weights)
    if args.learn_sigma:
        predicted = objective.predicted_latents(prediction, noised, timesteps)
        alphas = objective.scheduler.alphas_cumprod
        weights = weights_of_cells(layout, args.grain_weights)
        losses["vlb"] = variance_loss(variance, predicted, latents, timesteps, alphas, weights)
        losses["loss"] = losses["loss"] + losses["vlb"]
    return losses


def validate(pipe: D2iTPipeline, class_labels: list[int] | None, seed: int, path: str) -> None:
    """Draw samples of some classes above their grain maps."""
    generator = torch.Generator(pipe.device).manual_seed(seed)
    count = 1 if class_labels else 8
    output = pipe(class_labels, num_images_per_prompt=count, generator=generator)
    maps = visualize_grain_map(output.images, output.grain_maps, min_side=1)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    make_image_grid(output.images + maps, rows=2, cols=len(maps)).save(path)


def main(args: argparse.Namespace) -> None:
    accelerator = start(args)
    checkpoint = find_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    begun = load_start(args, D2iTContentModel, "transformer")  # before the data, which may take minutes

    # 1. Data
    vae = load_autoencoder(args.vae, args.resolution, with_grains=True).to(accelerator.device)
    bad_images = BadImages(os.path.join(args.output_dir, "bad_images.jsonl"))
    data = second_stage_data(args, accelerator, vae, bad_images)
    num_classes = data.num_classes
    loader = loader_of(args, accelerator, data)

    # 2. Model, optimizer, average
    objective = make_objective(args.objective, args.snr_gamma, args.learn_sigma)
    sizes = {
        "num_grains": vae.num_grains,
        "num_classes": num_classes,
        "in_channels": vae.config.latent_channels,
        "out_channels": (2 if args.learn_sigma else 1) * vae.config.latent_channels,
        "sample_size": args.resolution // vae.downsample_factor,
    }
    transformer = make_model(D2iTContentModel, begun, sizes, other_classes=args.lora_rank is None)
    identity = identity_of(data, vae)
    if args.lora_rank is not None:
        identity |= add_adapters(transformer, args.lora_rank)
    transformer.set_residual_dtype(getattr(torch, args.residual_dtype))
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks()
    network, alignment = None, torch.nn.Identity()
    if args.alignment is not None:
        network = load_vision_network(args.alignment).to(accelerator.device)
        layer = args.alignment_layer or -(-len(transformer.transformer_blocks) // 3)
        alignment = Alignment(transformer, layer, network.token_width)
    optimizer = torch.optim.AdamW(
        [*trained_weights(transformer), *alignment.parameters()],
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=True,
    )
    lr_scheduler = schedule_of(args, optimizer)
    model, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    others = {} if network is None else {"alignment": alignment}
    if network is not None:
        alignment = accelerator.prepare(alignment)
    trained = [*transformer.parameters(), *alignment.parameters()]  # under FSDP others than before `prepare`
    ema = EMAModel(trained_weights(transformer), decay=args.ema_decay, foreach=True)
    gate = FiniteGate(accelerator, args.skip_nonfinite_steps)
    checkpoints = checkpoints_of(
        args, accelerator, transformer, ema, {"optimizer": optimizer}, lr_scheduler, gate, identity, others
    )
    step = checkpoints.resume(checkpoint)
    accelerator.init_trackers("train_d2it", config=checkpoints.scalars())
    pipe = D2iTPipeline(
        vae=vae,
        grain_model=D2iTGrainModel.from_pretrained(args.grain, subfolder="grain_model").to(accelerator.device),
        transformer=transformer,
        scheduler=load_sampler("unipc", objective.sampling_scheduler()),
        grain_scheduler=DDIMScheduler.from_pretrained(args.grain, subfolder="grain_scheduler"),
        id2label=data.id2label,
    )
    pipe.set_progress_bar_config(disable=True)

    # 3. Train
    run = run_of(args, accelerator, step)
    model.train()
    for batch, generators in run.batches(loader):
        with accelerator.accumulate(model, alignment):
            with torch.no_grad():
                moments, entropy = read_codes(vae, batch)
                grain_map, ratio = draw_grain_map(vae, entropy, args.fine_ratio, args.seed, run.step)
                latents = vae.scale_latents(vae.posterior(moments, grain_map).sample(generators))
            layout = transformer.prepare_grain_map(grain_map)
            noise = layout.tie(randn_tensor(latents.shape, generator=generators, device=latents.device))
            timesteps = objective.sample_timesteps(generators)
            noised = objective.add_noise(latents, noise, timesteps)
            class_labels = drop_labels(batch["class_labels"], num_classes, args.label_dropout, generators)
            with accelerator.autocast():
                prediction = model(noised, timesteps, layout, class_labels).sample
            losses = content_losses(args, objective, prediction, latents, noise, noised, timesteps, layout)
            if network is not None:
                with accelerator.autocast():
                    losses["alignment"] = alignment(network.tokens(batch["pixels"], grain_map.shape[-2:]))
                losses["loss"] = losses["loss"] + args.alignment_weight * losses["alignment"]
            accelerator.backward(gate.watch(losses["loss"]))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
                if gate.lets_through(norm):
                    optimizer.step()
                    ema.step(trained_weights(transformer))
                optimizer.zero_grad()
                lr_scheduler.step()

        run.note(losses | grain_signals(vae, grain_map, ratio, latents))
        if not accelerator.sync_gradients:
            continue
        run.end_of_step(gradient_norm=norm)
        if run.saves or checkpoints.failed:
            checkpoints.save(run.step)
        if run.exit_code:
            checkpoints.finish()
            accelerator.end_training()
            sys.exit(run.exit_code)
        if run.validates(transformer):
            with use_ema(ema, transformer):
                labels = data.id2label and sorted(data.id2label)[:20]
                run.interruptible(validate, pipe, labels, args.seed, run.sample_path)

    # 4. The pipeline, or its adapters
    checkpoints.finish()
    folder = os.path.join(args.output_dir, "pipeline" if args.lora_rank is None else "lora")
    if accelerator.is_main_process:
        if args.lora_rank is None:
            pipe.register_modules(transformer=checkpoints.averaged_model())
            pipe.save_pretrained(folder)
        else:
            with use_ema(ema, transformer):
                save_adapters(transformer, folder)
        print(f"{folder}: the {os.path.basename(folder)} after step {run.step}")
        if bad_images.summary():
            print(bad_images.summary())
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        publish_result(
            args,
            accelerator,
            pipe,
            folder,
            train_data=data.description,
            sample_image=run.sample_path,
            built_on=(args.vae, args.grain),
            adapters_of=args.init_from if args.lora_rank is not None else None,
        )
        if args.lora_rank is None:
            print(next_command("demo.py", rest="", checkpoint=folder))
        else:
            print(f"next: pipe.load_lora_weights({folder!r})")


if __name__ == "__main__":
    main(ARGS)
