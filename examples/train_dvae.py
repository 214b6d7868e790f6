# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Stage 1: train a DynamicAutoencoderKL (sec. 3.1 of arXiv:2504.09454).

    python examples/train_dvae.py --train_data_dir photos --preset dvae-f8f16 --resolution 256 \
        --train_batch_size 16 --max_train_steps 100000 --output_dir runs/dvae

The losses are those of latent diffusion (arXiv:2112.10752): L1, a perceptual one, KL, and a PatchGAN from
--gan_start_step on. Every batch draws its own fine ratio, so that one autoencoder serves every ratio. The script
counts the entropy thresholds of the data first, and measures the scale of the latents and the quality of
reconstructions last.
`runs/dvae/vae` is what cache_latents.py, train_grain.py and train_d2it.py read.
"""

import argparse

from command_line import begin, natural, next_command, number, positive, weight
from flags import image_arguments, training_parser, where


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__)
    group = parser.add_argument_group("autoencoder")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--preset", default="dvae-f8f16", help="a preset, or a JSON file with a model's configuration")
    start.add_argument(
        "--init_from", help="folder of a DynamicAutoencoderKL, such as convert_autoencoder_kl.py's, or of a pipeline"
    )
    frozen = group.add_mutually_exclusive_group()
    frozen.add_argument(
        "--freeze_fine_path",
        action="store_true",
        help="with --init_from: train only the coarser grains; fine codes, decoder and latent scale stay",
    )
    frozen.add_argument(
        "--freeze_encoder",
        action="store_true",
        help="with --init_from: train only the decoder; maps, latents and their scale stay, and with them latent"
        " caches and what was trained on them",
    )
    group.add_argument("--kl_weight", type=weight, default=1e-6, help="weight of the KL term per pixel value")
    group.add_argument("--perceptual_weight", type=weight, default=1.0, help="of the perceptual loss; 0 goes without")
    group.add_argument(
        "--perceptual_network",
        default="lpips",
        help="lpips, a download; efficientnet-lite0, whose weights come with a package (extra judge); or a vision"
        " transformer of transformers",
    )
    group.add_argument(
        "--perceptual_logits",
        type=weight,
        default=0.0,
        help="weight of what the network, efficientnet-lite0, takes the image for, beside its levels",
    )
    group.add_argument(
        "--perceptual_resolution", type=positive, help="side of the images that it sees; default: --resolution"
    )
    group.add_argument(
        "--perceptual_share",
        type=number(float, 1e-6, 1),
        default=1.0,
        help="share of a batch whose perceptual loss is computed",
    )
    group.add_argument("--gan_weight", type=weight, default=0.5, help="weight of the PatchGAN; 0 goes without it")
    group.add_argument("--gan_start_step", type=natural, default=50_000, help="updates before the PatchGAN joins")
    group.add_argument(
        "--calibration_images",
        type=positive,
        default=10_000,
        help="images to measure thresholds, latent scale and reconstructions on",
    )
    group.add_argument("--fid_model", help="score rFID with 'inception' or a vision model of transformers")
    parser.set_defaults(fine_ratio=[0.0, 1.0])
    args = parser.parse_args(arguments)
    for flag in ("freeze_fine_path", "freeze_encoder"):
        if getattr(args, flag) and args.init_from is None:
            parser.error(f"--{flag} keeps what --init_from brings: pass both")
    if args.perceptual_logits > 0 and args.perceptual_weight == 0:
        parser.error("--perceptual_logits is a part of the perceptual loss, which --perceptual_weight 0 goes without")
    if args.mixed_precision == "fp16" and args.gan_weight > 0:
        parser.error("--mixed_precision fp16 cannot scale two losses: pass bf16, or --gan_weight 0")
    if args.freeze_fine_path and args.gan_weight > 0:
        parser.error("--freeze_fine_path freezes the layer that weighs the adversarial loss: pass --gan_weight 0")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import json
import os
import sys
from collections.abc import Iterable
from functools import partial

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid

from diffusers_d2it import DynamicAutoencoderKL, visualize_grain_map
from diffusers_d2it.data import BadImages, check_resolution, first_batches, load_images, make_dataset
from diffusers_d2it.evaluation import FeatureExtractor, check_torchmetrics, load_features, reconstruction_scores
from diffusers_d2it.losses import adaptive_weight, adversarial_loss, dvae_loss, hinge_loss
from diffusers_d2it.training import (
    FiniteGate,
    PatchDiscriminator,
    PerceptualLoss,
    bar_of,
    count_entropy,
    draw_fine_ratio,
    find_checkpoint,
    grain_signals,
    identity_of,
    measure_latents,
    trained_weights,
    use_ema,
)
from set_up import checkpoints_of, load_start, loader_of, publish_result, run_of, schedule_of, start


class DvaeStep(torch.nn.Module):
    """Encode, sample, decode: one forward pass, as distributed training needs it. `signals` are those of the last."""

    def __init__(self, vae: DynamicAutoencoderKL):
        super().__init__()
        self.vae = vae
        self.signals: dict[str, torch.Tensor] = {}

    def forward(
        self, pixels: torch.Tensor, fine_ratio: float, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) -> reconstructions (B, 3, H, W) and KL in nats per image (B,)."""
        encoded = self.vae.encode(pixels, fine_ratio=fine_ratio)
        posterior = encoded.latent_dist
        latents = posterior.sample(generators)
        self.signals = grain_signals(self.vae, encoded.grain_map, fine_ratio, latents)
        return self.vae.decode(latents).sample, posterior.kl()


