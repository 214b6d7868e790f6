# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Make a checkpoint of the package from a trained pipeline, measure it, and write its card.

    python reproduction/bundled_checkpoint.py --checkpoint runs/d2it/pipeline --data tiny-imagenet-20 \
        --name tiny-imagenet-20-64 --output_dir checkpoints/tiny-imagenet-20-64

The pipeline is stored in half precision with UniPC as its scheduler, and measured as it is stored, loaded in single
precision. `--data` is a folder with splits train and validation, whose labels are ids of ImageNet. Without
`--checkpoint` the bundled one is measured again.

- Reconstructions of the validation images at fine ratios 0, 0.5 and 1: PSNR, top-1 accuracy, Frechet distance.
- Samples of every class, as the pipeline draws them by default and without guidance: top-1 accuracy, Frechet distance
  to the validation images, and the spread of coarse and of fine codes in units of that of the data.
- Cross-entropy of the grain model on validation maps, by noise level, against that of the marginal: how often each
  region is fine in the training images of the class.

The judge is efficientnet-lite2, which has trained nothing here.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput, make_image_grid
from PIL import Image
from report import RESULTS
from study import write_json

from diffusers_d2it import (
    D2iTPipeline,
    DCDiTPipeline,
    DynamicAutoencoderKL,
    bundled_checkpoint,
    load_sampler,
    make_model_card,
    visualize_grain_map,
)
from diffusers_d2it.draws import generators_of
from diffusers_d2it.evaluation import Evaluator, ImageSet, evaluate_reconstructions, load_features, open_images
from diffusers_d2it.losses import grain_loss
from diffusers_d2it.pixels import from_uint8, unit_to_uint8


sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from common import describe_machine  # noqa: E402


