# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Draw a set of samples of D2iT or DC-DiT, for a metric: any number of images, over any number of processes.

    python examples/sample.py --checkpoint runs/d2it/pipeline --num_images 50000 --batch_size 64 \
        --guidance_scale 1.5 --output_dir samples
    python examples/sample.py --checkpoint runs/dcdit/pipeline --num_images 50000 --batch_size 64 \
        --guidance_scale 1.5 --budget 0.5 --null_budget 0.1 --output_dir half

--output_dir gets 000000.png and so on, or one images.npz (`arr_0`, uint8 NHWC), or both, and protocol.json, which says
how they were drawn. What is promised:

- Image i follows from the flags and from i: its noise has a seed of its own, and so has its class if classes are
  random. In a larger set it is the same. Balanced classes take turns: with N images of K classes the first N modulo K
  classes have one image more.
- Batches are of consecutive images, so the number of processes changes no bit, on one kind of machine with as many
  threads. Another --batch_size changes what floating point does to them: on a CPU, in float32, one value in ten
  thousand of the bundled checkpoint's, by one level of 255.
- Killed at any moment, the same command goes on, and the set becomes what it would have been. Damaged images are
  drawn again. A folder with samples of another protocol is refused.
"""

import argparse

from command_line import begin, make_parser, natural, next_command, output_folder, positive, share, weight
from flags import SAMPLERS


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", help="folder or Hub name of a pipeline; default: the bundled one")
    parser.add_argument(
        "--output_dir", type=output_folder, required=True, help="a new folder, or that of an interrupted run"
    )
    parser.add_argument("--num_images", type=positive, required=True, help="size of the set")
    parser.add_argument("--batch_size", type=positive, default=32, help="images drawn at once by a process")
    parser.add_argument("--format", choices=["png", "npz", "both"], default="png", help="PNGs, one .npz, or both")
    parser.add_argument("--seed", type=natural, default=0, help="another one draws another set")
    parser.add_argument("--labels", choices=["balanced", "random"], help="classes in turns (default), or at random")
    parser.add_argument("--class_labels", nargs="+", help="names or ids of classes; default: all of the checkpoint")
    parser.add_argument(
        "--scheduler",
        choices=[*SAMPLERS, "ddpm"],
        help="a fast sampler, or ancestral sampling (of DiT's 250 steps); default: that of the checkpoint",
    )
    parser.add_argument("--num_inference_steps", type=positive, default=20, help="denoising steps")
    parser.add_argument("--guidance_scale", type=weight, help="classifier-free guidance, 1 is without; default: 5")
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("START", "STOP"),
        help="guided part of the steps; default: 0 1",
    )
    parser.add_argument("--guidance_power", type=weight, help="power-cosine schedule of the scale; default: constant")
    parser.add_argument(
        "--grain_source",
        choices=["predicted", "true", "random", "coarse", "fine"],
        help="D2iT's maps: of the grain model (predicted, the default), of photographs (--reference_data), of random"
        " regions, or uniform",
    )
    parser.add_argument("--fine_ratio", type=share, help="share of fine regions; default: as the checkpoint has it")
    parser.add_argument("--grain_num_inference_steps", type=positive, help="steps of the grain model; default: 10")
    parser.add_argument("--grain_guidance_scale", type=weight, help="guidance of the grain model; default: 1")
    parser.add_argument(
        "--reference_data", help="photographs for --grain_source true: a folder, file or Hub name as in training"
    )
    parser.add_argument("--budget", type=share, help="share of the cells that DC-DiT may keep as tokens; default: 1")
    parser.add_argument("--null_budget", type=share, help="that of passes without a label; default: --budget")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the models")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import inspect
from dataclasses import replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from checkpoint_kinds import SHARES, Pipeline, find_checkpoint, shares_of
from diffusers import DDPMScheduler
from tqdm.auto import tqdm

from diffusers_d2it import (
    D2iTPipeline,
    DCDiTPipeline,
    bundled_checkpoint,
    load_sampler,
)
from diffusers_d2it.pipelines.labels import class_ids
from diffusers_d2it.sampling import (
    ReferenceMaps,
    SampleFolder,
    SamplePlan,
    describe_checkpoint,
    describe_scheduler,
)
from diffusers_d2it.words import counted


# The flags that are of one kind of checkpoint alone
FLAGS = {
    D2iTPipeline: "grain_source reference_data fine_ratio grain_num_inference_steps grain_guidance_scale".split(),
    DCDiTPipeline: ["budget", "null_budget"],
}
GUIDANCE = ["guidance_scale", "guidance_interval", "guidance_power"]


def load_pipeline(args: argparse.Namespace, kind: type[Pipeline], folder: str, device: torch.device) -> Pipeline:
    """The pipeline, with the scheduler that is asked for."""
    pipe = kind.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if args.scheduler == "ddpm":
        pipe.scheduler = ancestral_sampler(pipe)
    elif args.scheduler is not None:
        pipe.scheduler = load_sampler(args.scheduler, pipe.scheduler)
    return pipe


def ancestral_sampler(pipe: Pipeline) -> DDPMScheduler:
    """DDPM's sampler on the noise schedule of the checkpoint, with the variance of a model that predicts one."""
    config = pipe.scheduler.config
    if "beta_schedule" not in config or config.get("prediction_type") == "flow_prediction":
        raise ValueError("--scheduler ddpm needs a diffusion model, and this checkpoint was trained by flow matching.")
    learned = pipe.transformer.out_channels > pipe.transformer.config.in_channels
    settings = {"variance_type": "learned_range" if learned else "fixed_small", "clip_sample": False}
    return DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", **settings)


