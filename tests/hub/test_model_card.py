# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What model cards say, and that strings from outside cannot break out of them."""

import re

import pytest
from cards import first_snippet, metadata
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from diffusers_d2it import make_model_card


SECTIONS = ["What is in it", "Classes", "Training data and its terms", "Commands", "Metrics", "Limits", "Licence"]


EVIL = [
    "gold`en ```\n---\n```python\nimport os",
    "{{ title }} <script>alert(1)</script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b]8;;http://evil.example\x07click",
    "| a | b |\n|---|---|\n| c",
    "[link](javascript:alert(1)) ![image](http://evil.example/x.png)",
    "# heading\n## Limits",
    "- item\n1. item\n> quote\n***\n___\n~~~",
    "$x$ **bold** _it_ ~~no~~ &lt; &#60; \\`x\\`",
    "http://evil.example www.evil.example @everyone #1",
    "right\u202eto left, zero\u200bwidth, line\u2028end, null\x00",
]


def rendered(card: ModelCard) -> list:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text)


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_strings_from_outside_show_as_they_are_and_do_nothing(make_pipeline, evil):
    card = make_model_card(
        make_pipeline(id2label={3: evil, 5: "fish"}),
        repo_id="user/tiny",
        license=None,
        train_data=evil,
        train_data_terms=evil,
        commands=[evil],
        metrics={evil: {"value": evil, "protocol": evil, "dataset": evil}},
        sample_image="samples.png",
        sample_caption=evil,
        limits=[evil],
    )
    assert all(char.isprintable() or char == "\n" for char in str(card)), "invisible characters"
    data = metadata(str(card))
    assert set(data) == {"library_name", "pipeline_tag", "tags", "model-index"}
    seen = " ".join(evil.split())
    seen = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in seen)
    assert data["model-index"][0]["results"][0]["metrics"][0]["args"] == {"protocol": seen}
    assert str(ModelCard(str(card))) == str(card)
    compile(first_snippet(card.text), "snippet", "exec")
    assert "import os" not in first_snippet(card.text).splitlines()

    tokens = rendered(card)
    inline = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in tokens + inline}
    assert not kinds & {"html_block", "html_inline", "hr", "code_block", "blockquote_open", "ordered_list_open"}
    assert not kinds & {"strong_open", "em_open", "s_open"}
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == ["tiny", *SECTIONS]
    assert [token.info for token in tokens if token.type == "fence"] == ["python", "bash"]
    assert [token.attrs["src"] for token in inline if token.type == "image"] == ["samples.png"]
    links = {token.attrs["href"] for token in inline if token.type == "link_open"}
    assert all(re.fullmatch(r"https?://[\w./-]+", link) for link in links)
    tables = [token.type for token in tokens]
    assert tables.count("table_open") == 2 and tables.count("th_open") == 5 + 3
    text = "".join(token.content for token in inline if token.type in ("text", "text_special", "code_inline"))
    assert text.count(seen) >= 5, "shown literally: data, terms, metric, caption, limit"


def test_class_names_make_no_links(make_pipeline):
    card = make_model_card(make_pipeline(id2label={0: EVIL[8]}), repo_id="user/tiny", license=None)
    classes = card.text.split("## Classes")[1].split("## ")[0]
    assert "http\\://" in classes and "www\\.evil" in classes and "\\@everyone" in classes
    assert [t.attrs["href"] for token in rendered(card) for t in token.children or [] if t.type == "link_open"] == [
        "https://arxiv.org/abs/2504.09454"
    ]


def test_card_says_what_the_models_are(make_pipeline, calibrate):
    pipe = make_pipeline(id2label={id: f"class {id}" for id in range(1, 10)} | {0: "x" * 200})
    card = make_model_card(
        pipe, repo_id="user/tiny", license="cc-by-4.0", datasets=["user/photos"], train_steps=4800, train_batch_size=32
    )
    count = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    rows = [re.split(r"\s*\|\s*", line) for line in card.text.splitlines()]
    (row,) = (row for row in rows if row[1:3] == ["`transformer`", "`D2iTContentModel`"])
    assert re.match(r"2 \+ 1 .*32.* 2 ", row[3]) and row[4:] == [f"{count:,}", "float32", ""]
    assert ["`vae`", "`DynamicAutoencoderKL`", "F = {4, 8}, 4 channels"] in [row[1:4] for row in rows]
    assert "by id: 0 " + "x" * 59 + "…; 1 class 1; 2 class 2;" in card.text
    limits = card.text.split("## Limits")[1]
    for fact in ["32×32", "10 classes", "4,800", "batch 32", "photographs of scikit-image"]:
        assert fact in limits
    assert metadata(str(card)) == {
        "datasets": ["user/photos"],
        "library_name": "diffusers",
        "license": "cc-by-4.0",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["d2it", "diffusers", "class-conditional"],
    }