BATCH = 50
RATIOS = (0.0, 0.5, 1.0)
CALLS = {"as called by default": {}, "without guidance": {"guidance_scale": 1.0}}
IMAGENET = (
    "The photographs are a subset of ImageNet, whose images belong to their photographers and are made available for"
    " non-commercial research and education (https://www.image-net.org/download.php). None of them is part of this"
    " checkpoint."
)
TRAINED_ON = {  # and updates of the content model
    "tiny-imagenet-20-64": ("10,000 photographs of 64×64 pixels, 500 of each of 20 classes of Tiny ImageNet", 14_095),
    "imagenette-128": ("9,469 photographs of Imagenette (frgfm/imagenette on the Hub), at 128×128 pixels", 5_919),
}
LIMITS = (
    "A demonstration of the method, trained on two CPU cores: many shapes are wrong, and its numbers say nothing about"
    " what D²iT reaches at scale.",
    "The commands are the recipe; where the training of these weights deviated from it stands in its files.",
    "Photographs of ImageNet carry its biases; people may appear in the background.",
    "Not for any decision about anything.",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=list(TRAINED_ON), default="tiny-imagenet-20-64", help="of the checkpoint")
    parser.add_argument("--checkpoint", help="folder of a trained D2iTPipeline; default: the bundled one")
    parser.add_argument(
        "--vae", help="folder of another autoencoder with the same codes, such as a longer trained decoder"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with splits train and validation")
    parser.add_argument(
        "--output_dir", type=Path, help="where the checkpoint is written; default: it is only measured"
    )
    parser.add_argument("--results", type=Path, help="JSON file; default: results/<name>.json beside this file")
    parser.add_argument("--num_samples", type=int, default=300, help="of all classes together")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or bundled_checkpoint(args.name)
    args.results = args.results or RESULTS / f"{args.name}.json"
    return args


def assemble(checkpoint: str, vae: str | None) -> D2iTPipeline:
    """The pipeline with UniPC as its scheduler, its weights rounded to half precision."""
    pipe = D2iTPipeline.from_pretrained(checkpoint)
    if vae is not None:
        pipe.register_modules(vae=DynamicAutoencoderKL.from_pretrained(vae))
    pipe.register_modules(scheduler=load_sampler("unipc", pipe.scheduler))
    pipe.to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def code_spread(latents: torch.Tensor, grain_maps: torch.Tensor) -> torch.Tensor:
    """Standard deviation of coarse and of fine codes: latents (N, C, H, W) and maps (N, h, w) -> (2,)."""
    factor = latents.shape[-1] // grain_maps.shape[-1]
    cells = grain_maps.repeat_interleave(factor, -1).repeat_interleave(factor, -2)[:, None].expand_as(latents)
    return torch.stack([latents[cells == grain].std() for grain in (0, 1)])


@torch.no_grad()
def spread_of_data(pipe: D2iTPipeline, images: ImageSet) -> torch.Tensor:
    """`code_spread` of photographs, by samples of their posterior."""
    latents, maps, generator = [], [], torch.Generator().manual_seed(0)
    for _, batch in images.batches(BATCH):
        encoded = pipe.vae.encode(from_uint8(batch))
        latents.append(pipe.vae.scale_latents(encoded.latent_dist.sample(generator)))
        maps.append(encoded.grain_map)
    return code_spread(torch.cat(latents), torch.cat(maps))


def draw(
    pipe: D2iTPipeline | DCDiTPipeline, labels: torch.Tensor, seed: int, **arguments
) -> tuple[torch.Tensor, list[BaseOutput]]:
    """Images uint8 (N, 3, H, W), and what the pipeline returned, latents, for each batch of labels."""
    images, outputs = [], []
    for start in range(0, len(labels), BATCH):
        batch = labels[start : start + BATCH].tolist()
        generators = generators_of(range(start, start + len(batch)), seed)
        output = pipe(batch, generator=generators, output_type="latent", **arguments)
        images.append(unit_to_uint8(pipe.decode_latents(output.images, "pt")))
        outputs.append(output)
    return torch.cat(images), outputs


@torch.no_grad()
def grain_cross_entropy(pipe: D2iTPipeline, train: ImageSet, validation: ImageSet, seed: int) -> dict[str, float]:
    """Nats per region on validation maps: of the per-class marginal, and of the grain model by noise level."""
    model, scheduler = pipe.grain_model, pipe.grain_scheduler
    train_maps, maps = (
        torch.cat([pipe.grain_map_from_image(batch / 255) for _, batch in images.batches(BATCH)])
        for images in (train, validation)
    )
    k = model.config.num_grains
    frequency = {}
    for label in train.labels.unique().tolist():
        counts = F.one_hot(train_maps[train.labels == label], k).float().sum(dim=0) + 1  # (h, w, k), Laplace's rule
        frequency[label] = counts / counts.sum(dim=-1, keepdim=True)
    probability = torch.stack([frequency[label] for label in validation.labels.tolist()])
    marginal = -probability.gather(-1, maps[..., None]).log().mean().item()

    generator = torch.Generator().manual_seed(seed)
    result = {"per_class_marginal": marginal}
    levels = {f"t={t}": torch.full((len(maps),), t) for t in (999, 750, 500, 250)}
    levels["uniform t"] = torch.randint(1000, (len(maps),), generator=generator)
    for name, timesteps in levels.items():
        state = model.state_from_grain_map(maps, k)
        noised = scheduler.add_noise(state, torch.randn(state.shape, generator=generator), timesteps)
        losses = [
            grain_loss(model(*inputs[:3]).logits, inputs[3])["loss"] * len(inputs[0])
            for inputs in zip(*(x.split(BATCH) for x in (noised, timesteps, validation.labels, maps)))
        ]
        result[name] = (torch.stack(losses).sum() / len(maps)).item()
    return result


def measure(pipe: D2iTPipeline, args: argparse.Namespace) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """All metrics, and images (N, 3, H, W) with maps (N, h, w) as the pipeline draws them by default."""
    resolution = pipe.vae.config.sample_size
    train, validation = (open_images(args.data, resolution, split) for split in ("train", "validation"))
    features, found = load_features("efficientnet-lite2"), {"machine": describe_machine("cpu")}

    evaluator = Evaluator(validation, ["top1", "fid"], features)
    found["real validation images"] = [asdict(one) for one in Evaluator(None, ["top1"], features)(validation)]
    classes = sorted(pipe.id2label)
    labels = torch.tensor(classes).repeat_interleave(args.num_samples // len(classes))
    expected = spread_of_data(pipe, validation)
    for name, arguments in CALLS.items():
        images, outputs = draw(pipe, labels, args.seed, **arguments)
        latents, maps = (torch.cat([one[name] for one in outputs]) for name in ("images", "grain_maps"))
        results = evaluator(ImageSet.from_tensor(images, name, {"arguments": arguments, "seed": args.seed}, labels))
        coarse, fine = (code_spread(latents, maps) / expected).tolist()
        found[f"samples {name}"] = {
            "results": [asdict(one) for one in results],
            "spread": {"coarse": coarse, "fine": fine},
        }
        print(json.dumps({name: [(one.metric, one.value) for one in results], "spread": [coarse, fine]}), flush=True)
        if not arguments:
            shown = images, maps
    metrics = ["psnr", "top1", "rfid"]
    for ratio in RATIOS:
        results = evaluate_reconstructions(pipe.vae, validation, metrics, features, fine_ratio=ratio)
        found[f"reconstructions at {ratio}"] = [asdict(one) for one in results]
        print(json.dumps({f"fine ratio {ratio}": [(one.metric, one.value) for one in results]}), flush=True)
    found["grain_cross_entropy_nats"] = grain_cross_entropy(pipe, train, validation, args.seed)
    return found, *shown


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


def metrics_of(found: dict) -> dict[str, dict]:
    """The metrics as the card shows them."""
    judged = "efficientnet-lite2 at 260 pixels, within the classes of the checkpoint"
    distance = "Fréchet distance of its pooled features to 1,000 validation images"
    metrics = {}

    def add(name: str, results: list[dict], protocol: str) -> None:
        titles = {"top1": f"top-1 accuracy, {judged}", "fd": distance, "rfd": distance, "psnr": "PSNR, dB"}
        for one in results:
            title = titles.get(one["metric"].split("_")[0])
            if title is not None:
                short = title.split(",")[0].split(" of its")[0]
                metrics[f"{name}: {short}"] = {"value": round(one["value"], 3), "protocol": f"{title}; {protocol}"}

    add("real photographs", found["real validation images"], "the validation images")
    for ratio in RATIOS:
        protocol = "all validation images, mode of the posterior, 8 bits"
        add(f"reconstructions at fine ratio {ratio:g}", found[f"reconstructions at {ratio}"], protocol)
    for name in CALLS:
        part = found[f"samples {name}"]
        number = part["results"][0]["protocol"]["samples"]["num_images"]
        add(f"samples {name}", part["results"], f"{number} images, every class as often, seed 0")
        spread = "{coarse:.2f} coarse, {fine:.2f} fine".format(**part["spread"])
        protocol = "standard deviation of the codes over that of the validation images'"
        metrics[f"samples {name}: spread of codes"] = {"value": spread, "protocol": protocol}
    entropy = found["grain_cross_entropy_nats"]
    told = ", ".join(f"{entropy[name]:.3f} at {name}" for name in ("t=999", "t=500", "t=250"))
    metrics["grain model: cross-entropy, nats per region"] = {
        "value": told,
        "protocol": "validation maps; how often each region is fine in the class has"
        f" {entropy['per_class_marginal']:.3f}",
    }
    return metrics


def picture(
    images: torch.Tensor, maps: torch.Tensor, visualize: Callable[..., Image.Image] = visualize_grain_map
) -> Image.Image:
    """Rows of samples, of each class in turn, above their maps: two, or one where they are larger than 64 pixels."""
    columns = 10
    starts = range(0, columns * (2 if images.shape[-1] <= 64 else 1), columns)
    number = len(starts) * columns
    chosen = list(range(0, len(images), max(1, len(images) // number)))[:number]
    drawn = [Image.fromarray(images[i].permute(1, 2, 0).numpy()) for i in chosen]
    painted = [visualize(image, maps[i], min_side=1) for image, i in zip(drawn, chosen)]
    rows = [row for k in starts for row in (drawn[k : k + columns], painted[k : k + columns])]
    return make_image_grid(sum(rows, []), rows=len(rows), cols=columns)


def write_card(pipe: D2iTPipeline, args: argparse.Namespace, found: dict) -> None:
    data, stages = f"--train_data_dir {args.data.name}/train.parquet", "--latent_cache runs/cache --vae runs/dvae/vae"
    classes = f"--resolution {pipe.vae.config.sample_size} --num_classes 1000 --id2label imagenet-1k-id2label.json"
    recipe = f"@examples/configs/{args.name}"
    commands = [
        f"python examples/train_dvae.py {recipe}/dvae.txt {data} --output_dir runs/dvae",
        f"python examples/train_dvae.py {recipe}/decoder.txt {data} --init_from runs/dvae/vae"
        " --output_dir runs/decoder",
        f"python examples/cache_latents.py --vae runs/dvae/vae {classes} {data} --output_dir runs/cache",
        f"python examples/train_grain.py {recipe}/grain.txt {stages} --output_dir runs/grain",
        f"python examples/train_d2it.py {recipe}/content.txt {stages} --grain runs/grain --output_dir runs/d2it",
        f"python reproduction/bundled_checkpoint.py --name {args.name} --checkpoint runs/d2it/pipeline"
        f" --vae runs/decoder/vae --data {args.data.name} --output_dir runs/{args.name}",
    ]
    trained_on, train_steps = TRAINED_ON[args.name]
    card = make_model_card(
        pipe,
        repo_id=None,
        license="apache-2.0",
        train_data=trained_on,
        train_steps=train_steps,
        train_batch_size=32,
        train_data_terms=IMAGENET,
        commands=commands,
        metrics=metrics_of(found),
        sample_image="samples.png",
        sample_caption="Samples as the pipeline draws them by default, each above its map: red is fine, blue coarse.",
        limits=list(LIMITS),
    )
    alone = 'D2iTPipeline.from_pretrained(".")  # in the folder of this file'
    bundled = f'D2iTPipeline.from_pretrained(bundled_checkpoint("{args.name}"))'
    text = card.content.replace("# D2iTPipeline", f"# {args.name}, a demonstration of D²iT", 1).replace(alone, bundled)
    text = text.replace("import D2iTPipeline,", "import D2iTPipeline, bundled_checkpoint,")
    (args.output_dir / "README.md").write_text(text, encoding="utf-8")


def main(args: argparse.Namespace) -> None:
    pipe = assemble(args.checkpoint, args.vae)
    if args.output_dir is not None:
        pipe.save_pretrained(args.output_dir)
    pipe.to(torch.float32)
    found, images, maps = measure(pipe, args)
    write_json(args.results, found)
    if args.output_dir is not None:
        picture(images, maps).save(args.output_dir / "samples.png")
        write_card(pipe.to(torch.float16), args, found)


if __name__ == "__main__":
    main(parse_args())
