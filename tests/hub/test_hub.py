# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pushing to a Hub on the loop-back interface, from processes of their own."""

import json
import os
import re
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import PIL.Image
import pytest
import yaml
from diffusers import DDIMScheduler
from loopback_hub import TOKEN, Uploads, files_of, serve_hub
from script_runs import load_script

from diffusers_d2it.hub import check_push, publish
from diffusers_d2it.hub.card import make_model_card
from diffusers_d2it.hub.push import files_to_push


PIPELINE_FILES = {
    "README.md",
    "model_index.json",
    "grain_model/config.json",
    "grain_model/diffusion_pytorch_model.safetensors",
    "grain_scheduler/scheduler_config.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
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
def saved(make_pipeline, tmp_path) -> Path:
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def picture(tmp_path) -> Path:
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "step-0000005.png")
    return tmp_path / "step-0000005.png"


@pytest.fixture
def run(tmp_path):
    """run(code, endpoint): what a process prints that sees this Hub and no other."""

    def run(code: str, endpoint: str) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        environment |= {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-W", "always", "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    return run


def first_snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def push(folder: Path, repo_id: str = "user/tiny", private: bool | None = None) -> str:
    """The code that pushes a folder."""
    return (
        f"from diffusers_d2it.hub import push_folder; push_folder({str(folder)!r}, {repo_id!r}, private={private})\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pushing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_pushed_pipeline_loads_and_the_snippet_of_its_card_generates(saved, picture, run, tmp_path):
    uploads, repositories = Uploads(tmp_path / "hub"), {}
    with serve_hub(repositories, uploads) as endpoint:
        output = run(
            f"""
from diffusers_d2it import D2iTPipeline
pipe = D2iTPipeline.from_pretrained({str(saved)!r})
print("url", pipe.push_to_hub("tiny", private=True, sample_image={str(picture)!r}))
""",
            endpoint,
        )
        assert f"url {endpoint}/user/tiny/commit/" in output
        assert uploads.visibility == {"user/tiny": "private"}
        pushed = repositories["user/tiny"]
        assert set(files_of(pushed)) == PIPELINE_FILES | {"samples.png"}
        assert (pushed / "samples.png").read_bytes() == picture.read_bytes()
        for config in pushed.rglob("*.json"):
            assert str(tmp_path) not in config.read_text(), f"{config} names a folder of this machine"

        card = (pushed / "README.md").read_text()
        snippet = first_snippet(card)
        assert '"user/tiny"' in snippet and card.index("```python") < card.index("![samples](samples.png)")
        output = run(
            f"""
{snippet}
import torch
assert output.images[0].size == (32, 32) and output.grain_maps.shape == (1, 4, 4)
local = D2iTPipeline.from_pretrained({str(saved)!r})
for name in ("vae", "grain_model", "transformer"):
    for a, b in zip(getattr(pipe, name).state_dict().values(), getattr(local, name).state_dict().values()):
        assert torch.equal(a, b)
assert pipe.id2label == local.id2label
print("ran")
""",
            endpoint,
        )
    assert "ran" in output.splitlines()


def test_visibility_arrives_as_chosen_and_public_is_no_place_for_what_should_be_private(saved, run, tmp_path):
    uploads = Uploads(tmp_path / "hub")
    code = push(saved, "user/private", True) + push(saved, "user/public", False) + push(saved, "user/open", None)
    code += f"""{REFUSED}
refused(lambda: push_folder({str(saved)!r}, "user/public", private=True), "'user/public'", "`private`", "public")
"""
    with serve_hub({}, uploads) as endpoint:
        run(code, endpoint)
    assert uploads.visibility == {"user/private": "private", "user/public": "public", "user/open": None}
    assert [commit[0] for commit in uploads.commits] == list(uploads.visibility)


def test_only_files_of_a_pipeline_are_pushed_and_the_others_named(saved, run, tmp_path):
    strays = [".env", "notes.txt", "optimizer.bin", "wandb_config.json", "vae/.env", "vae/weights\x1b[31m.bin"]
    strays += ["checkpoint-5/model.safetensors", "logs/token", "vae/old/diffusion_pytorch_model.safetensors"]
    for stray in strays:
        (saved / stray).parent.mkdir(exist_ok=True)
        (saved / stray).write_text("a secret")
    uploads, repositories = Uploads(tmp_path / "hub"), {}
    with serve_hub(repositories, uploads) as endpoint:
        output = run(push(saved), endpoint)
    assert set(files_of(repositories["user/tiny"])) == PIPELINE_FILES - {"README.md"}
    warning = re.search(r"user/tiny: (.*)", output)[1].split(", ")
    named = {".env", "notes.txt", "optimizer.bin", "wandb_config.json", "vae/.env", r"vae/weights\x1b[31m.bin"}
    assert set(warning) == named | {"checkpoint-5/", "logs/", "vae/old/"} and "\x1b" not in output
    assert all((saved / stray).read_text() == "a secret" for stray in strays)


def test_all_that_save_pretrained_writes_is_pushed_but_no_linked_folder(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe", variant="fp16", max_shard_size="100KB")
    names, left_out = files_to_push(tmp_path / "pipe")
    assert left_out == [] and set(names) == set(files_of(tmp_path / "pipe")) - {"manifest.json"}
    assert any(name.endswith(".safetensors.index.fp16.json") for name in names)
    (tmp_path / "pipe" / "vae").rename(tmp_path / "elsewhere")
    (tmp_path / "pipe" / "vae").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    names, left_out = files_to_push(tmp_path / "pipe")
    assert left_out == ["vae/"] and not [name for name in names if name.startswith("vae")]


def test_where_a_model_was_loaded_from_is_not_pushed(saved, run, tmp_path):
    config = json.loads((saved / "vae/config.json").read_text())
    (tmp_path / "blob").write_text(json.dumps(config | {"_name_or_path": "/home/somebody/runs/dvae"}))
    (saved / "vae/config.json").unlink()
    (saved / "vae/config.json").symlink_to(tmp_path / "blob")  # as in the cache of the Hub client
    repositories = {}
    with serve_hub(repositories, Uploads(tmp_path / "hub")) as endpoint:
        run(push(saved), endpoint)
    assert json.loads((repositories["user/tiny"] / "vae/config.json").read_text()) == config
    assert "somebody" in (tmp_path / "blob").read_text(), "the cache must stay as it is"


def test_save_pretrained_and_push_end_with_our_card_and_keep_one_that_is_there(run, saved, tmp_path):
    repositories, uploads = {}, Uploads(tmp_path / "hub")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / ".env").write_text("a secret")
    start = f"""
from diffusers_d2it import D2iTPipeline, make_model_card
pipe = D2iTPipeline.from_pretrained({str(saved)!r})
"""
    with serve_hub(repositories, uploads) as endpoint:
        folder = str(tmp_path / "tiny")
        output = run(f"{start}pipe.save_pretrained({folder!r}, push_to_hub=True, private=True)", endpoint)
        pushed = repositories["user/tiny"]
        assert set(files_of(pushed)) == PIPELINE_FILES and "user/tiny: .env" in output
        assert 'D2iTPipeline.from_pretrained("user/tiny")' in first_snippet((pushed / "README.md").read_text())
        assert (pushed / "README.md").read_bytes() == (tmp_path / "tiny/README.md").read_bytes()

        (pushed / "README.md").write_text("---\nlicense: mit\n---\nwritten by hand\n")
        output = run(
            f"""{start}
pipe.push_to_hub("user/tiny", commit_message="again")
print(pipe.push_to_hub("user/cardless", create_pr=True, subfolder="small"))
card = make_model_card(pipe, repo_id="user/tiny", license="cc0-1.0")
pipe.push_to_hub("user/tiny", model_card=card)
""",
            endpoint,
        )
    kept, in_pull_request, replaced = uploads.commits[1:]
    without_card = sorted(PIPELINE_FILES - {"README.md"})
    assert kept == ("user/tiny", "main", "again", without_card)
    assert f"{endpoint}/user/cardless/discussions/1" in output and in_pull_request[1] == "refs/pr/1"
    assert in_pull_request[3] == [f"small/{name}" for name in without_card]
    assert replaced[2:] == ("Upload D2iTPipeline", sorted(PIPELINE_FILES))
    assert metadata((pushed / "README.md").read_text())["license"] == "cc0-1.0"


def test_refusals_name_the_repository_the_cause_and_where_the_files_are(saved, run, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    kept = str(saved)
    code = f"""{REFUSED}
from diffusers_d2it import D2iTPipeline
from diffusers_d2it.hub import check_push, push_folder
pipe = D2iTPipeline.from_pretrained({kept!r})
def push(repo_id):
    return lambda: push_folder({kept!r}, repo_id, private=None)
refused(push("user/tiny"), "'user/tiny'", "refused", {kept!r})
refused(push("not a name"), "'not a name'", {kept!r})
refused(lambda: push_folder({str(tmp_path)!r}, "user/tiny", private=None), "`folder`", {str(tmp_path)!r})
refused(lambda: pipe.push_to_hub("user/tiny"), "'user/tiny'", "refused", "in memory", "save_pretrained")
refused(lambda: pipe.push_to_hub("user/tiny", safe_serialization=False), "safe_serialization", "pickled")
refused(lambda: pipe.push_to_hub("user/tiny", sample_image={str(saved / "model_index.json")!r}), "`sample_image`")
refused(lambda: pipe.save_pretrained({str(tmp_path / "new")!r}, push_to_hub=True), "'new'", {str(tmp_path / "new")!r})
assert D2iTPipeline.from_pretrained({str(tmp_path / "new")!r}).id2label == pipe.id2label
hub = dict(push_to_hub=True, hub_model_id="user/tiny", hub_private_repo=None, license=None)
refused(lambda: check_push(**hub), "'user/tiny'", "refused", "`push_to_hub`")
del os.environ["HF_TOKEN"]
refused(push("user/tiny"), "HF_TOKEN", "hf auth login", {kept!r})
"""
    run(code, nowhere)
    uploads = Uploads(tmp_path / "hub", roles={TOKEN: "read"})
    code = f"""{REFUSED}
from diffusers_d2it.hub import push_folder
def push(token):
    return lambda: push_folder({kept!r}, "user/tiny", private=None, token=token)
refused(push(None), "'user/tiny'", "You don't have the rights", {kept!r})
refused(push("hf_wrong"), "'user/tiny'", "Invalid username or password", {kept!r})
"""
    with serve_hub({}, uploads) as endpoint:
        run(code, endpoint)
    assert uploads.visibility == {} and uploads.commits == []


# ---------------------------------------------------------------------------------------------------------------------
# After a training
# ---------------------------------------------------------------------------------------------------------------------

NO_PUSH = {"push_to_hub": False, "hub_model_id": None, "hub_private_repo": None, "license": None}


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"push_to_hub": True}, ["`push_to_hub`", "`hub_model_id`"]),
        ({"hub_private_repo": True}, ["`hub_private_repo`", "`push_to_hub`"]),
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


def test_whether_the_result_can_be_pushed_is_known_before_the_training(run, tmp_path):
    code = f"""{REFUSED}
from diffusers_d2it.hub import check_push
def check(name, token="{TOKEN}"):
    os.environ["HF_TOKEN"] = token
    return lambda: check_push(push_to_hub=True, hub_model_id=name, hub_private_repo=True, license=None)
check("user/tiny")()
refused(check("user/public"), "'user/public'", "public")
refused(check("other/tiny"), "'other/tiny'", "You don't have the rights")
refused(check("user/tiny", token=""), "token")
refused(check("user/tiny", token="hf_read"), "token", "read")
# A token for some other repository: nothing but the last question finds it out.
refused(check("user/tiny", token="hf_fine"), "Forbidden")
"""
    uploads = Uploads(tmp_path / "hub", roles={TOKEN: "write", "hf_read": "read", "hf_fine": "fineGrained"})
    with serve_hub({"user/public": tmp_path / "public"}, uploads) as endpoint:
        run(code, endpoint)
    assert uploads.visibility == {"user/tiny": "private"} and uploads.commits == []


def test_publish_writes_the_card_of_a_run_also_without_a_push(make_vae, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/somebody/train_dvae.py", "--train_data_dir", "/home/somebody/my photos"])
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    training = {"max_train_steps": 4000, "train_batch_size": 16, "gradient_accumulation_steps": 2}
    run = load_script("flags.py").run_arguments(Namespace(**training, dataset_name=None), num_processes=2)
    hub = NO_PUSH | {"license": "mit"}
    assert publish(vae, tmp_path / "vae", **hub, **run, train_data="photos, 32x32", sample_image=picture) is None
    card = (tmp_path / "vae/README.md").read_text()
    assert "accelerate launch --num_processes 2 train_dvae.py --train_data_dir 'my photos'\n" in card
    assert "somebody" not in card and metadata(card)["license"] == "mit" and "datasets" not in metadata(card)
    assert "4,000" in card and "64" in card and "photos, 32x32" in card
    assert (tmp_path / "vae/samples.png").read_bytes() == picture.read_bytes() and "(samples.png)" in card
    monkeypatch.chdir(tmp_path / "vae")
    scope = {}
    exec(first_snippet(card), scope)  # without a name on the Hub it loads from its folder
    assert scope["decoded"].shape == (1, 3, 32, 32)

    stage = {"built_on": [tmp_path / "vae", "user/grains"], "commands": ["last"]}
    with pytest.warns(UserWarning, match="none.png"):
        publish(vae, tmp_path / "vae", **hub, **stage, dataset_name="user/photos", sample_image="none.png")
    card = (tmp_path / "vae/README.md").read_text()
    assert "![" not in card and metadata(card)["datasets"] == ["user/photos"]
    assert re.search(r"train_dvae.py .*\nlast\n```", card), "the commands of all stages, in their order"


def test_publish_pushes_the_folder_of_a_run(make_grain_model, run, tmp_path):
    make_grain_model().save_pretrained(tmp_path / "grain/grain_model")
    DDIMScheduler().save_pretrained(tmp_path / "grain/grain_scheduler")
    (tmp_path / "grain/checkpoint-5").mkdir()
    repositories, uploads = {}, Uploads(tmp_path / "hub")
    with serve_hub(repositories, uploads) as endpoint:
        output = run(
            f"""
from diffusers_d2it import D2iTGrainModel
from diffusers_d2it.hub import publish
hub = dict(push_to_hub=True, hub_model_id="user/grain", hub_private_repo=True, license=None)
model = D2iTGrainModel.from_pretrained({str(tmp_path / "grain")!r}, subfolder="grain_model")
print(publish(model, {str(tmp_path / "grain")!r}, **hub, train_steps=4000, subfolder="grain_model"))
""",
            endpoint,
        )
        assert f"{endpoint}/user/grain/commit/" in output and "checkpoint-5/" in output
        files = ["README.md", "grain_model/config.json", "grain_model/diffusion_pytorch_model.safetensors"]
        assert files_of(repositories["user/grain"]) == [*files, "grain_scheduler/scheduler_config.json"]
        assert uploads.visibility == {"user/grain": "private"}
        assert uploads.commits[0][2] == "Upload D2iTGrainModel after 4000 steps"
        snippet = first_snippet((repositories["user/grain"] / "README.md").read_text())
        run(f"{snippet}\nassert grain_map.shape == (1, 4, 4)", endpoint)


def test_snippets_of_all_kinds_run(make_pipeline, make_vae, make_grain_model, make_content_model, run, tmp_path):
    made = {
        "unconditional": (make_pipeline(num_classes=None), "output.images[0].size == (32, 32)"),
        "nameless": (make_pipeline(id2label=None), "output.images[0].size == (32, 32)"),
        "sparse": (make_pipeline(id2label={7: "only this"}), "output.images[0].size == (32, 32)"),
        "mapless": (make_pipeline(grain_model=None, grain_scheduler=None), "output.images[0].size == (32, 32)"),
        "three": (make_pipeline(num_grains=3), "output.grain_maps.shape == (1, 4, 4)"),
        "vae": (make_vae(), "decoded.shape == images.shape"),
        "uncalibrated": (make_vae(calibration=None), "decoded.shape == images.shape"),
        "grain": (make_grain_model(), "grain_map.shape == (1, 4, 4)"),
        "unconditional-grain": (make_grain_model(num_classes=None), "grain_map.shape == (1, 4, 4)"),
        "content": (make_content_model(), "noise.shape == latents.shape"),
        "unconditional-content": (make_content_model(num_classes=None), "noise.shape == latents.shape"),
    }
    code, repositories = "", {}
    for name, (model, check) in made.items():
        model.save_pretrained(tmp_path / name, variant="fp16")
        card = str(make_model_card(model, repo_id=f"user/{name}", license=None, variant="fp16"))
        repositories[f"user/{name}"] = tmp_path / name
        code += f"{first_snippet(card)}\nassert {check}, {name!r}\n"
    with serve_hub(repositories) as endpoint:
        run(code, endpoint)
