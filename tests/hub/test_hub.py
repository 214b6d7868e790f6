# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pushing to a Hub on the loop-back interface, from processes of their own."""

import json
import re
import socket
import sys
from argparse import Namespace
from pathlib import Path

import PIL.Image
import pytest
from cards import first_snippet, metadata
from diffusers import DDIMScheduler
from loopback_hub import TOKEN, files_of, run_with_hub
from script_runs import load_script

from diffusers_d2it.hub import check_push, publish
from diffusers_d2it.hub.card import make_model_card
from diffusers_d2it.hub.push import files_to_push


PIPELINE_FILES = {"README.md", "model_index.json"}
PIPELINE_FILES |= {f"{name}/scheduler_config.json" for name in ("scheduler", "grain_scheduler")}
MODEL_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
PIPELINE_FILES |= {f"{model}/{file}" for model in ("vae", "grain_model", "transformer") for file in MODEL_FILES}
# What a process says about calls that must raise a ValueError
REFUSED = """
import os
def refused(call, *expected):
    try:
        call()
    except ValueError as error:
        for words in expected:
            assert words in str(error), f"{words!r} not in {error}"
    else:
        raise AssertionError(f"nothing was raised instead of {expected}")
"""


@pytest.fixture
def picture(tmp_path) -> Path:
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "step-0000005.png")
    return tmp_path / "step-0000005.png"


def push(folder: Path, repo_id: str = "user/tiny", private: bool | None = None) -> str:
    """The code that pushes a folder."""
    return (
        f"from diffusers_d2it.hub import push_folder; push_folder({str(folder)!r}, {repo_id!r}, private={private})\n"
    )


# ---- Pushing ----


def test_a_pushed_pipeline_loads_and_the_snippet_of_its_card_generates(saved, picture, hub, tmp_path):
    output = hub.run(f"""
from diffusers_d2it import D2iTPipeline
pipe = D2iTPipeline.from_pretrained({str(saved)!r})
print("url", pipe.push_to_hub("tiny", private=True, sample_image={str(picture)!r}))
""")
    assert f"url {hub.endpoint}/user/tiny/commit/" in output
    assert hub.uploads.visibility == {"user/tiny": "private"}
    pushed = hub.repositories["user/tiny"]
    assert set(files_of(pushed)) == PIPELINE_FILES | {"samples.png"}
    assert (pushed / "samples.png").read_bytes() == picture.read_bytes()
    for config in pushed.rglob("*.json"):
        assert str(tmp_path) not in config.read_text(), f"{config} names a folder of this machine"

    card = (pushed / "README.md").read_text()
    snippet = first_snippet(card)
    assert '"user/tiny"' in snippet and card.index("```python") < card.index("![samples](samples.png)")
    output = hub.run(f"""
{snippet}
import sys
sys.path.append({str(Path(__file__).parents[1])!r})
from alike import same_weights
from diffusers import AutoModel, DiffusionPipeline
from diffusers_d2it import D2iTContentModel
assert output.images[0].size == (32, 32) and output.grain_maps.shape == (1, 4, 4)
local = D2iTPipeline.from_pretrained({str(saved)!r})
for loaded in (pipe, DiffusionPipeline.from_pretrained("user/tiny")):
    assert type(loaded) is D2iTPipeline and loaded.id2label == local.id2label
    for name in ("vae", "grain_model", "transformer"):
        assert same_weights(getattr(loaded, name), getattr(local, name)), name
for loader in (AutoModel, D2iTContentModel):
    model = loader.from_pretrained("user/tiny", subfolder="transformer")
    assert type(model) is D2iTContentModel and same_weights(model, local.transformer)
print("ran")
""")
    assert "ran" in output.splitlines()


def test_visibility_arrives_as_chosen_and_public_is_no_place_for_what_should_be_private(saved, hub):
    hub.run(
        push(saved, "user/private", True)
        + push(saved, "user/public", False)
        + push(saved, "user/open", None)
        + f"""{REFUSED}
refused(lambda: push_folder({str(saved)!r}, "user/public", private=True), "'user/public'", "`private`", "public")
"""
    )
    assert hub.uploads.visibility == {"user/private": "private", "user/public": "public", "user/open": None}
    assert [commit[0] for commit in hub.uploads.commits] == list(hub.uploads.visibility)


