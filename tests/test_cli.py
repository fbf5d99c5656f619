"""The commands, as a person types them: each in a process of its own, with small sizes."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import laser.cli
from laser.models import DLVAE, VQVAE

SMALL = ["model.num_hiddens=8", "model.num_residual_hiddens=4", "model.embedding_dim=8", "model.num_embeddings=16",
         "data.image_size=32", "data.batch_size=8", "data.limit=16", "data.limit_val=4", "train.max_epochs=1", "train.progress=false"]


def run(command, *words, cwd, timeout=300, **env):
    """A console command; `laser_train` is the entry point `laser.cli:train`."""
    entry = command.removeprefix("laser_")
    code = f"import sys; sys.argv[0] = {command!r}; from laser.cli import {entry}; {entry}()"
    environment = {k: v for k, v in os.environ.items() if k not in ("CELEBA_DIR", "HYDRA_FULL_ERROR")} | env
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Both models, trained for two steps on the built-in sample."""
    folder = tmp_path_factory.mktemp("job")
    result = run("laser_train", *SMALL, "hydra.run.dir=out", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_training_both_models_ends_with_table_and_picture(job):
    folder, result = job
    out = folder/"out"
    rows = list(csv.DictReader(open(out/"results.csv")))
    assert [(r["model"], r["coefficients"]) for r in rows] == [("VQ-VAE", "none"), ("DL-VAE", "continuous coefficients"), ("DL-VAE", "8 bits")]
    assert [float(r["bits_per_pixel"]) for r in rows] == [4/16, 4*(4 + 32)/16, 4*(4 + 8)/16]
    for word in ("MSE", "PSNR", "SSIM", "usage", "bits/pixel", "continuous coefficients", "reconstructions.png", "built-in sample"):
        assert word in result.stdout, result.stdout
    assert Image.open(out/"reconstructions.png").width > 300
    about = json.loads((out/"results.json").read_text())
    assert about["partition"] == "test" and about["crop"] == "32x32" and about["versions"]["torch"] and len(about["configuration"]) == 2
    assert {p.name for p in out.iterdir()} >= {"vqvae", "dlvae", "job.json", ".hydra"}


def test_a_finished_job_can_be_resumed_and_given_more_epochs(job):
    folder, _ = job
    result = run("laser_train", "train.resume=out", "train.max_epochs=2", "model.type=both", cwd=folder)
    assert result.returncode == 0, result.stderr
    for kind in ("vqvae", "dlvae"):
        assert [r["epoch"] for r in csv.DictReader(open(folder/"out"/kind/"metrics.csv"))] == ["1", "2"]


def test_evaluate_prints_one_table_and_writes_it(job):
    folder, _ = job
    result = run("laser_evaluate", "out", "out/vqvae/checkpoints/last", "limit=4", "split=val", "hydra.run.dir=table", cwd=folder)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(open(folder/"table"/"results.csv")))
    assert [r["coefficients"] for r in rows] == ["none", "continuous coefficients", "8 bits", "none"]
    assert all(r["images"] == "4.0" for r in rows) and "PSNR of mean MSE" in result.stdout
    about = json.loads((folder/"table"/"results.json").read_text())
    assert about["partition"] == "val" and "32x32" in about["crop"] and about["model_configurations"][1]["model"] == "DLVAE"


