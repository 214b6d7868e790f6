# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a README.md on the Hub says about a pipeline or a single model.

A card says what the models themselves and its caller know, and names what nobody has said: no licence, no figure and
no origin of the data is made up. Every string that comes from outside (class names, data sets, commands) is escaped:
it is shown, and never becomes Markdown, HTML, YAML or an escape sequence of a terminal.
"""

import math
import os
import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_d2it_grain import D2iTGrainModel
from ..words import printable, prose_to_markdown, shorten, to_markdown, visible, without_paths, without_secrets


_NUM_CLASSES_SHOWN = 10
_PAPER = "[arXiv:2504.09454](https://arxiv.org/abs/2504.09454)"
_MAP_COLOURS = "red regions are fine, blue ones coarse"


def make_model_card(
    pipe_or_model: DiffusionPipeline | torch.nn.Module,
    *,
    repo_id: str | None,
    license: str | None,
    train_data: str | None = None,
    train_data_terms: str | None = None,
    datasets: list[str] | None = None,
    commands: list[str] | None = None,
    figures: dict[str, dict | float | str] | None = None,
    sample_image: str | None = None,
    sample_caption: str | None = None,
    train_steps: int | None = None,
    train_batch_size: int | None = None,
    limits: list[str] | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
) -> ModelCard:
    """The card of a D2iTPipeline, DynamicAutoencoderKL, D2iTGrainModel or D2iTContentModel.

        from diffusers_d2it.hub.card import make_model_card

        card = make_model_card(pipe, repo_id="user/flowers", license="cc-by-4.0", train_data="Oxford Flowers 102")
        pipe.push_to_hub("user/flowers", model_card=card)

    Its first Python block runs as it stands once the repository is pushed. Strings may be anything; absolute paths
    in prose and commands are reduced to their last part, and access tokens in commands are struck out.

    Args:
        pipe_or_model: what the repository holds; sizes, classes and limits are read from it.
        repo_id: "user/name"; None for a card that stays in its folder, whose snippet then loads from there.
        license: identifier of the Hub, such as "apache-2.0"; None if none has been chosen, which the card then says.
        train_data: the training data in words; addresses (https://...) become links.
        train_data_terms: their terms of use in words.
        datasets: names of the training data on the Hub, for the metadata.
        commands: the exact commands of the training, each of one or several lines.
        figures: {name: {"value": number, "protocol": how it was measured, "dataset": on what}}. Only figures with a
            protocol get into the metadata; a bare number, or one without a protocol, is shown as such.
        sample_image: name of an image in the repository, such as "samples.png".
        sample_caption: what it shows; None for samples above their grain maps.
        train_steps: updates of the weights.
        train_batch_size: images of one update, over all processes.
        limits: more sentences for the section of that name.
        subfolder: folder of the repository that holds the model, for a model that is not at the top.
        variant: variant of the weights, such as "fp16".

    Raises:
        ValueError: an argument is of the wrong kind, `license` or a name is not one that the Hub accepts, a figure is
            not finite.
    """
    model = _unwrap(pipe_or_model)
    check_license(license)
    if repo_id is not None:
        validate_repo_id(repo_id)
    for name, value in (("sample_image", sample_image), ("subfolder", subfolder), ("variant", variant)):
        if value is not None and not re.fullmatch(r"\w[\w.-]*", value, re.ASCII):
            raise ValueError(f"`{name}` must be a plain name of letters, digits, '_', '-' and '.', got {value!r}.")
    figures = {name: _check_figure(name, figure) for name, figure in (figures or {}).items()}

    is_pipeline = isinstance(model, DiffusionPipeline)
    snippet = _SNIPPETS[_kind(model)](model, *_location(repo_id, subfolder, variant))
    sections = [
        f"# {to_markdown(repo_id.split('/')[-1] if repo_id else type(model).__name__)}",
        f"```python\n{snippet}\n```",
        _introduction(model),
        _samples(sample_image, sample_caption),
        f"## What is in it\n\n{_parts(model)}",
        _classes(model),
        f"## Training data and its terms\n\n{_data(train_data, train_data_terms)}",
        f"## Commands\n\n{_commands(commands)}",
        f"## Figures\n\n{_figures(figures)}",
        f"## Limits\n\n{_limits(model, train_steps, train_batch_size, limits or [])}",
        f"## Licence\n\n{_license(license)}",
    ]
    metadata = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation" if is_pipeline else None,
        tags=["d2it", "diffusers"] + (["class-conditional"] if _num_classes(model) is not None else []),
        datasets=_check_datasets(datasets),
    )
    results = _eval_results(figures, "unconditional-image-generation" if is_pipeline else "other")
    if results:
        metadata.model_name = repo_id or type(model).__name__
        metadata.eval_results = results
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def commands_of(folder: str | os.PathLike) -> list[str]:
    """The training commands in the card of a local folder, from `make_model_card`; none for a name of the Hub."""
    card = Path(folder) / "README.md"
    if not card.is_file():
        return []
    section = re.search(r"^## Commands\n\n(`{3,})bash\n(.*?)\n\1$", card.read_text(encoding="utf-8"), re.M | re.S)
    return [section[2]] if section else []


def check_license(license: str | None) -> None:
    """Raise a ValueError unless `license` is None or looks like a licence identifier of the Hub."""
    if license is not None and not (isinstance(license, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license)):
        raise ValueError(
            "`license` must be an identifier of https://huggingface.co/docs/hub/repositories-licenses, such as"
            f" 'apache-2.0', or None where none has been chosen, got {license!r}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# What the models say about themselves
# ---------------------------------------------------------------------------------------------------------------------


def _unwrap(model):
    """The model or pipeline itself, without the wrapper of torch.compile, once it is known to be one of ours."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DiffusionPipeline):
        components = getattr(model, "vae", None), getattr(model, "transformer", None)
        if tuple(map(_kind, components)) == (DynamicAutoencoderKL, D2iTContentModel):
            return model
    elif _kind(model) is not None:
        return model
    raise ValueError(
        "`pipe_or_model` must be a D2iTPipeline, DynamicAutoencoderKL, D2iTGrainModel or D2iTContentModel, got"
        f" {type(model).__name__}."
    )


def _kind(model) -> type | None:
    model = getattr(model, "_orig_mod", model)
    return next((kind for kind in _SNIPPETS if isinstance(model, kind)), None)


def _num_classes(model) -> int | None:
    """Size of the label table; None without labels."""
    if isinstance(model, DiffusionPipeline):
        model = model.transformer
    return model.config.get("num_classes")


def _introduction(model) -> str:
    article, conditional = ("A", "class-conditional") if _num_classes(model) is not None else ("An", "unconditional")
    what = {
        DiffusionPipeline: f"{article} {conditional} D²iT pipeline",
        DynamicAutoencoderKL: "The Dynamic VAE of D²iT, which codes each region of an image in its own grain",
        D2iTGrainModel: f"{article} {conditional} grain model of D²iT, which draws grain maps",
        D2iTContentModel: f"{article} {conditional} content model of D²iT, which denoises latents of a grain map",
    }[_kind(model)]
    return f"{what} ({_PAPER}), for diffusers with the package diffusers-d2it."


def _size(model: torch.nn.Module) -> str:
    config = model.config
    if isinstance(model, DynamicAutoencoderKL):
        factors = ", ".join(map(str, config.downsample_factors))
        size = f"F = {{{factors}}}, {config.latent_channels} channels"
    else:
        layers = str(config.num_layers)
        if isinstance(model, D2iTContentModel):
            layers += f" + {config.num_refine_layers}"
        width = config.num_attention_heads * config.attention_head_dim
        size = f"{layers} layers of width {width}, {config.num_grains} grains"
    count = sum(parameter.numel() for parameter in model.parameters())
    count = f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,}"
    return f"{size} | {count} | {str(model.dtype).removeprefix('torch.')}"