def test_only_files_of_a_pipeline_are_pushed_and_not_where_they_came_from(saved, hub, tmp_path):
    strays = [".env", "notes.txt", "optimizer.bin", "wandb_config.json", "vae/.env", "vae/weights\x1b[31m.bin"]
    strays += ["checkpoint-5/model.safetensors", "logs/token", "vae/old/diffusion_pytorch_model.safetensors"]
    for stray in strays:
        (saved / stray).parent.mkdir(exist_ok=True)
        (saved / stray).write_text("a secret")
    config = json.loads((saved / "vae/config.json").read_text())
    blob = json.dumps(config | {"_name_or_path": "/home/somebody/runs/dvae"})
    (tmp_path / "blob").write_text(blob)
    (saved / "vae/config.json").unlink()
    (saved / "vae/config.json").symlink_to(tmp_path / "blob")  # as in the cache of the Hub client
    output = hub.run(push(saved))
    pushed = hub.repositories["user/tiny"]
    assert set(files_of(pushed)) == PIPELINE_FILES - {"README.md"}
    warning = re.search(r"user/tiny: (.*)", output)[1].split(", ")
    named = {".env", "notes.txt", "optimizer.bin", "wandb_config.json", "vae/.env", r"vae/weights\x1b[31m.bin"}
    assert set(warning) == named | {"checkpoint-5/", "logs/", "vae/old/"} and "\x1b" not in output
    assert all((saved / stray).read_text() == "a secret" for stray in strays)
    assert json.loads((pushed / "vae/config.json").read_text()) == config
    assert (tmp_path / "blob").read_text() == blob, "the cache must stay as it is"


def test_all_that_save_pretrained_writes_is_pushed_but_no_linked_folder(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe", variant="fp16", max_shard_size="100KB")
    names, left_out = files_to_push(tmp_path / "pipe")
    assert left_out == [] and set(names) == set(files_of(tmp_path / "pipe")) - {"manifest.json"}
    assert any(name.endswith(".safetensors.index.fp16.json") for name in names)
    (tmp_path / "pipe" / "vae").rename(tmp_path / "elsewhere")
    (tmp_path / "pipe" / "vae").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    names, left_out = files_to_push(tmp_path / "pipe")
    assert left_out == ["vae/"] and not [name for name in names if name.startswith("vae")]


def test_save_pretrained_and_push_end_with_our_card_and_keep_one_that_is_there(hub, saved, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / ".env").write_text("a secret")
    start = f"""
from diffusers_d2it import D2iTPipeline, make_model_card
pipe = D2iTPipeline.from_pretrained({str(saved)!r})
"""
    output = hub.run(f"{start}pipe.save_pretrained({str(tmp_path / 'tiny')!r}, push_to_hub=True, private=True)")
    pushed = hub.repositories["user/tiny"]
    assert set(files_of(pushed)) == PIPELINE_FILES and "user/tiny: .env" in output
    assert 'D2iTPipeline.from_pretrained("user/tiny")' in first_snippet((pushed / "README.md").read_text())
    assert (pushed / "README.md").read_bytes() == (tmp_path / "tiny/README.md").read_bytes()

    (pushed / "README.md").write_text("---\nlicense: mit\n---\nwritten by hand\n")
    output = hub.run(f"""{start}
pipe.push_to_hub("user/tiny", commit_message="again")
print(pipe.push_to_hub("user/cardless", create_pr=True, subfolder="small"))
card = make_model_card(pipe, repo_id="user/tiny", license="cc0-1.0")
pipe.push_to_hub("user/tiny", model_card=card)
""")
    kept, in_pull_request, replaced = hub.uploads.commits[1:]
    without_card = sorted(PIPELINE_FILES - {"README.md"})
    assert kept == ("user/tiny", "main", "again", without_card)
    assert f"{hub.endpoint}/user/cardless/discussions/1" in output and in_pull_request[1] == "refs/pr/1"
    assert in_pull_request[3] == [f"small/{name}" for name in without_card]
    assert "D2iTPipeline" in replaced[2] and replaced[3] == sorted(PIPELINE_FILES)
    assert metadata((pushed / "README.md").read_text())["license"] == "cc0-1.0"


def test_refusals_name_the_repository_the_cause_and_where_the_files_are(saved, hub, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    start = f"""{REFUSED}
from diffusers_d2it import D2iTPipeline
from diffusers_d2it.hub import check_push, push_folder
kept = {str(saved)!r}
def push(repo_id, token=None):
    return lambda: push_folder(kept, repo_id, private=None, token=token)
"""
    code = f"""{start}
pipe = D2iTPipeline.from_pretrained(kept)
refused(push("user/tiny"), "'user/tiny'", "refused", kept)
refused(push("not a name"), "'not a name'", kept)
refused(lambda: push_folder({str(tmp_path)!r}, "user/tiny", private=None), "`folder`", {str(tmp_path)!r})
refused(lambda: pipe.push_to_hub("user/tiny"), "'user/tiny'", "refused", "in memory", "save_pretrained")
refused(lambda: pipe.push_to_hub("user/tiny", safe_serialization=False), "safe_serialization", "pickled")
refused(lambda: pipe.push_to_hub("user/tiny", sample_image=kept + "/model_index.json"), "`sample_image`")
refused(lambda: pipe.save_pretrained({str(tmp_path / "new")!r}, push_to_hub=True), "'new'", {str(tmp_path / "new")!r})
assert D2iTPipeline.from_pretrained({str(tmp_path / "new")!r}).id2label == pipe.id2label
hub = dict(push_to_hub=True, hub_model_id="user/tiny", hub_private_repo=None, license=None)
refused(lambda: check_push(**hub), "'user/tiny'", "refused", "`push_to_hub`")
del os.environ["HF_TOKEN"]
refused(push("user/tiny"), "HF_TOKEN", "hf auth login", kept)
"""
    run_with_hub(code, nowhere, tmp_path / "hf")
    hub.uploads.roles[TOKEN] = "read"
    hub.run(f"""{start}
refused(push("user/tiny"), "'user/tiny'", "rights", kept)
refused(push("user/tiny", "hf_wrong"), "'user/tiny'", "password", kept)
""")
    assert hub.uploads.visibility == {} and hub.uploads.commits == []


# ---- After a training ----

NO_PUSH = {"push_to_hub": False, "hub_model_id": None, "hub_private_repo": None, "license": None}


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"push_to_hub": True}, ["`push_to_hub`", "`hub_model_id`"]),
        ({"hub_private_repo": True}, ["`hub_private_repo`", "`push_to_hub`"]),
        ({"hub_remote_code": True}, ["`hub_remote_code`", "`push_to_hub`"]),
        ({"hub_model_id": "tiny"}, ["`hub_model_id`", "user/name", "'tiny'"]),
        ({"hub_model_id": "user/tiny model"}, ["`hub_model_id`", "'user/tiny model'"]),
        ({"license": "Apache 2.0"}, ["`license`", "'Apache 2.0'"]),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(arguments, named):
    with pytest.raises(ValueError) as raised:
        check_push(**NO_PUSH | arguments)
    assert all(name in str(raised.value) for name in named)


