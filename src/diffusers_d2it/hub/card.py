# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a README.md on the Hub says about a pipeline or a single model. Their text stands in card.md.

A card says what the models themselves and its caller know, and names what nobody has said: no licence, no number and
no origin of the data is made up. Every string that comes from outside (class names, data sets, commands) is escaped:
it is shown, and never becomes Markdown, HTML, YAML or an escape sequence of a terminal.
"""

import html
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.latent_codec import LatentCodec
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_d2it_grain import D2iTGrainModel
from ..models.transformer_dcdit import DCDiTModel
from ..words import printable, shorten, shown, visible, without_paths, without_secrets
from .remote_code import BRANCH


_TEMPLATE = Path(__file__).with_name("card.md")
_ADDRESS = re.compile(r"(https?://[\w./?#=&%~+-]*[\w/])", re.ASCII)
_KINDS = {
    DiffusionPipeline: "pipeline",
    DynamicAutoencoderKL: "autoencoder",
    D2iTGrainModel: "grain",
    D2iTContentModel: "content",
    DCDiTModel: "dcdit",
    AutoencoderKL: "foreign autoencoder",
}
# What the two families of models call what they are, by names of the template
_FAMILIES = {
    "d2it": {
        "method": "D²iT",
        "paper": "2504.09454",
        "pipeline": "D2iTPipeline",
        "shown_by": "visualize_grain_map",
        "shown": "grain_maps[0])  # red regions are fine, blue ones coarse",
        "caption": "Samples above their grain maps: red regions are fine, blue ones coarse.",
        "trained": "The content model",
    },
    "dcdit": {
        "method": "DC-DiT",
        "paper": "2603.06351",
        "pipeline": "DCDiTPipeline",
        "shown_by": "visualize_boundary_map",
        "shown": "boundary_maps[0])  # red cells were tokens in the last step",
        "caption": "Samples.",
        "trained": "The network",
    },
}


def make_model_card(
    pipe_or_model: DiffusionPipeline | torch.nn.Module,
    *,
    repo_id: str | None,
    license: str | None,
    train_data: str | None = None,
    train_data_terms: str | None = None,
    datasets: list[str] | None = None,
    commands: list[str] | None = None,
    metrics: dict[str, dict | float | str] | None = None,
    sample_image: str | None = None,
    sample_caption: str | None = None,
    train_steps: int | None = None,
    train_batch_size: int | None = None,
    limits: list[str] | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    adapters_of: str | None = None,
    remote_code: bool = False,
) -> ModelCard:
    """The card of a D2iTPipeline or DCDiTPipeline, or of one of their models.

        from diffusers_d2it import make_model_card

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
        metrics: {name: {"value": number, "protocol": how it was measured, "dataset": on what}}. Only metrics with a
            protocol get into the metadata; a bare number, or one without a protocol, is shown as such.
        sample_image: name of an image in the repository, such as "samples.png".
        sample_caption: what it shows; None for samples, of D2iT above their grain maps.
        train_steps, train_batch_size: updates of the weights, and images of one of them, over all processes.
        limits: more sentences for the section of that name.
        subfolder: folder of the repository that holds the model, for a model that is not at the top.
        variant: variant of the weights, such as "fp16".
        adapters_of: folder or name of the model whose adapters (LoRA) the repository holds, instead of a pipeline.
        remote_code: whether the repository has a branch with the code of its pipeline, as
            `push_to_hub(remote_code=True)` makes one. The first snippet then needs diffusers alone.

    Raises:
        ValueError: an argument is of the wrong kind, `license` or a name is not one that the Hub accepts, a metric is
            not finite, `remote_code` is True of anything but a pipeline at the top of a named repository.
    """
    model, kind = _unwrap(pipe_or_model)
    check_license(license)
    for name in [repo_id, *(datasets or [])]:
        validate_repo_id(name)  # which None passes
    for name, value in (("sample_image", sample_image), ("subfolder", subfolder), ("variant", variant)):
        if value is not None and not re.fullmatch(r"\w[\w.-]*", value, re.ASCII):
            raise ValueError(f"`{name}` must be a plain name of letters, digits, '_', '-' and '.', got {value!r}.")
    if remote_code and (kind != "pipeline" or repo_id is None or subfolder is not None or adapters_of is not None):
        raise ValueError("`remote_code` is for a pipeline at the top of a repository, named by `repo_id`.")
    metrics = {name: _check_metric(name, metric) for name, metric in (metrics or {}).items()}
    facts = _facts(model, kind, repo_id, {"subfolder": subfolder, "variant": variant}, adapters_of)
    return ModelCard.from_template(
        _metadata(facts, repo_id, license, datasets, metrics, adapters_of),
        template_path=str(_TEMPLATE),
        **facts,
        branch=BRANCH if remote_code else None,
        train_data=train_data,
        train_data_terms=train_data_terms,
        commands=shell_block(commands or []),
        metrics=metrics,
        sample_image=sample_image,
        sample_caption=sample_caption,
        train_steps=train_steps,
        train_batch_size=train_batch_size,
        limits=limits or [],
    )


def commands_of(folder: str | os.PathLike) -> list[str]:
    """The training commands in the card of a local folder, from `make_model_card`; none for a name of the Hub."""
    card = Path(folder) / "README.md"
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")  # somebody may have edited it, in whatever encoding
    section = re.search(r"^## Commands\n\n(`{3,})bash\n(.*?)\n\1$", text, re.M | re.S)
    return [section[2]] if section else []


def check_license(license: str | None) -> None:
    """Raise a ValueError unless `license` is None or looks like a licence identifier of the Hub."""
    if license is not None and not (isinstance(license, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license)):
        raise ValueError(
            "`license` must be an identifier of https://huggingface.co/docs/hub/repositories-licenses, such as"
            f" 'apache-2.0', or None where none has been chosen, got {shown(license)}."
        )


def is_name(name: str) -> bool:
    """Whether a repository of the Hub may be called so."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_on_hub(name: str) -> bool:
    """Whether a name can only be that of a repository of the Hub: nothing here is called so."""
    return is_name(name) and not os.path.exists(name)