def _parts(model) -> str:
    parts = model.components if isinstance(model, DiffusionPipeline) else {None: model}
    rows = []
    for name, part in parts.items():
        part = getattr(part, "_orig_mod", part)
        if part is not None:
            cells = _size(part) if isinstance(part, torch.nn.Module) else " | | "
            rows.append("| " + (f"`{name}` | " if name else "") + f"`{type(part).__name__}` | {cells} |")
    head = ("| part " if None not in parts else "") + "| class | size | parameters | weights in |"
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def _classes(model) -> str | None:
    num_classes = _num_classes(model)
    if num_classes is None:
        return None
    id2label = getattr(model, "id2label", None)
    if id2label is None:
        return f"## Classes\n\n{num_classes:,} classes, ids 0 to {num_classes - 1}; their names are not recorded."
    shown = [f"{id} {to_markdown(shorten(id2label[id]))}" for id in sorted(id2label)[:_NUM_CLASSES_SHOWN]]
    rest = len(id2label) - len(shown)
    return (
        f"## Classes\n\n{len(id2label):,} classes, by id: {'; '.join(shown)}"
        + (f"; and {rest:,} more, in `model_index.json`." if rest else ".")
        + (f" The label table has room for {num_classes:,}." if num_classes != len(id2label) else "")
    )


