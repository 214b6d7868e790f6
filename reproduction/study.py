# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The runs behind every claim: trained once each, resumed where they were interrupted, scored from their checkpoints.

    python reproduction/study.py --data tiny-imagenet-20 --work_dir runs/reproduction --jobs 2

trains everything. The scripts of the claims (tables.py ...) train what they need and is not there yet. All that is
written lies in the work folder: latent cache, classifier, runs/<arm>-<seed>, scores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path

import torch
from arms import ARMS, CHUNKED_ARMS, PRESETS, ChunkedArm, find_arm, model_config
from step_costs import measure_step_costs

from diffusers_d2it import DynamicAutoencoderKL, bundled_checkpoint
from diffusers_d2it.data import LatentCache
from diffusers_d2it.evaluation.features import weights_digest
from diffusers_d2it.files import lock, write_json_durably
from diffusers_d2it.words import differences


HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
ADAPTIVE = ("d2it", "dc-dit", "dit", "dit-1")  # arms of adaptive.py
AUTOENCODER = Path(bundled_checkpoint()) / "vae"  # of all arms


class Study:
    """All runs of one preset on one data set, by the flags of `make_parser`."""

    def __init__(self, args: argparse.Namespace):
        self.data = args.data
        self.preset = PRESETS[args.preset]
        self.work_dir = args.work_dir
        self.device = torch.device(args.device)
        self.jobs = args.jobs
        self.features, self.weights = args.features, args.weights
        self._check_work_dir(args.preset)
        torch.set_num_threads(1 if self.device.type == "cpu" else torch.get_num_threads())

    def _check_work_dir(self, preset: str) -> None:
        """Note what the study is of in its work folder, and refuse a folder of another one."""
        arms = {name: asdict(arm) for name, arm in (ARMS | CHUNKED_ARMS).items()}
        identity = {"preset": {"name": preset} | asdict(self.preset), "arms": arms, "data": str(self.data)}
        identity |= {"vae": weights_digest(DynamicAutoencoderKL.from_pretrained(AUTOENCODER))}
        identity |= {"device": self.device.type, "features": self.features, "weights": self.weights}
        identity = json.loads(json.dumps(identity))
        path = self.work_dir / "study.json"
        if not path.exists():
            write_json(path, identity)
        found = json.loads(path.read_text())
        wrong = differences(found, identity)
        if wrong:
            raise ValueError(f"`work_dir` {self.work_dir} holds another study: {'; '.join(wrong)}.")

    @cached_property
    def vae_folder(self) -> Path:
        """The autoencoder, its thresholds counted on the training images at the resolution of the study."""
        folder, aside = self.work_dir / "vae", self.work_dir / "vae.part"
        if not folder.exists():
            vae = DynamicAutoencoderKL.from_pretrained(AUTOENCODER)
            vae.register_to_config(sample_size=self.preset.resolution)
            vae.save_pretrained(aside)
            self._call(EXAMPLES / "calibrate_dvae.py", *self._data_flags, "--vae", aside)
            aside.rename(folder)
        return folder

    @cached_property
    def vae(self) -> DynamicAutoencoderKL:
        """The autoencoder of all arms."""
        return DynamicAutoencoderKL.from_pretrained(self.vae_folder).requires_grad_(False).eval().to(self.device)

    @cached_property
    def latent_cache(self) -> Path:
        """The latent cache of the training images."""
        folder = self.work_dir / "cache"
        flags = ["--num_classes", 1000, "--vae", self.vae_folder, "--output_dir", folder]
        self._call(EXAMPLES / "cache_latents.py", *self._data_flags, *flags)
        return folder

    @cache  # noqa: B019  lives as long as the script
    def grain_folder(self, fine_ratio: float) -> Path:
        """The grain model that draws the predicted maps of a ratio, trained on the maps of the training images."""
        folder, preset = self.work_dir / f"grain-{fine_ratio:g}", self.preset
        if not (folder / "grain_scheduler").exists():  # which is written last
            config = EXAMPLES / "configs" / preset.grain_preset
            flags = ["--preset", config if config.is_file() else preset.grain_preset, "--output_dir", folder]
            flags += ["--max_train_steps", preset.grain_steps]
            flags += ["--lr_scheduler", "cosine", "--fine_ratio", fine_ratio, *self._training_flags(folder, seed=0)]
            self._call(EXAMPLES / "train_grain.py", *flags)
        return folder

    @property
    def _data_flags(self) -> list:
        return ["--dataset_name", self.data, "--resolution", self.preset.resolution]

    def _training_flags(self, folder: Path, seed: int) -> list:
        """What trainings of both models have in common, and whether there is a checkpoint to go on from."""
        preset = self.preset
        if folder.exists() and not any(folder.glob("checkpoint-*")):
            shutil.rmtree(folder)  # of a run that was interrupted before there was anything to continue
        flags = ["--latent_cache", self.latent_cache, "--vae", self.vae_folder, "--resolution", preset.resolution]
        flags += ["--train_batch_size", preset.batch_size, "--learning_rate", preset.learning_rate]
        flags += ["--lr_warmup_steps", preset.warmup, "--ema_decay", preset.ema_decay]
        flags += ["--mixed_precision", preset.mixed_precision, "--report_to", "none", "--seed", seed]
        flags += ["--checkpointing_steps", self._steps_between_checkpoints]
        return flags + (["--resume_from_checkpoint", "latest"] if folder.exists() else [])

    @cached_property
    def _step_costs(self) -> dict[str, dict[str, float]]:
        """What a training step of every arm costs, measured once."""
        path = self.work_dir / "step_costs.json"
        if not path.exists():
            cache = LatentCache(self.latent_cache, self.vae, seed=0)
            write_json(path, measure_step_costs(cache, self.vae, self.preset, self.device))
        return json.loads(path.read_text())

    @property
    def step_seconds(self) -> dict[str, float]:
        """Seconds of a training step of every arm."""
        return self._step_costs["seconds"]

    @property
    def macs(self) -> dict[str, float]:
        """Multiply-adds of an image in a forward pass of the training of every arm."""
        return self._step_costs["macs"]

    def steps_at_equal_seconds(self, arm: str) -> int:
        """Steps that an arm takes while d2it takes those of the preset."""
        return max(1, round(self.preset.steps * self.step_seconds["d2it"] / self.step_seconds[arm]))

    def steps_at_equal_macs(self, arm: str) -> int:
        """Steps after which an arm has spent the multiply-adds that d2it spends in those of the preset."""
        return max(1, round(self.preset.steps * self.macs["d2it"] / self.macs[arm]))

    def lengths(self, arm: str) -> list[int]:
        """Steps of a training: equal ones, at equal seconds, and where it is asked for at equal multiply-adds."""
        lengths = {self.preset.steps, self.steps_at_equal_seconds(arm)}
        return sorted(lengths | ({self.steps_at_equal_macs(arm)} if arm in ADAPTIVE else set()))

    def checkpoints(self, arm: str) -> list[int]:
        """Steps after which the weights of an arm are kept: regularly, and those of its lengths."""
        every = self._steps_between_checkpoints
        return sorted({*range(every, max(self.lengths(arm)) + 1, every), *self.lengths(arm)})

    @property
    def _steps_between_checkpoints(self) -> int:
        return max(1, self.preset.steps // 4)

    def train(self, arm: str, seed: int) -> Path:
        """The folder of a trained run, with a checkpoint at each of its steps."""
        folder = self.work_dir / "runs" / f"{arm}-{seed}"
        for steps in self.lengths(arm):
            if not (folder / f"checkpoint-{steps}").exists():
                self._call(HERE / "train_arm.py", *self._flags(arm, seed, steps, folder))
        return folder

    def train_all(self, arms: list[str]) -> None:
        """Train these arms for every seed, `jobs` at a time: the first seed of all of them comes first."""
        _ = self.latent_cache, self.step_seconds, self.grain_folder(0.5)  # while nothing else runs
        for arm in arms:
            write_json(self.work_dir / f"{arm}.json", model_config(find_arm(arm), self.preset))
        runs = [(arm, seed) for seed in self.preset.seeds for arm in arms]
        if self.jobs == 1:
            for run in runs:
                self.train(*run)
            return
        with ThreadPoolExecutor(self.jobs) as pool:  # of threads that wait for processes
            list(pool.map(self.train, *zip(*runs)))

    def _flags(self, arm: str, seed: int, steps: int, folder: Path) -> list:
        ablated, config = find_arm(arm), self.work_dir / f"{arm}.json"
        flags = ["--preset", config, "--max_train_steps", steps, "--output_dir", folder]
        flags += self._training_flags(folder, seed)
        if isinstance(ablated, ChunkedArm):
            flags += ["--every_cell"] if ablated.every_cell else []
            warmup = ["--budget_warmup_steps", self.preset.warmup]
            return [*flags, "--dcdit", "--budgets", *ablated.budgets, *warmup]
        flags += ["--grain", self.grain_folder(0.5), "--fine_ratio", ablated.fine_ratio]
        flags += ["--objective", ablated.objective]
        flags += ["--without_refine_net"] if ablated.refine_share == 0 else []
        flags += [] if ablated.tied_noise else ["--independent_noise"]
        return flags + ["--grain_weights", *ablated.grain_weights]

    def _call(self, script: Path, *flags) -> None:
        """`run_script` on the device of the study."""
        cpu = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} if self.device.type == "cpu" else {}
        run_script(script, *flags, **cpu)


def run_script(script: Path, *flags, **environment: str) -> None:
    """Run a script to its end; where it fails, a RuntimeError ends with what it said last."""
    command = [sys.executable, script, *map(str, flags)]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{script.name} {' '.join(map(str, flags))}\n{result.stdout}{result.stderr[-3000:]}")


def write_json(path: Path, values: dict) -> None:
    """Write values as JSON; what is interrupted leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_durably(path, values)


def make_parser(description: str) -> argparse.ArgumentParser:
    """What every script of the study takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with splits train and validation, columns image, label")
    parser.add_argument("--work_dir", type=Path, required=True, help="cache, runs and scores are kept here")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="size of the study")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each on a CPU")
    parser.add_argument("--features", help="of examples/evaluate.py, such as inception; default: the classifier")
    parser.add_argument("--weights", help="with --features inception: file of its weights")
    return parser


def main() -> None:
    args = make_parser(__doc__).parse_args()
    with lock(args.work_dir):
        Study(args).train_all([*ARMS, *CHUNKED_ARMS])


if __name__ == "__main__":
    main()