def _unwrap(model: Any) -> tuple[Any, str]:
    """The model or pipeline itself, without the wrapper of torch.compile, and which it is."""
    model, kind = getattr(model, "_orig_mod", model), _kind(model)
    vae, transformer = (_kind(getattr(model, name, None)) for name in ("vae", "transformer"))
    fits = vae == "autoencoder" if transformer == "content" else transformer == "dcdit" and vae is not None
    if kind in (None, "foreign autoencoder") or (kind == "pipeline" and not fits):
        raise ValueError(
            "`pipe_or_model` must be a D2iTPipeline or DCDiTPipeline with `vae` and `transformer`, or one of their"
            f" models, got {type(model).__name__}."
        )
    return model, kind


def _kind(model: Any) -> str | None:
    model = getattr(model, "_orig_mod", model)
    return next((kind for cls, kind in _KINDS.items() if isinstance(model, cls)), None)


def _metadata(
    facts: dict[str, Any],
    repo_id: str | None,
    license: str | None,
    datasets: list[str] | None,
    metrics: dict,
    adapters_of: str | None,
) -> ModelCardData:
    """For the Hub; of the metrics those that say how they were measured."""
    task = "unconditional-image-generation" if facts["kind"] == "pipeline" else None
    results = [_eval_result(name, metric, task or "other") for name, metric in metrics.items() if metric["protocol"]]
    adapted = [] if adapters_of is None else ["lora"]
    labelled = [] if facts["num_classes"] is None else ["class-conditional"]
    return ModelCardData(
        base_model=adapters_of if adapters_of is not None and is_on_hub(adapters_of) else None,
        license=license,
        library_name="diffusers",
        pipeline_tag=task,
        tags=[facts["family"], "diffusers", *adapted, *labelled],
        datasets=datasets or None,
        model_name=(repo_id or type(facts["model"]).__name__) if results else None,
        eval_results=results or None,
    )


def _facts(
    model: Any, kind: str, repo_id: str | None, options: dict[str, str | None], adapters_of: str | None
) -> dict[str, Any]:
    """What the model says of itself and where it is loaded from, by the names of the template; and its functions."""
    parts = model.components if kind == "pipeline" else {"": model}
    vae = {"pipeline": getattr(model, "vae", None), "autoencoder": model}.get(kind)
    network = model.transformer if kind == "pipeline" else model
    num_classes, id2label = network.config.get("num_classes"), getattr(model, "id2label", None)  # None without labels
    family = "dcdit" if _kind(network) == "dcdit" else "d2it"
    facts = {"literal": literal, "prose": prose, "shorten": shorten, "family": family, **_FAMILIES[family]}
    facts |= {"kind": kind, "model": model, "vae": vae, "num_classes": num_classes, "id2label": id2label}
    facts["title"] = repo_id.split("/")[-1] if repo_id else type(model).__name__
    arguments = [f'"{repo_id or "."}"', *(f'{key}="{value}"' for key, value in options.items() if value is not None)]
    facts["location"] = ", ".join(arguments)
    facts["comment"] = "" if repo_id else "  # in the folder of this file"
    facts["parts"] = {
        name: _describe(part) for name, part in parts.items() if isinstance(part, ConfigMixin | torch.nn.Module)
    }
    facts["base"] = None
    if adapters_of is not None:
        facts["base"] = repr(adapters_of if is_on_hub(adapters_of) else printable(Path(adapters_of).name))
        trained = [weight for weight in model.transformer.parameters() if weight.requires_grad]
        words = _describe(model.transformer) | {"type": f"LoRA of {type(model.transformer).__name__}"}
        facts["parts"] = {"transformer": words | {"parameters": f"{sum(map(torch.numel, trained)):,}"}}
    if kind == "pipeline":
        factor = LatentCodec(vae).factor
        facts["side"] = model.transformer.config.sample_size * factor
        facts["unit"] = factor * model.transformer.patch_size
        first = min(id2label) if id2label else 0
        arguments = [] if num_classes is None else [f"class_labels=[{first}]"]
        if family == "d2it" and model.grain_model is None:
            arguments.append('grain_map="random"')
        facts["call"] = ", ".join(arguments)
        # As a comment of the call; no fence ends in it
        facts["label"] = "  # " + shorten(id2label[first]).replace("`", "'") if id2label else ""
    else:
        facts["side"] = model.config.sample_size
        cells = {"autoencoder": "region_size", "content": "patch_size"}.get(kind)
        facts["regions"] = facts["side"] // getattr(model, cells) if cells else None
    return facts


