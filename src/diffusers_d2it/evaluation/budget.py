# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""One checkpoint, many budgets: what a share of fine regions costs, and what it buys.

Shapes:
    N images, h w sides of a map in regions, k grains
"""

import dataclasses
import itertools
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..grains import check_fine_ratio, fine_share
from ..models.transformer_d2it_content import D2iTContentModel
from ..optional import import_optional
from ..pipelines.pipeline_d2it import D2iTPipeline
from .evaluate import Evaluator
from .features import FeatureExtractor
from .images import ImageSet
from .map_sources import Sampling, check_labels, over_images, sample_batch
from .reconstruction import reconstruct
from .report_scores import score


RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COUNTED = 8  # images whose operations are counted: where the fine regions lie changes them a little


def budget(
    pipe: D2iTPipeline,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    reference: ImageSet | str | Path,
    features: FeatureExtractor,
    sampling: Sampling,
    ratios: Sequence[float] = RATIOS,
    metrics: Sequence[str] = ("fid",),
    accelerator: Accelerator | None = None,
    protocol: dict | None = None,
    progress: bool = False,
) -> list[dict]:
    """Quality and cost of one checkpoint at several shares of fine regions.

    Maps are drawn by the grain model, each with its ratio to the nearest region; labels and noise are the same at
    every ratio. The ratios take turns batch by batch, so that whatever slows the machine down slows all of them.

    Args:
        pipe: the pipeline.
        images: real images (N, 3, H, W) uint8, to be reconstructed.
        labels: classes (N,) int64 of the samples; None for an unconditional model.
        reference: what the samples are compared with.
        features: in which they are compared.
        sampling: how the samples are drawn.
        ratios: in [0, 1].
        metrics: of `evaluate`.
        accelerator: joins the processes; times are then those of processes that work side by side.
        protocol: what else the protocols of the results say of the samples, such as the checkpoint.
        progress: show a bar.

    Returns:
        For each ratio: "fine_ratio"; "fine_share" of the maps that were drawn; "results" of `score`;
        "reconstruction_psnr_db", mean over the images, and "reconstruction_fine_share", as thresholds meet a ratio
        over their data set only; "backbone_tokens" and "fine_tokens" of an image; "gmac_per_forward", 10^9
        multiply-adds of one image in one forward of the content model; "seconds_per_image", median over the calls of
        the pipeline, from labels to images; "seconds_per_step", median over denoising steps, both passes if guided,
        for one image: None with a single step.

    Raises:
        ValueError: a ratio lies outside [0, 1] or comes twice, the pipeline has no grain model, labels are missing,
            superfluous or not as many as images; or what `evaluate` and the pipeline raise.
    """
    check_ratios(ratios)
    check_labels(pipe, labels, len(images))
    if pipe.grain_model is None:
        raise ValueError("`pipe` has no grain model, which draws maps of a given ratio.")
    size = tuple(side // pipe.vae.region_size for side in images.shape[2:])
    calls: list[TimedCall] = []

    def sample(numbers: slice) -> torch.Tensor:
        samples = []
        for ratio in ratios:
            output, call = _timed_call(pipe, numbers, size, labels, sampling, ratio)
            samples.append(output)
            calls.append(call)
        return torch.stack(samples, dim=1)

    warm_up = dataclasses.replace(sampling, num_inference_steps=min(2, sampling.num_inference_steps))
    for ratio in ratios:
        _timed_call(pipe, slice(0, min(len(images), sampling.batch_size)), size, labels, warm_up, ratio)
    samples = torch.zeros(len(images), len(ratios), *images.shape[1:], dtype=torch.uint8)
    description = "sampling" if progress else None
    samples = over_images(sample, samples, sampling.batch_size, accelerator, description).unbind(1)
    if accelerator is not None and accelerator.num_processes > 1:
        calls = gather_object(calls)

    rows = []
    reading = {"batch_size": sampling.batch_size, "accelerator": accelerator, "seed": sampling.seed}
    evaluator = Evaluator(reference, metrics, features, **reading)
    for ratio, of_ratio in zip(ratios, samples):
        drawn = {"name": f"samples at fine ratio {ratio:g}", **sampling.describe(), "grain_map": "predicted"}
        drawn |= {"fine_ratio": ratio} | (protocol or {})
        row = {"fine_ratio": ratio, "results": score(of_ratio, drawn, evaluator), "backbone_tokens": size[0] * size[1]}
        row |= reconstruction_at(pipe, images, ratio, sampling.batch_size, accelerator)
        rows.append(row | cost_of([call for call in calls if call.ratio == ratio]))
    return rows


def check_ratios(ratios: Sequence[float], name: str = "ratios") -> None:
    """Raise a ValueError that names the argument unless it holds different numbers in [0, 1]."""
    for ratio in ratios:
        check_fine_ratio(ratio, name)
    if not ratios or len(set(ratios)) < len(ratios):
        raise ValueError(f"`{name}` must be one or more different numbers in [0, 1], got {list(ratios)}.")


# ---------------------------------------------------------------------------------------------------------------------
# Quality
# ---------------------------------------------------------------------------------------------------------------------


def reconstruction_at(
    pipe: D2iTPipeline,
    images: torch.Tensor,
    fine_ratio: float,
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Reconstruction from the mode of the posterior at a fine ratio: mean PSNR of the images, and their fine share.

    Args:
        pipe: the pipeline.
        images: (N, 3, H, W) uint8.
        fine_ratio: in [0, 1], over the images that the thresholds were counted on.
        batch_size: images at once.
        accelerator: joins the processes.

    Returns:
        "reconstruction_psnr_db" and "reconstruction_fine_share".
    """

    def measure(numbers: slice) -> torch.Tensor:
        decoded, shares = reconstruct(pipe.vae, images[numbers], fine_ratio)
        error = (decoded.double() - images[numbers].to(decoded.device)).square().mean(dim=(1, 2, 3))
        return torch.stack([10 * (255**2 / error).log10(), shares], dim=1)

    measured = over_images(measure, torch.zeros(len(images), 2, dtype=torch.float64), batch_size, accelerator)
    psnr, share = measured.mean(dim=0).tolist()
    return {"reconstruction_psnr_db": psnr, "reconstruction_fine_share": share}


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def fine_tokens(grain_map: torch.Tensor, num_grains: int) -> torch.Tensor:
    """Tokens of an image that RefineNet works on, (B, h, w) -> (B,): 4 ** l for each region of grain l or finer.

    Of all l = 1 ... k-1. The Multi-grained Net has h * w more, one for each region, whatever the map.
    """
    tokens = [4**level * (grain_map >= level).sum(dim=(1, 2)) for level in range(1, num_grains)]
    return torch.stack(tokens).sum(dim=0)