def test_reconstruct_writes_pictures_maps_and_a_sheet(job, tmp_path):
    folder, _ = job
    pictures = tmp_path/"my pictures"
    pictures.mkdir()
    for i, size in enumerate([(40, 50), (64, 32)]): Image.effect_noise(size, 50).convert("RGB").save(pictures/f"{i}.png")
    result = run("laser_reconstruct", str(folder/"out"/"dlvae"), str(pictures), "coefficient_bits=8", "hydra.run.dir=rec", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    made = {p.name for p in (tmp_path/"rec").iterdir() if p.suffix == ".png"}
    assert made == {"0_reconstruction.png", "0_error.png", "1_reconstruction.png", "1_error.png", "sheet.png"}
    assert Image.open(tmp_path/"rec"/"0_reconstruction.png").size == (32, 32)
    (pictures/"broken.png").write_bytes(b"no picture")
    result = run("laser_reconstruct", str(folder/"out"/"dlvae"), str(pictures), "whole=true", "hydra.run.dir=rec2", cwd=tmp_path)
    assert result.returncode == 1 and "broken.png" in result.stderr and "Traceback" not in result.stderr
    assert not [p for p in (tmp_path/"rec2").rglob("*.png")]                # nothing half written


@pytest.mark.parametrize("command, words, texts", [
    ("laser_train", ["train.max_epoch=2"], ["Could not override 'train.max_epoch'", "the keys of this group are", "max_epochs"]),
    ("laser_train", ["model=gan"], ["Could not find 'model/gan'", "choose one of vqvae, dlvae, both"]),
    ("laser_train", ["data=celeba"], ["CELEBA_DIR", "data.root", "img_align_celeba", "list_eval_partition.txt"]),
    ("laser_train", ["model=dlvae", "data.image_size=42"], ["data.image_size=42 is not divisible by 4", "use 40 or 44"]),
    ("laser_train", ["model=vqvae", "checkpoint.monitor=loss"], ["checkpoint.monitor must be one of val_loss"]),
    ("laser_train", ["train.resume=nowhere"], ["nowhere does not exist"]),
    ("laser_train", ["hydra.run.dir=/dev/null/x"], ["cannot write to /dev/null/x", "set hydra.run.dir=FOLDER"]),
    ("laser_evaluate", ["nowhere"], ["nowhere does not exist"]),
    ("laser_reconstruct", [], ["name a checkpoint and at least one picture"]),
    ("laser_benchmark", ["cases=3x16"], ["3x16x4"]),
    ("laser_benchmark", ["source=sample", "peers=none", "model=nowhere"], ["nowhere does not exist"]),
])
def test_mistakes_get_one_clear_message(command, words, texts, tmp_path):
    result = run(command, *words, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for text in texts: assert text in result.stderr, result.stderr


def test_a_checkpoint_of_another_model_is_named(job, tmp_path):
    folder, _ = job
    result = run("laser_train", f"train.resume={folder/'out'/'vqvae'}", "model=dlvae", *SMALL[:4], cwd=tmp_path)
    assert result.returncode == 1 and "another model than the one configured" in result.stderr and "bottleneck.codebook" in result.stderr


@pytest.mark.parametrize("command", ["compare", "benchmark", "train", "evaluate", "reconstruct"])
def test_help_and_configuration(command, tmp_path):
    shown = run(f"laser_{command}", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and f"laser_{command}" in shown.stdout and "hydra.run.dir" in shown.stdout, shown.stderr
    assert not list(tmp_path.iterdir())                                    # asking for help writes nothing
    if command != "train": return
    shown = run("laser_train", "model.type=dlvae", "data=celeba", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0 and "type: dlvae" in shown.stdout and "sparsity_level: 4" in shown.stdout and "image_size: 128" in shown.stdout
    quick = run("laser_train", "--cfg", "job", cwd=tmp_path)
    assert "type: both" in quick.stdout and "dataset: sample" in quick.stdout


def test_a_sweep_trains_each_value(tmp_path):
    result = run("laser_train", "-m", "model=dlvae", "model.sparsity_level=1,2", *SMALL, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    stored = [json.loads((tmp_path/"sweep"/str(i)/"results.json").read_text())["configuration"][0]["model"]["sparsity_level"] for i in range(2)]
    assert stored == [1, 2]


def test_two_processes_from_the_command(tmp_path):
    script = tmp_path/"laser_train"                                        # what pip installs: Fabric starts the second process from it
    script.write_text("import sys\nfrom laser.cli import train\nif __name__ == '__main__': sys.exit(train())\n")
    result = subprocess.run([sys.executable, str(script), *SMALL, "train.devices=2", "train.accelerator=cpu", "hydra.run.dir=out"],
                            capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("bits/pixel") == 1                          # the table is printed once
    assert len(list(csv.DictReader(open(tmp_path/"out"/"results.csv")))) == 3


def test_the_module_is_light():
    code = "import sys, laser.cli; print([m for m in ('torch', 'hydra', 'lightning', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_saved_models_can_be_evaluated_without_a_run(tmp_path):
    VQVAE(num_hiddens=8, num_residual_hiddens=4, embedding_dim=8, num_embeddings=16).save_pretrained(tmp_path/"a")
    result = run("laser_evaluate", "a", cwd=tmp_path)
    assert result.returncode == 1 and "choose with data=celeba" in result.stderr