@torch.no_grad()
def validate(vae: DynamicAutoencoderKL, pixels: torch.Tensor, path: str) -> dict[str, float]:
    """Draw originals, reconstructions and maps at the default ratio; PSNR and SSIM at ratios 0, 0.5 and 1."""
    encoded = vae.encode(pixels)
    decoded = vae.decode(encoded.latent_dist.mode()).sample
    processor = VaeImageProcessor()
    originals, reconstructions = processor.postprocess(pixels), processor.postprocess(decoded)
    maps = visualize_grain_map(originals, encoded.grain_map, min_side=1)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    make_image_grid(originals + reconstructions + maps, rows=3, cols=len(originals)).save(path)
    scores = {ratio: reconstruction_scores(vae, [pixels], ratio) for ratio in (0.0, 0.5, 1.0)}
    return {f"{name}_{ratio}": scores[ratio][name] for ratio in scores for name in ("psnr", "ssim")}


def measure_scale(vae: DynamicAutoencoderKL, batches: Iterable[torch.Tensor], seed: int) -> None:
    """Measure the scale of the latents into the configuration."""
    generator = torch.Generator(vae.device).manual_seed(seed)
    latents = measure_latents(vae, batches, generator)
    vae.register_to_config(shift_factor=latents["shift_factor"], scaling_factor=latents["scaling_factor"])
    print(json.dumps(latents, indent=2))


def score(
    vae: DynamicAutoencoderKL,
    batches: Iterable[torch.Tensor],
    features: FeatureExtractor | None,
    args: argparse.Namespace,
) -> dict[str, dict]:
    """Metrics of reconstructions with their protocol, for the model card."""
    scores = reconstruction_scores(vae, batches, features=features)
    protocol = (
        f"mode of the posterior at the default fine ratio (fine share {scores['fine_share']:.3f}), the averaged"
        f" weights, {scores['num_images']} of the training images, {args.resolution}x{args.resolution}, in 8 bits"
    )
    names = {"psnr": "PSNR in dB", "ssim": "SSIM", "rfid": f"rFID with features of {args.fid_model}"}
    return {
        name: {"value": round(scores[key], 4), "protocol": protocol} for key, name in names.items() if key in scores
    }