def check_flags(args: argparse.Namespace, pipe: Pipeline) -> None:
    """Raise a ValueError that names a flag which the checkpoint or another flag leaves without a meaning."""
    draws_maps, source = isinstance(pipe, D2iTPipeline), args.grain_source or "predicted"
    unmet = []  # flags, and what they would need
    for kind, flags in FLAGS.items():
        if not isinstance(pipe, kind):
            unmet.append((flags, f"a checkpoint of {kind.__name__}: this one is of {type(pipe).__name__}"))
    if pipe.transformer.config.num_classes is None:
        of_classes = ["labels", "class_labels", *GUIDANCE, "grain_guidance_scale", "null_budget"]
        unmet.append((of_classes, "a model with classes: this checkpoint is unconditional"))
    if source != "predicted":
        unmet.append((["grain_num_inference_steps", "grain_guidance_scale"], "--grain_source predicted"))
    if source in ("coarse", "fine"):
        unmet.append((["fine_ratio"], "--grain_source predicted, true or random"))
    if source != "true":
        unmet.append((["reference_data"], "--grain_source true"))
    for flags, need in unmet:
        given = [flag for flag in flags if getattr(args, flag) is not None]
        if given:
            raise ValueError(f"--{given[0]} needs {need}.")
    if source == "true" and args.reference_data is None:
        raise ValueError("--grain_source true needs --reference_data, photographs to take the maps from.")
    if draws_maps and source == "predicted" and pipe.grain_model is None:
        raise ValueError("--grain_source predicted needs a grain model, and this checkpoint has none: pass another.")


def find_classes(args: argparse.Namespace, pipe: Pipeline) -> tuple[int, ...] | None:
    """Ids of the classes, None for an unconditional model."""
    num_classes = pipe.transformer.config.num_classes
    if num_classes is None:
        return None
    words = args.class_labels or list(pipe.id2label or range(num_classes))
    return tuple(class_ids(words, num_classes, pipe.id2label))


def pipeline_settings(args: argparse.Namespace, kind: type[Pipeline]) -> dict:
    """What every call of the pipeline is given."""
    call = inspect.signature(kind.__call__).parameters
    defaults = {name: call[name].default for name in (*GUIDANCE, *FLAGS[kind]) if name in call}
    given = {name: value for name in defaults if (value := getattr(args, name)) is not None}
    settings = {"num_inference_steps": args.num_inference_steps} | defaults | given
    kind.check_settings(settings)
    return settings


