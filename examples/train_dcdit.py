# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Train a DCDiTModel (arXiv:2603.06351) and put its pipeline together.

    python examples/train_dcdit.py --latent_cache cache --vae AutoencoderKL-folder --preset dcdit-b --resolution 256 \
        --compression 4 --ratio_group_size 16 --train_batch_size 32 --max_train_steps 408000 --output_dir runs/dcdit

The autoencoder is any AutoencoderKL, or a DynamicAutoencoderKL, of which the finest grain is used; from a cache of
examples/cache_latents.py, or with --train_data_dir from the images themselves. `runs/dcdit/pipeline` is a complete
DCDiTPipeline. A model of `upcycle_dit` (--init_from) is trained on with its embedders frozen.
"""

import argparse

from command_line import begin, natural, next_command, number, positive, weight
from flags import add_denoiser_arguments, check_second_stage, second_stage_parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = second_stage_parser(__doc__, with_grains=False)
    group = parser.add_argument_group("DC-DiT")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--preset", default="dcdit-b", help="a preset, or a JSON file with a model's configuration")
    start.add_argument(
        "--init_from", help="folder of a DCDiTModel or of a pipeline to start from; other classes begin anew"
    )
    group.add_argument(
        "--compression", type=number(float, 1.01), default=4.0, help="N: one cell in N is to be a token"
    )
    group.add_argument("--ratio_weight", type=weight, default=0.03, help="weight of the loss that holds that share")
    group.add_argument(
        "--ratio_group_size",
        type=positive,
        help="images over which the share is a mean, 16 in the paper; default: those of a process in a forward pass",
    )
    group.add_argument(
        "--distill_from",
        help="DiT that --init_from was upcycled from, a file or a folder: the blocks learn what its blocks do first",
    )
    group.add_argument("--distill_steps", type=positive, default=5000, help="updates of that")
    group.add_argument(
        "--budgets",
        type=number(float, 0.01, 1),
        nargs="+",
        default=[0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        help="shares of the tokens of which an update draws one; 1 alone trains for no other",
    )
    group.add_argument(
        "--budget_warmup_steps", type=natural, default=5000, help="updates before which the budget is 1"
    )
    add_denoiser_arguments(parser)
    args = parser.parse_args(arguments)
    check_second_stage(parser, args)
    args.ratio_group_size = args.ratio_group_size or args.train_batch_size  # a run that is continued must keep it
    if args.train_batch_size % args.ratio_group_size:
        sizes = f"--ratio_group_size {args.ratio_group_size} must divide --train_batch_size {args.train_batch_size}"
        parser.error(sizes)
    if args.distill_from is not None and args.init_from is None:
        parser.error("--distill_from needs --init_from, a model that examples/convert_dcdit.py --upcycle made")
    if args.distill_from is not None and args.objective != "epsilon":
        parser.error(f"--distill_from needs --objective epsilon, which a DiT predicts, got {args.objective}")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import os
import sys

import torch
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor

from diffusers_d2it import DCDiTModel, DCDiTPipeline, LatentCodec, load_sampler, visualize_boundary_map
from diffusers_d2it.data import BadImages
from diffusers_d2it.evaluation import load_vision_network
from diffusers_d2it.losses import mse_loss, ratio_loss, variance_loss
from diffusers_d2it.objectives import DiffusionObjective, FlowMatchingObjective, make_objective
from diffusers_d2it.training import (
    Alignment,
    Distillation,
    FiniteGate,
    draw_budget,
    drop_labels,
    find_checkpoint,
    identity_of,
    load_autoencoder,
    patches_of,
    token_signals,
    trained_weights,
    use_ema,
    warn_of_few_tokens,
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


def dcdit_losses(
    args: argparse.Namespace,
    objective: DiffusionObjective | FlowMatchingObjective,
    prediction: torch.Tensor,
    probability: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    noised: torch.Tensor,
    timesteps: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Squared error of the objective, the loss of the share of tokens, with --learn_sigma the variational bound."""
    channels = latents.shape[1]
    prediction, variance = prediction[:, :channels], prediction[:, channels:]
    target, weights = objective.target(latents, noise, timesteps), objective.weights(timesteps)
    losses = {"mse": mse_loss(prediction, target, sample_weights=weights)}
    losses["ratio"] = ratio_loss(probability, args.compression, args.ratio_group_size)
    losses["loss"] = losses["mse"] + args.ratio_weight * losses["ratio"]
    if args.learn_sigma:
        predicted = objective.predicted_latents(prediction, noised, timesteps)
        losses["vlb"] = variance_loss(variance, predicted, latents, timesteps, objective.scheduler.alphas_cumprod)
        losses["loss"] = losses["loss"] + losses["vlb"]
    return losses