def _limits(model, train_steps: int | None, train_batch_size: int | None, others: list[str]) -> str:
    facts = []
    if isinstance(model, DiffusionPipeline):
        side, region = model.transformer.config.sample_size * model.vae.downsample_factor, model.vae.region_size
        facts.append(f"Made for {side}×{side} pixels; other sides, multiples of {region}, are possible and untrained.")
        if model.grain_model is None:
            facts.append("There is no grain model: every call needs a `grain_map`.")
    elif isinstance(model, DynamicAutoencoderKL):
        side, region = model.config.sample_size, model.region_size
        facts.append(f"Made for {side}×{side} pixels; sides are multiples of {region}.")
    else:
        side = model.config.sample_size
        facts.append(f"Made for {'maps' if isinstance(model, D2iTGrainModel) else 'latents'} of {side}×{side}.")
    vae = model.vae if isinstance(model, DiffusionPipeline) else model
    if isinstance(vae, DynamicAutoencoderKL):
        calibration = vae.config.calibration
        if calibration is None:
            facts.append("The autoencoder has no entropy thresholds: grain maps of images have to be given to it.")
        elif calibration.get("source"):
            facts.append(
                f"The entropy thresholds of the autoencoder are those of: {prose_to_markdown(calibration['source'])}."
            )
    if not isinstance(model, DynamicAutoencoderKL):
        if _num_classes(model) is None:
            facts.append("Unconditional: it takes no class label.")
        else:
            count = len(getattr(model, "id2label", None) or range(_num_classes(model)))
            facts.append(f"Only its {count:,} classes can be asked for.")
    trained = "The content model was trained" if isinstance(model, DiffusionPipeline) else "Trained"
    if train_steps is None:
        facts.append("How long it was trained is not recorded here.")
    else:
        batch = f" of batch {train_batch_size:,}" if train_batch_size is not None else ""
        facts.append(f"{trained} for {train_steps:,} steps{batch}.")
    return "\n".join(f"- {fact}" for fact in facts + [prose_to_markdown(other) for other in others])


# ---------------------------------------------------------------------------------------------------------------------
# What the caller says
# ---------------------------------------------------------------------------------------------------------------------


def _samples(image: str | None, caption: str | None) -> str | None:
    if image is None:
        return None
    caption = f"Samples above their grain maps: {_MAP_COLOURS}." if caption is None else prose_to_markdown(caption)
    return f"![samples]({image})\n\n{caption}"


def _data(data: str | None, terms: str | None) -> str:
    data = "The training data are not recorded here." if data is None else f"Trained on: {prose_to_markdown(data)}"
    if terms is None:
        return f"{data}\n\nTheir terms of use are not recorded here: look them up before you use the weights."
    return f"{data}\n\nTerms: {prose_to_markdown(terms)}"


def _commands(commands: list[str] | None) -> str:
    if not commands:
        return "The commands of the training are not recorded here."
    lines = "\n".join(without_secrets(command) for command in commands).replace("\r\n", "\n").split("\n")
    text = "\n".join(visible(line.expandtabs(4).rstrip()) for line in lines)
    # A fence ends at a line of as many backticks, so it is longer than any run of them inside.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}bash\n{text}\n{fence}"


def _check_figure(name: str, figure: dict | float | str) -> dict:
    """A figure as {"value", "protocol", "dataset"}."""
    figure = dict(figure) if isinstance(figure, dict) else {"value": figure}
    unknown = figure.keys() - {"value", "protocol", "dataset"}
    value = figure.get("value")
    value = value.item() if hasattr(value, "item") else value  # numbers of numpy and torch
    if unknown or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(
            f"`figures[{name!r}]` must be a number or {{'value': number, 'protocol': words, 'dataset': words}}, got"
            f" {figure!r}."
        )
    if not isinstance(value, str) and not math.isfinite(value):
        raise ValueError(f"`figures[{name!r}]` must be finite, got {value}.")
    return {"protocol": None, "dataset": None} | figure | {"value": value}


def _figures(figures: dict[str, dict]) -> str:
    if not figures:
        return "No figure has been measured."
    rows = ["| figure | value | protocol |", "|---|---|---|"]
    for name, figure in figures.items():
        value = to_markdown(figure["value"]) if isinstance(figure["value"], str) else f"{figure['value']:.6g}"
        on = f" Data: {prose_to_markdown(figure['dataset'])}." if figure["dataset"] else ""
        protocol = (
            prose_to_markdown(figure["protocol"]) if figure["protocol"] else "not recorded, so compare it with nothing"
        )
        rows.append(f"| {prose_to_markdown(name)} | {value} | {protocol}{on} |")
    return "\n".join(rows)


def _eval_results(figures: dict[str, dict], task: str) -> list[EvalResult]:
    """Figures as metadata of the Hub: only those that say how they were measured."""
    results = []
    for name, figure in figures.items():
        if figure["protocol"]:
            dataset = without_paths(printable(figure["dataset"] or "not stated"))
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset,
                    dataset_name=dataset,
                    metric_type=re.sub(r"[^a-z0-9]+", "-", without_paths(name.lower())).strip("-") or "figure",
                    metric_name=without_paths(printable(name)),
                    metric_value=printable(figure["value"]) if isinstance(figure["value"], str) else figure["value"],
                    metric_args={"protocol": without_paths(printable(figure["protocol"]))},
                )
            )
    return results


