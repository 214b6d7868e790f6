# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Flags from files, as people and their editors write them, and paths as they mean them."""

from pathlib import Path

import pytest
from script_runs import EXAMPLES, load_script


REQUIRED = "--vae v --latent_cache c --output_dir o".split()
LINES = ["--max_train_steps=7", "--learning_rate", "0.5", "--preset=my grain.json"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """`recipe(data)`: a file of flags, read from another folder."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "my grain.json").write_text("{}")

    def read(data: bytes | str):
        path = tmp_path / "recipes" / "grain.txt"
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return load_script("train_grain.py").parse_args(["@../recipes/grain.txt", *REQUIRED])

    return read


@pytest.mark.parametrize(
    "data",
    [
        "\n".join(LINES),
        "\r\n".join(LINES) + "\r\n",
        "\n".join(LINES).encode("utf-8-sig"),
        "# mine\n\n" + "\n  \n".join(LINES) + "\n\n# end",
        "\n".join(f"  {line}\t" for line in LINES),
        "--max_train_steps 7\n--learning_rate   0.5\n--preset 'my grain.json'",
        "--max_train_steps 7  # enough\n--learning_rate=0.5\n--preset\nmy grain.json",
        "--max_train_steps 7 \\\n--learning_rate 0.5 \\\n--preset 'my grain.json'",
    ],
    ids=["plain", "Windows", "mark of the encoding", "comments", "spaces", "flags with values", "mixed", "a command"],
)
def test_a_recipe_is_read_whoever_wrote_it(recipe, data):
    args = recipe(data)
    assert (args.max_train_steps, args.learning_rate) == (7, 0.5)
    assert args.preset == str(Path("../recipes/my grain.json"))


def test_a_file_where_one_stands_comes_before_one_beside_the_recipe(recipe):
    Path("my grain.json").write_text("{}")
    assert recipe("--max_train_steps=7\n--preset=my grain.json").preset == "my grain.json"


@pytest.mark.parametrize("path", ["set#1", "o'neil/photos"])
def test_signs_in_a_path_belong_to_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = load_script("train_grain.py")
    Path("flags.txt").write_text(f"--max_train_steps 7\n--vae {path}")
    assert script.parse_args([*REQUIRED, "@flags.txt"]).vae == path


def test_what_is_no_file_stays_as_it_is_written(recipe):
    assert recipe("--max_train_steps=7\n--preset=grain-s").preset == "grain-s"


@pytest.mark.parametrize("data", [b"\xff\xfe-\x00-\x00", b"--max_train_steps=\xe9"])
def test_a_recipe_in_another_encoding_is_named(recipe, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        recipe(data)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "@../recipes/grain.txt" in said


@pytest.mark.parametrize("script", [EXAMPLES / "configs" / name for name in ("two-cores-64", "tiny-imagenet-20-64")])
def test_the_recipes_find_their_models_from_any_folder(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = load_script("train_dvae.py").parse_args(
        [f"@{script}/dvae.txt", "--train_data_dir", "p", "--output_dir", "o"]
    )
    assert Path(args.preset).is_file()


@pytest.mark.parametrize("words", [["--output_dir=~/runs"], ["--output_dir", "~/runs"], ["@flags.txt"]])
def test_the_home_folder_is_meant_wherever_it_is_written(words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("flags.txt").write_text("--output_dir=~/runs\n")
    args = load_script("train_grain.py").parse_args([*REQUIRED, *words, "--max_train_steps", "1"])
    assert args.output_dir == str(tmp_path / "runs")
    kept = ["--output_dir=o~", "--vae=a~/b", "--latent_cache=~c~/x"]
    args = load_script("train_grain.py").parse_args([*kept, "--max_train_steps", "1"])
    assert (args.output_dir, args.vae, args.latent_cache) == ("o~", "a~/b", "~c~/x")