def test_card_names_what_nobody_has_said(make_pipeline, make_vae):
    for model in (make_pipeline(), make_vae()):
        card = make_model_card(model, repo_id="user/tiny", license=None)
        assert not {"license", "model-index", "datasets"} & metadata(str(card)).keys()
        said = {section.split("\n")[0]: section for section in card.text.split("## ")[1:]}
        for section in ("Training data and its terms", "Commands", "Metrics", "Limits", "Licence"):
            assert re.search(r"\b[Nn]ot? |\bno ", said[section]), f"{section} says that something is not known"
    assert "pipeline_tag" not in metadata(str(card)) and "class-conditional" not in metadata(str(card))["tags"]


def test_figures_get_into_the_metadata_with_a_protocol_only(make_pipeline):
    protocol = "50,000 samples, 250 steps, guidance 1.5 against /home/somebody/stats/reference.npz"
    metrics = {
        "FID": {"value": 12.5, "protocol": protocol, "dataset": "ImageNet validation"},
        "PSNR, dB": 23.63,
        "sFID": {"value": 7},
        "rFID, /home/somebody/inception": {"value": 3, "protocol": "as above"},
    }
    card = make_model_card(make_pipeline(), repo_id="user/tiny", license=None, metrics=metrics)
    result, other = metadata(str(card))["model-index"][0]["results"]
    assert other["metrics"][0]["name"] == "rFID, inception" and "somebody" not in str(card)
    assert result["dataset"]["name"] == "ImageNet validation"
    (metric,) = result["metrics"]
    said = "50,000 samples, 250 steps, guidance 1.5 against reference.npz"
    assert metric == {"name": "FID", "type": "fid", "value": 12.5, "args": {"protocol": said}}
    assert f"| FID | 12.5 | {said} Data: ImageNet validation. |" in card.text
    assert "| PSNR, dB | 23.63 | not recorded" in card.text and "| sFID | 7 | not recorded" in card.text


@pytest.mark.parametrize(
    "written, shown",
    [
        ("python /home/somebody/train.py --out runs/x", "python train.py --out runs/x"),
        ("train.py --data='/home/some body/my photos/' -v", "train.py --data='my photos' -v"),
        ('train.py --data "/data/photos" --x=/a/b/c.json', 'train.py --data "photos" --x=c.json'),
        ("train.py ~/photos ~somebody/x ./runs ../runs a/b", "train.py photos x ./runs ../runs a/b"),
        (r"train.py C:\Users\somebody\photos D:/x/y", "train.py photos y"),
        ("train.py file:///home/somebody/x https://a.example/b s3://c/d", "train.py x https://a.example/b s3://c/d"),
        ("PATH=/home/somebody/bin:/usr/bin train.py ${HOME}/x", "PATH=bin:bin train.py ${HOME}/x"),
        ("HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz train.py", "HF_TOKEN=hf_*** train.py"),
        ("echo a // b / c", "echo a // b / c"),
        ("train.py \\\n    --name `date` \x1b[2K", "train.py \\\n    --name `date` \\x1b[2K"),
    ],
)
def test_commands_are_exact_but_for_paths_secrets_and_escapes(make_vae, written, shown):
    card = make_model_card(make_vae(), repo_id=None, license=None, commands=["first", written])
    assert f"```bash\nfirst\n{shown}\n```" in card.text


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"license": "Apache License, Version 2.0"}, ["`license`", "Version 2.0"]),
        ({"repo_id": "user/tiny\n---"}, ["user/tiny"]),
        ({"sample_image": "/home/somebody/x.png"}, ["`sample_image`", "/home/somebody/x.png"]),
        ({"subfolder": '"), evil("'}, ["`subfolder`", "evil"]),
        ({"datasets": ["not a name"]}, ["not a name"]),
        ({"metrics": {"FID": float("nan")}}, ["`metrics['FID']`", "nan"]),
        ({"metrics": {"FID": {"score": 3}}}, ["`metrics['FID']`", "'score': 3"]),
    ],
)
def test_arguments_of_a_card_are_checked(make_vae, arguments, named):
    with pytest.raises(ValueError) as raised:
        make_model_card(make_vae(), **({"repo_id": None, "license": None} | arguments))
    assert all(name in str(raised.value) for name in named)


def test_a_card_of_something_else_is_refused():
    with pytest.raises(ValueError, match="`pipe_or_model`.*DDIMScheduler"):
        make_model_card(DDIMScheduler(), repo_id=None, license=None)