def _check_datasets(datasets: list[str] | None) -> list[str] | None:
    for name in datasets or []:
        validate_repo_id(name)
    return datasets or None


def _license(license: str | None) -> str:
    if license is None:
        return "No licence has been chosen for these weights: ask who published them before you use them."
    return f"`{license}`, chosen by who published the weights. The training data have their own terms, above."


# ---------------------------------------------------------------------------------------------------------------------
# The snippets: each loads from the repository, runs, and shows the one call that matters
# ---------------------------------------------------------------------------------------------------------------------


def _location(repo_id: str | None, subfolder: str | None, variant: str | None) -> tuple[str, str]:
    """Arguments of `from_pretrained`, and a comment on them."""
    options = {"subfolder": subfolder, "variant": variant}
    arguments = [f'"{repo_id or "."}"', *(f'{key}="{value}"' for key, value in options.items() if value is not None)]
    return ", ".join(arguments), "" if repo_id else "  # in the folder of this file"


def _pipeline_snippet(pipe: DiffusionPipeline, location: str, comment: str) -> str:
    arguments, label = [], ""
    if _num_classes(pipe) is not None:
        id = min(pipe.id2label) if pipe.id2label else 0
        arguments.append(f"class_labels=[{id}]")
        if pipe.id2label:
            name = shorten(pipe.id2label[id]).replace("`", "'")  # no fence ends in it
            label = f"  # {name}"
    if pipe.grain_model is None:
        arguments.append('grain_map="random"')
    return f"""from diffusers_d2it import D2iTPipeline, visualize_grain_map

pipe = D2iTPipeline.from_pretrained({location}){comment}
output = pipe({", ".join(arguments)}){label}
output.images[0]
visualize_grain_map(output.images[0], output.grain_maps[0])  # {_MAP_COLOURS}"""


def _autoencoder_snippet(vae: DynamicAutoencoderKL, location: str, comment: str) -> str:
    side, arguments, given = vae.config.sample_size, "images", ""
    if vae.config.calibration is None:
        regions = side // vae.region_size
        given = (
            f"\ngrain_map = torch.zeros(1, {regions}, {regions}, dtype=torch.int64)  # 0 = coarsest, for each region"
        )
        arguments = "images, grain_map=grain_map"
    return f"""import torch
from diffusers_d2it import DynamicAutoencoderKL

vae = DynamicAutoencoderKL.from_pretrained({location}){comment}
images = 2 * torch.rand(1, {vae.config.in_channels}, {side}, {side}) - 1  # yours, in [-1, 1]{given}
with torch.no_grad():
    encoded = vae.encode({arguments})
    latents = vae.scale_latents(encoded.latent_dist.mode())  # what diffusion works on
    decoded = vae.decode(vae.unscale_latents(latents)).sample
encoded.grain_map  # the grain of every region, 0 = coarsest"""


def _grain_snippet(model: D2iTGrainModel, location: str, comment: str) -> str:
    side = model.config.sample_size
    label = "None" if model.config.num_classes is None else "torch.tensor([0])"
    return f"""import torch
from diffusers import DDIMScheduler
from diffusers_d2it import D2iTGrainModel
from diffusers_d2it.pipelines.grain_maps import sample_grain_map

model = D2iTGrainModel.from_pretrained({location}){comment}
scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
class_labels = {label}
grain_map = sample_grain_map(model, scheduler, ({side}, {side}), class_labels, batch_size=1)  # 0 = coarsest"""


def _content_snippet(model: D2iTContentModel, location: str, comment: str) -> str:
    side, regions = model.config.sample_size, model.config.sample_size // model.patch_size
    label = "" if model.config.num_classes is None else ", torch.tensor([0])"
    return f"""import torch
from diffusers_d2it import D2iTContentModel
from diffusers_d2it.grains import tie

model = D2iTContentModel.from_pretrained({location}){comment}
grain_map = torch.zeros(1, {regions}, {regions}, dtype=torch.int64)  # 0 = coarsest, for each region
latents = tie(torch.randn(1, {model.config.in_channels}, {side}, {side}), grain_map)
with torch.no_grad():
    noise = model(latents, 999, grain_map{label}).sample"""


_SNIPPETS = {
    DiffusionPipeline: _pipeline_snippet,
    DynamicAutoencoderKL: _autoencoder_snippet,
    D2iTGrainModel: _grain_snippet,
    D2iTContentModel: _content_snippet,
}