def describe(args: argparse.Namespace, folder: str, pipe: Pipeline, plan: SamplePlan, settings: dict) -> dict:
    """The part of the protocol that says what the images are."""
    guidance = None
    if plan.classes is not None:
        guidance = {name.removeprefix("guidance_"): settings[name] for name in GUIDANCE}
    if isinstance(pipe, D2iTPipeline):
        work = {"grain_maps": describe_grain_maps(args, pipe, guidance, settings)}
    else:
        budgets = settings["budget"], settings["null_budget"]
        null_budget = budgets[0] if budgets[1] is None else budgets[1]
        work = {"budget": budgets[0], "null_budget": None if guidance is None else null_budget}
    return {
        "checkpoint": describe_checkpoint(folder, pipe),
        "resolution": [pipe.trained_side] * 2,
        "dtype": args.dtype,
        **plan.describe(),
        "scheduler": describe_scheduler(pipe.scheduler),
        "num_inference_steps": settings["num_inference_steps"],
        "guidance": guidance,
        **work,
    }


def describe_grain_maps(args: argparse.Namespace, pipe: D2iTPipeline, guidance: dict | None, settings: dict) -> dict:
    """The part of the protocol that says where D2iT's grain maps come from."""
    grain_maps = {"source": args.grain_source or "predicted", "fine_ratio": args.fine_ratio}
    if grain_maps["source"] == "predicted":
        grain_maps |= {
            "scheduler": describe_scheduler(pipe.grain_scheduler),
            "num_inference_steps": settings["grain_num_inference_steps"],
            "guidance_scale": None if guidance is None else settings["grain_guidance_scale"],
        }
    return grain_maps


def main(args: argparse.Namespace) -> None:
    args.checkpoint = args.checkpoint or bundled_checkpoint()
    # Processes wait at the end for the slowest one, as long as it takes.
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))]
    )
    # The same bits again after an interruption, and full float32 where it is asked for.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True

    plan = SamplePlan(args.num_images, args.batch_size, args.seed, scheme=args.labels or "balanced")
    kind, folder = find_checkpoint(args.checkpoint)
    settings = pipeline_settings(args, kind)
    pipe = load_pipeline(args, kind, folder, accelerator.device)
    check_flags(args, pipe)
    plan = replace(plan, classes=find_classes(args, pipe))
    sampling = describe(args, folder, pipe, plan, settings)
    size, true_maps = sampling["resolution"], None
    if args.grain_source == "true":
        true_maps = ReferenceMaps(args.reference_data, pipe, plan, size[0], settings.pop("fine_ratio"))
        sampling["grain_maps"]["reference_data"] = true_maps.describe()
        accelerator.print(true_maps.source)
    elif args.grain_source not in (None, "predicted"):
        settings["grain_map"] = args.grain_source

    how = (args.output_dir, plan, sampling, size, args.format, accelerator, args.checkpoint)
    with SampleFolder(*how, share=SHARES[kind]) as samples:
        accelerator.print(
            f"{args.output_dir}: {samples.num_missing} of {counted(plan.num_images, 'image')} to be drawn"
        )
        for batch in tqdm(samples.batches, desc="batches", disable=not accelerator.is_main_process):
            if true_maps is not None:
                settings["grain_map"] = true_maps(batch)
            output = pipe(
                plan.labels(batch),
                num_images_per_prompt=len(batch) if plan.classes is None else 1,
                generator=plan.generators(batch),
                output_type="pt",
                **settings,
            )
            samples.write(batch, output.images, shares_of(output, pipe))
        protocol = samples.finish()
    mean = f"mean_{SHARES[kind]}"
    images = counted(plan.num_images, "image")
    accelerator.print(f"{args.output_dir}: {images}, {mean.replace('_', ' ')} {protocol[mean]:.3f}")
    accelerator.print(next_command("evaluate.py", samples=args.output_dir))


if __name__ == "__main__":
    main(ARGS)