def _describe(part: Any) -> dict[str, str]:
    """Class, size, number of parameters and dtype of a component, in words."""
    part = getattr(part, "_orig_mod", part)
    words = {"type": type(part).__name__, "size": "", "parameters": "", "dtype": ""}
    if not isinstance(part, torch.nn.Module):
        return words
    config = part.config
    if isinstance(part, DynamicAutoencoderKL | AutoencoderKL):
        factors = ", ".join(map(str, LatentCodec(part).factors))
        words["size"] = f"F = {{{factors}}}, {config.latent_channels} channels"
    else:
        refine = f" + {config.num_refine_layers}" if isinstance(part, D2iTContentModel) else ""
        width = config.num_attention_heads * config.attention_head_dim
        words["size"] = f"{config.num_layers}{refine} layers of width {width}"
        if isinstance(part, DCDiTModel):
            words["size"] += f" between 2 x {config.num_conv_layers} of convolutions"
        else:
            words["size"] += f", {config.num_grains} grains"
    count = sum(parameter.numel() for parameter in part.parameters())
    words["parameters"] = f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,}"
    return words | {"dtype": str(part.dtype).removeprefix("torch.")}


def _check_metric(name: str, metric: dict | float | str) -> dict:
    """A metric as {"value", "protocol", "dataset"}."""
    metric = dict(metric) if isinstance(metric, dict) else {"value": metric}
    unknown = metric.keys() - {"value", "protocol", "dataset"}
    value = metric.get("value")
    value = value.item() if hasattr(value, "item") else value  # numbers of numpy and torch
    if unknown or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(
            f"`metrics[{name!r}]` must be a number or {{'value': number, 'protocol': words, 'dataset': words}}, got"
            f" {shown(metric)}."
        )
    if not isinstance(value, str) and not math.isfinite(value):
        raise ValueError(f"`metrics[{name!r}]` must be finite, got {value}.")
    return {"protocol": None, "dataset": None} | metric | {"value": value}


def _eval_result(name: str, metric: dict, task: str) -> EvalResult:
    said = {key: without_paths(printable(metric[key] or "not stated")) for key in ("dataset", "protocol")}
    return EvalResult(
        task_type=task,
        dataset_type=said["dataset"],
        dataset_name=said["dataset"],
        metric_type=re.sub(r"[^a-z0-9]+", "-", without_paths(name.lower())).strip("-") or "metric",
        metric_name=without_paths(printable(name)),
        metric_value=printable(metric["value"]) if isinstance(metric["value"], str) else metric["value"],
        metric_args={"protocol": said["protocol"]},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Strings from outside in Markdown: shown, and never markup of any kind
# ---------------------------------------------------------------------------------------------------------------------


def literal(text: object) -> str:
    """`text` as one line of Markdown that shows it literally: no markup, HTML, table cell, link or mention of it."""
    escaped = html.escape(printable(text), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|~$!#@:])", r"\\\1", escaped)
    escaped = re.sub(r"(?i)(?<=www)\.", r"\\.", escaped)  # GitHub's Markdown links bare host names
    return re.sub(r"^(\d*)([-+=.)])(?=\s|-|$)", r"\1\\\2", escaped)  # markers of lists, rules and headings


def prose(text: object) -> str:
    """`text` like `literal`, without absolute paths, but with http(s) addresses as links."""
    pieces = _ADDRESS.split(without_paths(printable(text)))
    return "".join(f"<{piece}>" if i % 2 else _piece(piece) for i, piece in enumerate(pieces))


def _piece(text: str) -> str:
    """`literal` that keeps the spaces around a piece of a line."""
    left, right = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{left}{literal(text)}{right}" if text.strip() else text


def shell_block(commands: list[str]) -> str:
    """Commands as a block of code, without absolute paths and access tokens; "" if there are none."""
    if not commands:
        return ""
    lines = "\n".join(without_secrets(command) for command in commands).replace("\r\n", "\n").split("\n")
    text = "\n".join(visible(line.expandtabs(4).rstrip()) for line in lines)
    # A fence ends at a line of as many backticks, so it is longer than any run of them inside.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}bash\n{text}\n{fence}"