def count_macs(transformer: D2iTContentModel, grain_map: torch.Tensor) -> float:
    """Multiply-adds of a forward of one image, mean over the maps (B, h, w).

    Those of matrix products, convolutions and attention, as torch counts them; elementwise ones are not counted.
    """
    cells, channels = transformer.patch_size, transformer.config.in_channels
    sides = [side * cells for side in grain_map.shape[1:]]
    latents = torch.zeros(1, channels, *sides, device=transformer.device, dtype=transformer.dtype)
    zero = torch.zeros(1, dtype=torch.int64, device=transformer.device)
    label = None if transformer.config.num_classes is None else zero
    # Attention as two matrix products: a fused kernel that the counter does not know would count as nothing
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for one in grain_map.to(transformer.device).split(1):
            transformer(latents, zero, one, label)
    return counter.get_total_flops() / 2 / len(grain_map)


@dataclasses.dataclass(frozen=True)
class TimedCall:
    """A call of the pipeline at one ratio.

    Args:
        ratio: the ratio.
        num_images: B.
        seconds: of the whole call.
        step_seconds: of its denoising steps but the first.
        fine_share: mean over its images.
        fine_tokens: mean over its images.
        macs: of a forward for one image; None where it was not counted.
    """

    ratio: float
    num_images: int
    seconds: float
    step_seconds: list[float]
    fine_share: float
    fine_tokens: float
    macs: float | None


def cost_of(calls: Sequence[TimedCall]) -> dict[str, float | None]:
    """What images of one ratio cost: means of what is counted, medians of what is timed.

    The last batch may be smaller than the others, and an image of it dearer: its time does not count.

    Args:
        calls: all of this ratio; in one of them operations were counted.
    """
    num_images = sum(call.num_images for call in calls)
    full = max(call.num_images for call in calls)
    timed = [call for call in calls if call.num_images == full]
    steps = [seconds for call in timed for seconds in call.step_seconds]
    (macs,) = (call.macs for call in calls if call.macs is not None)
    return {
        "fine_share": sum(call.fine_share * call.num_images for call in calls) / num_images,
        "fine_tokens": sum(call.fine_tokens * call.num_images for call in calls) / num_images,
        "gmac_per_forward": macs / 1e9,
        "seconds_per_image": statistics.median(call.seconds for call in timed) / full,
        "seconds_per_step": statistics.median(steps) / full if steps else None,
    }