def test_without_a_push_no_hub_is_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda *args: pytest.fail("asked the Hub"))
    check_push(**NO_PUSH | {"hub_model_id": "user/tiny", "license": "cc-by-4.0"})


def test_whether_the_result_can_be_pushed_is_known_before_the_training(hub, tmp_path):
    hub.uploads.roles |= {"hf_read": "read", "hf_fine": "fineGrained"}
    hub.repositories["user/public"] = tmp_path / "public"
    hub.run(f"""{REFUSED}
from diffusers_d2it.hub import check_push
def check(name, token="{TOKEN}"):
    os.environ["HF_TOKEN"] = token
    return lambda: check_push(push_to_hub=True, hub_model_id=name, hub_private_repo=True, license=None)
check("user/tiny")()
refused(check("user/public"), "'user/public'", "public")
refused(check("other/tiny"), "'other/tiny'", "rights")
refused(check("user/tiny", token=""), "token")
refused(check("user/tiny", token="hf_read"), "token", "read")
# A token for some other repository: nothing but the last question finds it out.
refused(check("user/tiny", token="hf_fine"), "Forbidden")
""")
    assert hub.uploads.visibility == {"user/tiny": "private"} and hub.uploads.commits == []


def test_publish_writes_the_card_of_a_run_also_without_a_push(make_vae, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/somebody/train_dvae.py", "--train_data_dir", "/home/somebody/my photos"])
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    training = {"max_train_steps": 4000, "train_batch_size": 16, "gradient_accumulation_steps": 2}
    flags = load_script("flags.py").run_arguments(Namespace(**training, dataset_name=None), num_processes=2)
    hub = NO_PUSH | {"license": "mit"}
    assert publish(vae, tmp_path / "vae", **hub, **flags, train_data="photos, 32x32", sample_image=picture) is None
    card = (tmp_path / "vae/README.md").read_text()
    assert "accelerate launch --num_processes 2 train_dvae.py --train_data_dir 'my photos'\n" in card
    assert "somebody" not in card and metadata(card)["license"] == "mit" and "datasets" not in metadata(card)
    assert "4,000" in card and "64" in card and "photos, 32x32" in card
    assert (tmp_path / "vae/samples.png").read_bytes() == picture.read_bytes() and "(samples.png)" in card
    monkeypatch.chdir(tmp_path / "vae")
    scope = {}
    exec(first_snippet(card), scope)  # without a name on the Hub it loads from its folder
    assert scope["decoded"].shape == (1, 3, 32, 32)

    (tmp_path / "vae/README.md").write_bytes(card.encode() + "Größe".encode("latin-1"))  # edited
    stage = {"built_on": [tmp_path / "vae", "user/grains"], "commands": ["last"]}
    with pytest.warns(UserWarning, match="none.png"):
        publish(vae, tmp_path / "vae", **hub, **stage, dataset_name="user/photos", sample_image="none.png")
    card = (tmp_path / "vae/README.md").read_text()
    assert "![" not in card and metadata(card)["datasets"] == ["user/photos"]
    assert re.search(r"train_dvae.py .*\nlast\n```", card), "the commands of all stages, in their order"


def test_publish_pushes_the_folder_of_a_run(make_grain_model, hub, tmp_path):
    folder = tmp_path / "grain"
    make_grain_model().save_pretrained(folder / "grain_model")
    DDIMScheduler().save_pretrained(folder / "grain_scheduler")
    (folder / "checkpoint-5").mkdir()
    output = hub.run(f"""
from diffusers_d2it import D2iTGrainModel
from diffusers_d2it.hub import publish
hub = dict(push_to_hub=True, hub_model_id="user/grain", hub_private_repo=True, license=None)
model = D2iTGrainModel.from_pretrained({str(folder)!r}, subfolder="grain_model")
print(publish(model, {str(folder)!r}, **hub, train_steps=4000, subfolder="grain_model"))
""")
    assert f"{hub.endpoint}/user/grain/commit/" in output and "checkpoint-5/" in output
    pushed = hub.repositories["user/grain"]
    files = ["README.md", "grain_model/config.json", "grain_model/diffusion_pytorch_model.safetensors"]
    assert files_of(pushed) == [*files, "grain_scheduler/scheduler_config.json"]
    assert hub.uploads.visibility == {"user/grain": "private"}
    assert "D2iTGrainModel" in hub.uploads.commits[0][2] and "4000" in hub.uploads.commits[0][2]
    hub.run(f"{first_snippet((pushed / 'README.md').read_text())}\nassert grain_map.shape == (1, 4, 4)")


def test_snippets_of_all_kinds_run(
    make_pipeline, make_vae, make_grain_model, make_content_model, make_dcdit_pipeline, make_dcdit, hub, tmp_path
):
    image, decoded = "output.images[0].size == (32, 32)", "decoded.shape == images.shape"
    grain_map, noise = "grain_map.shape == (1, 4, 4)", "noise.shape == latents.shape"
    made = {
        "unconditional": (make_pipeline(num_classes=None), image),
        "nameless": (make_pipeline(id2label=None), image),
        "sparse": (make_pipeline(id2label={7: "only this"}), image),
        "mapless": (make_pipeline(grain_model=None, grain_scheduler=None), image),
        "three": (make_pipeline(num_grains=3), "output.grain_maps.shape == (1, 4, 4)"),
        "vae": (make_vae(), decoded),
        "uncalibrated": (make_vae(calibration=None), decoded),
        "grain": (make_grain_model(), grain_map),
        "unconditional-grain": (make_grain_model(num_classes=None), grain_map),
        "content": (make_content_model(), noise),
        "unconditional-content": (make_content_model(num_classes=None), noise),
        "dcdit-pipeline": (make_dcdit_pipeline(), image),
        "dcdit-of-grains": (make_dcdit_pipeline(vae=make_vae()), image),
        "unconditional-dcdit": (make_dcdit_pipeline(num_classes=None), image),
        "dcdit": (make_dcdit(), "output.sample.shape == latents.shape"),
    }
    code = ""
    for name, (model, check) in made.items():
        model.save_pretrained(tmp_path / name, variant="fp16")
        card = str(make_model_card(model, repo_id=f"user/{name}", license=None, variant="fp16"))
        hub.repositories[f"user/{name}"] = tmp_path / name
        code += f"{first_snippet(card)}\nassert {check}, {name!r}\n"
    hub.run(code)
