"""The script behind the evidence, from pictures to curves, costs and a model that ships, on a small folder of CelebA's layout."""
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from laser import evidence
from laser.models import load_pretrained


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """40 noisy pictures: 24 to train, 8 to validate, 8 to test."""
    root, draws = tmp_path/"celeba", np.random.default_rng(0)
    (root/"img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 41)]
    for name in names:
        coarse = Image.fromarray(draws.integers(0, 256, (14, 11, 3), dtype=np.uint8))
        coarse.resize((178, 218), Image.Resampling.BICUBIC).save(root/"img_align_celeba"/name)
    splits = [0]*24 + [1]*8 + [2]*8
    (root/"list_eval_partition.txt").write_text("".join(f"{name} {split}\n" for name, split in zip(names, splits)), encoding="utf-8")
    monkeypatch.setenv("CELEBA_DIR", str(root))
    return root


@pytest.mark.slow
def test_everything_is_repeated_in_order_and_nothing_twice(celeba, tmp_path, monkeypatch, capsys):
    for name, few in dict(CODECS={"jpeg": evidence.CODECS["jpeg"][:3]}, CURVES={name: evidence.CURVES[name] for name in ("vq", "dl")},
                          CONTEXT={}, CEILINGS={"no bottleneck": "ae"}, SEEDS={"vq": (0, 1)}, SHIPPED={"dl": evidence.SHIPPED["dl"]}).items():
        monkeypatch.setattr(evidence, name, few)
    runs, results = tmp_path/"runs", tmp_path/"results"/"curves"
    evidence.repeat_all(runs, results)
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": measured")]
    assert said == [f"{name}, seed {seed}: measured" for name, seed in (("jpeg", 0), ("vq", 0), ("dl", 0), ("no bottleneck", 0), ("vq", 1))]
    assert {path.name for path in results.iterdir()} == {"jpeg-s0.csv.gz", "vq-s0.csv.gz", "dl-s0.csv.gz", "no-bottleneck-s0.csv.gz", "vq-s1.csv.gz"}
    tables = {path.name: pd.read_csv(path) for path in results.iterdir()}
    for name, points in (("vq-s0.csv.gz", 3), ("dl-s0.csv.gz", 6), ("jpeg-s0.csv.gz", 3)):
        assert tables[name].groupby("point")["image"].nunique().tolist() == [8]*points and (tables[name]["bpp"] > 0).all()
    assert not tables["vq-s0.csv.gz"].equals(tables["vq-s1.csv.gz"])
    costs = pd.read_csv(results.parent/"costs.csv").set_index("curve")
    assert list(costs.index) == ["vq", "dl"] and costs.loc["vq", "candidates"] == 512 and (costs["search, ms"] > 0).all()
    shipped = runs/"shipped"/"dl-celeba-128"
    about, model = json.loads((shipped/"results.json").read_text(encoding="utf-8")), load_pretrained(shipped)
    assert about["test_images"] == 8 and [r["rate_weight"] for r in about["results"]] == evidence.SHIPPED["dl"]
    bits = [r["bits_per_pixel"] for r in about["results"]]
    assert bits == sorted(bits, reverse=True) and model.bottleneck.rate_points.tolist() == pytest.approx(sorted(evidence.SHIPPED["dl"]))
    before = {path: path.stat().st_mtime_ns for folder in (runs, results) for path in folder.rglob("*")}
    evidence.repeat_all(runs, results)
    assert before == {path: path.stat().st_mtime_ns for path in before} and not capsys.readouterr().out