def _timed_call(
    pipe: D2iTPipeline,
    numbers: slice,
    size: tuple[int, int],
    labels: torch.Tensor | None,
    sampling: Sampling,
    ratio: float,
) -> tuple[torch.Tensor, TimedCall]:
    """Images of a batch at a ratio, on the CPU, and what they cost; in the first batch operations are counted too."""
    clock = _StepClock(pipe._execution_device)
    start = time.perf_counter()
    images, maps = sample_batch(
        pipe,
        numbers,
        size,
        labels,
        sampling,
        fine_ratio=ratio,
        callback_on_step_end=clock,
        callback_on_step_end_tensor_inputs=[],
    )
    images = images.cpu()  # which also waits for the device
    seconds = time.perf_counter() - start
    num_grains = pipe.transformer.config.num_grains
    return images, TimedCall(
        ratio=ratio,
        num_images=len(images),
        seconds=seconds,
        step_seconds=clock.durations(),
        fine_share=fine_share(maps, num_grains).mean().item(),
        fine_tokens=fine_tokens(maps, num_grains).double().mean().item(),
        macs=count_macs(pipe.transformer, maps[:_COUNTED]) if numbers.start == 0 else None,
    )


class _StepClock:
    """A callback of the pipeline that notes when each step ends: on CUDA on the device, which nothing waits for."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.ends: list = []

    def __call__(self, pipe: D2iTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
        else:
            self.ends.append(time.perf_counter())
        return {}

    def durations(self) -> list[float]:
        """Seconds between the ends of two steps: of each step but the first, which has the preparation before it."""
        pairs = itertools.pairwise(self.ends)
        if self.on_cuda:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def describe_machine(accelerator: Accelerator) -> dict[str, str | int]:
    """What the seconds of a budget depend on, beside the checkpoint: device, processes, threads, version of torch."""
    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "num_processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Table and plot
# ---------------------------------------------------------------------------------------------------------------------


def budget_table(rows: list[dict], real: list[dict]) -> str:
    """The rows of `budget` as a Markdown table, under them the `score` of real images in the place of samples."""
    names = [result["metric"] for result in real]
    header = ["fine ratio", *names, "PSNR, dB", "tokens", "GMAC / forward", "s / image", "ms / step"]
    lines = [header, ["---:"] * len(header)]
    for row in rows:
        step = row["seconds_per_step"]
        lines.append(
            [
                f"{row['fine_ratio']:g}",
                *(f"{result['value']:.4g}" for result in row["results"]),
                f"{row['reconstruction_psnr_db']:.2f}",
                f"{row['backbone_tokens']} + {row['fine_tokens']:g}",
                f"{row['gmac_per_forward']:.3g}",
                f"{row['seconds_per_image']:.3g}",
                "" if step is None else f"{1e3 * step:.3g}",
            ]
        )
    lines.append(["real images", *(f"{result['value']:.4g}" for result in real), *[""] * 5])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def check_matplotlib() -> None:
    """Raise a ValueError if matplotlib is missing or broken: a plot is drawn after hours of sampling."""
    import_optional("matplotlib.figure", "the plot of the budget", extra="metrics")


def plot_budget(rows: list[dict], path: str | Path) -> None:
    """The rows of `budget` as a picture: quality and cost over the fine ratio."""
    check_matplotlib()
    from matplotlib.figure import Figure

    metrics = [result["metric"] for result in rows[0]["results"]]
    curves = {name: [row["results"][i]["value"] for row in rows] for i, name in enumerate(metrics)}
    curves["PSNR of reconstructions, dB"] = [row["reconstruction_psnr_db"] for row in rows]
    num_qualities = len(curves)
    curves["GMAC of a forward, one image"] = [row["gmac_per_forward"] for row in rows]
    curves["seconds of sampling, one image"] = [row["seconds_per_image"] for row in rows]
    figure = Figure(figsize=(6.4, 2.4 * -(-len(curves) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(curves) // 2), 2, squeeze=False).flatten()
    for i, (panel, (title, values)) in enumerate(zip(panels, curves.items())):
        panel.plot([row["fine_ratio"] for row in rows], values, marker="o")
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("fine ratio")
        if i >= num_qualities:  # costs are compared as shares of one another
            panel.set_ylim(0, 1.1 * max(values))
        panel.grid(alpha=0.3)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=150, format="png")