def main(args: argparse.Namespace) -> None:
    accelerator = start(args)
    checkpoint = find_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    if args.gan_weight > 0 and args.gan_start_step >= args.max_train_steps:
        accelerator.print(
            f"--gan_start_step {args.gan_start_step} is not before the end of this run, --max_train_steps"
            f" {args.max_train_steps}: it trains without the PatchGAN"
        )
    perceptual = None
    if args.perceptual_weight > 0:
        perceptual = PerceptualLoss(args.perceptual_network, args.perceptual_resolution, args.perceptual_logits)
        perceptual.to(accelerator.device)
        perceptual.check_resolution(args.resolution)
        num_compared = max(1, round(args.perceptual_share * args.train_batch_size))
    check_torchmetrics()  # what is missing is missed now
    features = None if args.fid_model is None else load_features(args.fid_model)
    vae = load_start(args, DynamicAutoencoderKL, "vae")
    if isinstance(vae, dict):
        vae = DynamicAutoencoderKL(**vae | {"sample_size": args.resolution, "calibration": None})
    check_resolution(args.resolution, vae.region_size)

    # 1. Data and thresholds
    source = load_images(**image_arguments(args)).shuffled(args.seed)  # the first images are then a fair sample
    accelerator.print(source)
    bad_images = BadImages(os.path.join(args.output_dir, "bad_images.jsonl"))
    calibration = vae.config.calibration if args.freeze_encoder else None
    if checkpoint is not None:  # they have been counted
        calibration = DynamicAutoencoderKL.load_config(checkpoint / "model").get("calibration")
    if calibration is None:
        counted = count_entropy(
            accelerator, source, args.resolution, vae.region_size, bad_images, args.calibration_images
        )
        calibration = counted.to_config(source.describe(args.resolution))
    dataset = make_dataset(accelerator, source, resolution=args.resolution, seed=args.seed, bad_images=bad_images)
    loader = loader_of(args, accelerator, dataset)
    samples = next(first_batches(source, args.resolution, 8, 8, bad_images)).to(accelerator.device)

    # 2. Model, discriminator, optimizers, average
    vae.register_to_config(sample_size=args.resolution, calibration=calibration)
    if args.freeze_fine_path:
        vae.freeze_fine_path()
    if args.freeze_encoder:
        vae.encoder.requires_grad_(False)
    vae.to(memory_format=torch.channels_last)  # convolutions are faster with it
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if args.compile:
        vae.compile_repeated_blocks(dynamic=False)
    # Half as wide as the decoder at the size of the image: 64 channels, as usual, for the paper's autoencoder
    critic = PatchDiscriminator(base_channels=max(8, vae.config.decoder_block_out_channels[0] // 16 * 8))
    optimizer = torch.optim.AdamW(
        vae.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(0.9, 0.95),  # what the bundled autoencoder was trained with
        fused=True,
    )
    # At a constant rate: --lr_scheduler counts from the first step, and the discriminator joins later
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.learning_rate, betas=(0.5, 0.9), fused=True)
    lr_scheduler = schedule_of(args, optimizer)
    dvae_step = DvaeStep(vae)
    model, optimizer, lr_scheduler, discriminator, critic_optimizer = accelerator.prepare(
        dvae_step, optimizer, lr_scheduler, critic, critic_optimizer
    )
    ema = EMAModel(trained_weights(vae), decay=args.ema_decay, foreach=True)
    gate = FiniteGate(accelerator, args.skip_nonfinite_steps)
    optimizers = {"optimizer": optimizer, "discriminator_optimizer": critic_optimizer}
    others, identity = {"discriminator": critic}, identity_of(dataset)
    checkpoints = checkpoints_of(args, accelerator, vae, ema, optimizers, lr_scheduler, gate, identity, others)
    step = checkpoints.resume(checkpoint)
    accelerator.init_trackers("train_dvae", config=checkpoints.scalars())

    # 3. Train
    run = run_of(args, accelerator, step)
    for batch, generators in run.batches(loader):
        pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
        adversarial = args.gan_weight > 0 and run.step >= args.gan_start_step
        with accelerator.accumulate(model, discriminator):
            with accelerator.autocast():
                fine_ratio = draw_fine_ratio(args.fine_ratio, args.seed, run.step)
                reconstruction, kl = model(pixels, fine_ratio, generators)
                losses = dvae_loss(pixels, reconstruction, kl, args.kl_weight)
                if perceptual is not None:
                    losses["perceptual"] = perceptual(reconstruction[:num_compared], pixels[:num_compared])
                    losses["loss"] = losses["loss"] + args.perceptual_weight * losses["perceptual"]
                if adversarial:
                    critic.requires_grad_(False)  # it judges here and learns below
                    losses["adversarial"] = adversarial_loss(critic(reconstruction))
                    last_layer = vae.decoder.conv_out.weight
                    losses["gan_weight"] = adaptive_weight(losses["loss"], losses["adversarial"], last_layer)
                    pull = args.gan_weight * losses["gan_weight"] * losses["adversarial"]
                    losses["loss"] = losses["loss"] + pull
            accelerator.backward(gate.watch(losses["loss"]))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                if gate.lets_through(norm):
                    optimizer.step()
                    ema.step(trained_weights(vae))
                optimizer.zero_grad()
                lr_scheduler.step()

            if adversarial:
                critic.requires_grad_(True)
                with accelerator.autocast():
                    real, fake = discriminator(torch.cat([pixels, reconstruction.detach()])).chunk(2)
                losses |= hinge_loss(real, fake)
                accelerator.backward(gate.watch(losses["discriminator"]))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(discriminator.parameters(), args.max_grad_norm)
                    if gate.lets_through(norm):
                        critic_optimizer.step()
                    critic_optimizer.zero_grad()

        run.note(losses | dvae_step.signals)
        if not accelerator.sync_gradients:
            continue
        run.end_of_step(gradient_norm=norm)
        if run.saves or checkpoints.failed:
            checkpoints.save(run.step)
        if run.exit_code:
            checkpoints.finish()
            accelerator.end_training()
            sys.exit(run.exit_code)
        if run.validates(vae):
            with use_ema(ema, vae):
                accelerator.log(run.interruptible(validate, vae, samples, run.sample_path) or {}, step=run.step)

    # 4. Scale of the latents, and the model that the next stages read
    checkpoints.finish()
    if accelerator.is_main_process:
        vae = checkpoints.averaged_model()
        limit = args.calibration_images
        measured = partial(first_batches, source, args.resolution, args.train_batch_size, limit, bad_images)
        num_batches = -(-min(limit, source.num_rows or limit) // args.train_batch_size)
        if not (args.freeze_fine_path or args.freeze_encoder):
            measure_scale(vae, bar_of(measured(), "latents", num_batches), args.seed)
        folder = os.path.join(args.output_dir, "vae")
        vae.save_pretrained(folder)
        print(f"{folder}: the autoencoder after step {run.step}")
        metrics = score(vae, bar_of(measured(), "reconstructions", num_batches), features, args)
        print(json.dumps(metrics, indent=2))
        if bad_images.summary():
            print(bad_images.summary())
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        publish_result(
            args,
            accelerator,
            vae,
            folder,
            train_data=source.describe(args.resolution),
            sample_image=run.sample_path,
            sample_caption="Training images, their reconstructions, and their grain maps: red is fine, blue coarse.",
            metrics=metrics,
        )
        print(next_command("cache_latents.py", vae=folder, resolution=args.resolution, **where(args)))


if __name__ == "__main__":
    main(ARGS)