def validate(pipe: DCDiTPipeline, class_labels: list[int] | None, seed: int, path: str) -> None:
    """Draw samples of some classes above the tokens of their last step."""
    generator = torch.Generator(pipe.device).manual_seed(seed)
    count = 1 if class_labels else 8
    output = pipe(class_labels, num_images_per_prompt=count, generator=generator)
    maps = visualize_boundary_map(output.images, output.boundary_maps, min_side=1)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    make_image_grid(output.images + maps, rows=2, cols=len(maps)).save(path)


def main(args: argparse.Namespace) -> None:
    accelerator = start(args)
    checkpoint = find_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    begun = load_start(args, DCDiTModel, "transformer")  # before the data, which may take minutes

    # 1. Data
    codec = LatentCodec(load_autoencoder(args.vae, args.resolution).to(accelerator.device))
    bad_images = BadImages(os.path.join(args.output_dir, "bad_images.jsonl"))
    data = second_stage_data(args, accelerator, codec.vae, bad_images)
    num_classes = data.num_classes
    loader = loader_of(args, accelerator, data)

    # 2. Model, optimizer, average
    objective = make_objective(args.objective, args.snr_gamma, args.learn_sigma)
    sizes = {
        "num_classes": num_classes,
        "in_channels": codec.channels,
        "out_channels": (2 if args.learn_sigma else 1) * codec.channels,
        "sample_size": args.resolution // codec.factor,
    }
    if args.init_from is not None and begun.config.conditioning_norm:  # upcycled: its blocks read on what they know
        for embedder in filter(None, (begun.time_embed, begun.label_embed)):
            embedder.requires_grad_(False)  # a table of other classes is another one, and learnt
    transformer = make_model(DCDiTModel, begun, sizes, other_classes=True)
    distillation = None
    if args.distill_from is not None:
        distillation = Distillation.from_dit(transformer.to(accelerator.device), args.distill_from)
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
    identity = identity_of(data, codec)
    checkpoints = checkpoints_of(
        args, accelerator, transformer, ema, {"optimizer": optimizer}, lr_scheduler, gate, identity, others
    )
    step = checkpoints.resume(checkpoint)
    accelerator.init_trackers("train_dcdit", config=checkpoints.scalars())
    pipe = DCDiTPipeline(
        vae=codec.vae,
        transformer=transformer,
        scheduler=load_sampler("unipc", objective.sampling_scheduler()),
        id2label=data.id2label,
    )
    pipe.set_progress_bar_config(disable=True)

    # 3. Train
    run = run_of(args, accelerator, step)
    model.train()
    for batch, generators in run.batches(loader):
        if distillation is not None and run.step >= args.distill_steps:
            distillation.remove()
            distillation = None
        with accelerator.accumulate(model, alignment):
            with torch.no_grad():
                latents = codec.scale(codec.posterior(codec.moments(batch)).sample(generators))
            noise = randn_tensor(latents.shape, generator=generators, device=latents.device)
            timesteps = objective.sample_timesteps(generators)
            noised = objective.add_noise(latents, noise, timesteps)
            class_labels = drop_labels(batch["class_labels"], num_classes, args.label_dropout, generators)
            budget = draw_budget(args.budgets, args.budget_warmup_steps, args.seed, run.step)
            with accelerator.autocast():
                output = model(noised, timesteps, class_labels, budget=budget)
            predicted = output.sample, output.boundary_probability
            losses = dcdit_losses(args, objective, *predicted, latents, noise, noised, timesteps)
            if distillation is not None:
                losses["distillation"] = distillation(output.kept, output.sample, noised, timesteps, class_labels)
                losses["loss"] = losses["distillation"] + args.ratio_weight * losses["ratio"]
            if network is not None:
                size = tuple(side // 2 for side in latents.shape[2:])
                with accelerator.autocast():
                    features = network.tokens(batch["pixels"], size).flatten(0, 1)
                    losses["alignment"] = alignment(features[patches_of(output.kept, size)])
                losses["loss"] = losses["loss"] + args.alignment_weight * losses["alignment"]
            accelerator.backward(gate.watch(losses["loss"]))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
                if gate.lets_through(norm):
                    optimizer.step()
                    ema.step(trained_weights(transformer))
                optimizer.zero_grad()
                lr_scheduler.step()

        signals = token_signals(output, timesteps, args.compression)
        run.note(losses | signals | {"budget": noise.new_full((), budget)})
        if not accelerator.sync_gradients:
            continue
        logged = run.end_of_step(gradient_norm=norm)
        if accelerator.is_main_process:
            warn_of_few_tokens(logged["natural_share"], args.compression, run.step)
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

    # 4. The pipeline
    checkpoints.finish()
    folder = os.path.join(args.output_dir, "pipeline")
    if accelerator.is_main_process:
        pipe.register_modules(transformer=checkpoints.averaged_model())
        pipe.save_pretrained(folder)
        print(f"{folder}: the pipeline after step {run.step}")
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
            built_on=(args.vae,),
        )
        print(next_command("sample.py", checkpoint=folder))


if __name__ == "__main__":
    main(ARGS)
