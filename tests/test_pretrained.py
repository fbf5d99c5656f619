"""The models that come with the package: what they reach, how large they are, and that commands use them where none is named."""
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from laser.data import pixels_of, sample_images, sample_photograph
from laser.metrics import psnr
from laser.models import SHIPPED, list_pretrained, load_pretrained


@pytest.mark.parametrize("name", list_pretrained())
def test_shipped_model_reaches_what_its_card_says(name):
    folder, model = SHIPPED/name, load_pretrained(name)
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    most = 3_500_000 if name.startswith("gsvq") else 2_000_000       # bytes; its tables, one for the gain of each atom, take half of it
    assert {"README.md", "LICENSE", "results.json", "model.safetensors"} <= files.keys() and files["model.safetensors"] <= most
    images, expected = sample_images(128), json.loads((folder/"results.json").read_text())["sample"]
    codes = model.encode(images)
    assert abs(float(psnr(model.decode(codes), images).mean()) - expected["psnr"]) < 0.05
    streams = model.compress(images)
    assert abs(sum(map(len, streams)) - expected["bytes"]) < 0.02*expected["bytes"]
    assert torch.equal(model.decompress(streams), model.decode(codes))
    weights = [r["rate_weight"] for r in list_pretrained()[name]]
    sizes = [sum(map(len, model.compress(images, weight))) for weight in sorted(weights)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)     # one dial


def command(name, *words, cwd):
    code = f"import sys; sys.argv[0] = 'laser_{name}'; from laser.cli import {name}; {name}()"
    environment = {k: v for k, v in os.environ.items() if k != "CELEBA_DIR"} | dict(HF_HUB_OFFLINE="1")
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_commands_without_a_model_use_the_shipped_ones(tmp_path):
    photo = tmp_path/"my photo.png"
    Image.fromarray(pixels_of(sample_photograph("coffee.png").resize((150, 100))).permute(1, 2, 0).numpy()).save(photo)
    out = command("reconstruct", "my photo.png", "output_dir=out", cwd=tmp_path)
    assert out.count("PSNR") == len(list_pretrained()) and (tmp_path/"out"/"sheet.png").is_file()
    command("compress", "my photo.png", cwd=tmp_path)
    assert 8*(tmp_path/"my photo.laser").stat().st_size < 2*150*100
    command("decompress", "my photo.laser", "to=back", cwd=tmp_path)
    assert Image.open(tmp_path/"back"/"my photo.png").size == (150, 100)
    assert all(name in command("reconstruct", "--help", cwd=tmp_path) for name in list_pretrained())


def test_a_shipped_model_is_evaluated_by_name(tmp_path):
    command("evaluate", *list_pretrained(), "data=sample", "data.image_size=64", "limit=4", "output_dir=out", cwd=tmp_path)
    rows = json.loads((tmp_path/"out"/"results.json").read_text())["results"]
    assert [row["model"] for row in rows] == list(list_pretrained())
    assert all(row["parameters"] > 1e5 and row["images_per_second"] > 0 and row["bits_per_pixel_coded"] > 0 for row in rows)
