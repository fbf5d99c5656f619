"""The commands, as a person types them: each in a process of its own, with small sizes; what words mean, in this process."""
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from PIL import Image

from laser import cli
from laser.models import Autoencoder

SMALL = ["model.num_hiddens=8", "model.num_residual_hiddens=4", "model.embedding_dim=8", "model.num_embeddings=16",
         "data.image_size=32", "data.batch_size=8", "data.limit=16", "data.limit_val=4", "train.max_epochs=1", "train.progress=false"]


def run(command, *words, cwd, timeout=300, **env):
    """A console command; `laser_train` is the entry point `laser.cli:train`."""
    entry = command.removeprefix("laser_")
    code = f"import sys; sys.argv[0] = {command!r}; from laser.cli import {entry}; {entry}()"
    environment = {k: v for k, v in os.environ.items() if k not in ("CELEBA_DIR", "HYDRA_FULL_ERROR")} | env
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment)


def noise(path, size=(40, 50), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def typed(*words, command="train"):
    """What a command line of `laser_<command>` means, before Hydra."""
    job = dict(train=(cli.Train, (), cli.prepare_training), reconstruct=(cli.Reconstruct, ("checkpoint", "images"), None),
               evaluate=(cli.Evaluate, ("checkpoints",), None))[command]
    return cli.read_line(job[0], cli.group_choices(job[0]), list(words), *job[1:])[0].typed


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two models, trained for two steps on the built-in sample."""
    folder = tmp_path_factory.mktemp("job")
    result = run("laser_train", *SMALL, "output_dir=out", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


# --- what words mean -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["été", "图片", "my pics (1)", "a\\b.png", "a${b}.png", "lr=0.1.png", "sale_$.png", "a,b", "[x]", "null.png", "caf\udce9"])
def test_paths_are_literal_and_absolute(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = str(tmp_path/name)
    for key in ("data.root", "output_dir", "checkpoint.dirpath", "wandb.save_dir"):
        assert typed(f"{key}={name}", "data=folder")[key] == there
    os.mkdir(name)
    assert typed(f"train.resume={name}")["train.resume"] == there
    assert typed("run", name, "size=32", command="reconstruct") == {"checkpoint": str(tmp_path/"run"), "images": [there], "size": "32"}
    assert typed(name, "runs/b", command="evaluate")["checkpoints"] == [there, str(tmp_path/"runs/b")]


def test_home_is_expanded():
    assert typed("data.root=~/pics", "output_dir=~/out")["data.root"] == str(Path.home()/"pics")
    assert typed("data.root=null")["data.root"] == "null"


@settings(max_examples=200, deadline=None)
@given(strategies.text())
def test_any_text_survives_hydra_and_omegaconf(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf
    value = OverridesParser.create().parse_override(f"wandb.name={cli.quoted(text)}").value()
    arrived = OmegaConf.create(dict(a=value)).a
    assert arrived == "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@pytest.mark.parametrize("word, text", [
    ("epochs=5", "did you mean train.max_epochs=5?"), ("+epochs=5", "did you mean train.max_epochs=5?"), ("lr=1e-3", "train.learning_rate=1e-3"),
    ("batch_size=8", "data.batch_size=8"), ("train.max_epoch=2", "train.max_epochs=2"), ("--epochs=5", "train.max_epochs=5"),
    ("model=vq", "did you mean model=vqvae?"), ("model=gan", "choose one of vqvae, dlvae"), ("data=my/pictures", "data=folder data.root=my/pictures"),
    ("optimizer=sgd", "there is no key optimizer; there are plugin, output_dir, model"), ("model.sparsity=2", "model.sparsity_level=2"),
    ("vqvae", "'vqvae' is no setting"), ("data.zzz=1", "there are data.root, data.image_size"),
    ("model.omp_tolerance=1e-3", "model.rate_weight"), ("model.compute_fid=true", "laser_evaluate RUN fid=true"), ("train.val_check_interval=1", "once an epoch"), ("checkpoint.filename=x", "called after its step"),
])
def test_a_wrong_word_is_an_error_that_names_the_right_one(word, text):
    with pytest.raises(ValueError, match=re.escape(text)): typed(word)


def test_a_flag_that_hydra_has_not():
    with pytest.raises(ValueError, match="train.max_epochs=5"): typed("--epochs", "5")


def test_an_option_that_no_model_of_the_list_has():
    with pytest.raises(ValueError, match="no vqvae has this option; it belongs to dlvae"): typed("model=vqvae", "model.sparsity_level=2")
    assert typed("model=vqvae,dlvae", "model.sparsity_level=2")["model"] == "several"


@pytest.mark.parametrize("words, meaning", [
    (["model.type=dlvae", "data.data_dir=/x", "data=folder"], {"model": "dlvae", "data.root": "/x", "data": "folder"}),
    (["model.learning_rate=1e-3", "model.beta=0.8"], {"train.learning_rate": "1e-3", "train.beta": "0.8"}),
    (["train.devices=0,1"], {"train.devices": "0,1"}), (["train.devices=[0,1]"], {"train.devices": "0,1"}),
    (["train.strategy=null"], {"train.strategy": "auto"}), (["checkpoint.monitor=val/loss_epoch"], {"checkpoint.monitor": "val_loss"}),
    (["data.dataset=cifar10", "model.type=vqvae"], {"data": "cifar10", "model": "vqvae"}), (["data.root=/nowhere/x"], {"data": "folder"}),
])
def test_command_lines_of_the_original(words, meaning):
    assert typed(*words).items() >= meaning.items()


def test_what_is_typed_wins_over_the_quick_start():
    assert typed("train.max_epochs=3").items() >= {"train.max_epochs": "3", "data.image_size": "64"}.items()
    assert "data.image_size" not in typed("data=celeba")


# --- training --------------------------------------------------------------------------------------------------------

def test_training_both_models_ends_with_table_and_picture(job):
    folder, result = job
    out = folder/"out"
    rows = list(csv.DictReader(open(out/"results.csv")))
    assert [(r["model"], r["coefficients"]) for r in rows] == [("VQ-VAE", "none"), ("DL-VAE", "continuous coefficients"), ("DL-VAE", "8 bits")]
    assert [float(r["bits_per_pixel"]) for r in rows] == [4/16, 4*(4 + 32)/16, 4*(4 + 8)/16]
    for word in ("MSE", "PSNR", "SSIM", "usage", "bits/pixel", "continuous coefficients", "reconstructions.png", "built-in sample", "This will take"):
        assert word in result.stdout, result.stdout
    assert Image.open(out/"reconstructions.png").width > 300
    about = json.loads((out/"results.json").read_text())
    assert about["partition"] == "test" and about["crop"] == "32x32" and about["versions"]["torch"] and len(about["configuration"]) == 2
    assert {p.name for p in out.iterdir()} >= {"vqvae", "dlvae", "job.json", ".hydra"}
    assert not (folder/"outputs").exists()


def test_a_list_of_models_ends_in_one_table_with_bits_on_disk(tmp_path):
    small = [w for w in SMALL if "limit=16" not in w] + ["data.limit=64"]
    result = run("laser_train", "model=rvqvae,fsqvae,ae", *small, "output_dir=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(open(tmp_path/"out"/"results.csv")))
    assert [r["model"] for r in rows] == ["RVQ-VAE", "FSQ-VAE", "AE"] and (tmp_path/"out"/"reconstructions.png").is_file()
    for row in rows[:2]:                                                   # a header costs, so a stream is above the ideal
        assert 0 < float(row["bits_per_pixel_ideal"]) < float(row["bits_per_pixel_coded"]) < float(row["bits_per_pixel_ideal"]) + 0.4
    assert rows[2]["bits_per_pixel_coded"] == ""                           # continuous: no stream
    noise(tmp_path/"x.png")
    result = run("laser_reconstruct", "out", "x.png", "output_dir=rec", cwd=tmp_path)
    assert result.returncode == 0 and len(list((tmp_path/"rec").glob("x_*_reconstruction.png"))) == 3, result.stderr
    result = run("laser_compress", "out/rvqvae", "x.png", cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path/"x.laser").is_file(), result.stderr


def test_a_finished_job_can_be_resumed_and_given_more_epochs(job):
    folder, _ = job
    before = (folder/"out"/".hydra"/"config.yaml").read_text()
    result = run("laser_train", "train.resume=out", "train.max_epochs=2", "model.type=both", cwd=folder)
    assert result.returncode == 0, result.stderr
    for kind in ("vqvae", "dlvae"):
        assert [r["epoch"] for r in csv.DictReader(open(folder/"out"/kind/"metrics.csv"))] == ["1", "2"]
    assert not (folder/"outputs").exists()                                 # no second folder
    assert (folder/"out"/".hydra"/"config.yaml").read_text() == before


def test_one_command_starts_and_goes_on(tmp_path):
    for epochs in (1, 2):
        result = run("laser_train", "model=vqvae", *SMALL, f"train.max_epochs={epochs}", "train.resume=auto", "output_dir=mine", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert [r["epoch"] for r in csv.DictReader(open(tmp_path/"mine"/"metrics.csv"))] == ["1", "2"][:epochs]


def test_a_folder_with_any_name_and_evaluation_elsewhere(tmp_path):
    """A path that Hydra's grammar refuses, stored absolute; moved pictures; an explicit override equal to a default."""
    for i in range(40): noise(tmp_path/"my pics (été) ${x}"/f"{i}.png", seed=i)
    result = run("laser_train", "model=vqvae", *SMALL, "data.root=my pics (été) ${x}", "output_dir=r", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (tmp_path/"other").mkdir()
    result = run("laser_evaluate", "../r", "data.image_size=128", cwd=tmp_path/"other")
    assert result.returncode == 0 and "of 128x128" in result.stdout, result.stderr
    (tmp_path/"my pics (été) ${x}").rename(tmp_path/"moved")
    result = run("laser_evaluate", "r", cwd=tmp_path)
    assert result.returncode == 1 and "data.root=FOLDER" in result.stderr and "Traceback" not in result.stderr
    result = run("laser_evaluate", "r", "data.root=moved", cwd=tmp_path)
    assert result.returncode == 0 and "of 32x32" in result.stdout, result.stderr


PLUGIN = '''
import torch
from laser.bottleneck import Bottleneck, register

@register("mine")
class Signs(Bottleneck):
    """Each latent as the number of its largest entry; its vector is a unit vector."""
    def __init__(
        self,
        embedding_dim: int = 8,  # numbers in a latent vector
        scale: float = 1.0,  # length of a vector
    ):
        super().__init__(embedding_dim, embedding_dim)
        self.scale = scale
    def encode_signals(self, signals): return signals.argmax(1)
    def decode_signals(self, codes): return self.scale*torch.nn.functional.one_hot(codes, self.embedding_dim).float()
'''


def test_a_bottleneck_of_ones_own(tmp_path):
    (tmp_path/"my_module.py").write_text(PLUGIN)
    small = [w for w in SMALL if "num_embeddings" not in w]
    for plugin, out in (("my_module", "a"), ("./my_module.py", "b")):
        result = run("laser_train", f"plugin={plugin}", "model=mine", "model.scale=2", *small, f"output_dir={out}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert [r["model"] for r in csv.DictReader(open(tmp_path/out/"results.csv"))] == ["mine"]
    assert run("laser_evaluate", "a", "plugin=my_module", "limit=4", cwd=tmp_path).returncode == 0
    refused = run("laser_evaluate", "a", "limit=4", cwd=tmp_path)          # a saved folder never causes an import
    assert refused.returncode == 1 and "mine" in refused.stderr and "Traceback" not in refused.stderr
    assert "there is no such file" in run("laser_train", "plugin=none.py", cwd=tmp_path).stderr


# --- evaluating and reconstructing -----------------------------------------------------------------------------------

def test_evaluate_prints_one_table_and_writes_it(job):
    folder, _ = job
    result = run("laser_evaluate", "out", "out/vqvae/checkpoints/last", "limit=4", "split=val", "hydra.run.dir=table", cwd=folder)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(open(folder/"table"/"results.csv")))
    assert [r["coefficients"] for r in rows] == ["none", "continuous coefficients", "8 bits", "none"]
    assert all(float(r["images"]) == 4 for r in rows) and "PSNR of mean MSE" in result.stdout
    about = json.loads((folder/"table"/"results.json").read_text())
    assert about["partition"] == "val" and "32x32" in about["crop"] and about["model_configurations"][1]["bottleneck"] == "dl"


def test_reconstruct_writes_whole_pictures_maps_and_a_sheet(job, tmp_path):
    folder, _ = job
    noise(tmp_path/"my pictures"/"0.png", (40, 50)), noise(tmp_path/"my pictures"/"sale_$_$.png", (65, 33))
    result = run("laser_reconstruct", str(folder/"out"/"dlvae"), "my pictures", "coefficient_bits=8", "output_dir=rec", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    made = {p.name for p in (tmp_path/"rec").iterdir() if p.suffix == ".png"}
    assert made == {"0_reconstruction.png", "0_error.png", "sale_$_$_reconstruction.png", "sale_$_$_error.png", "sheet.png"}
    assert Image.open(tmp_path/"rec"/"sale_$_$_reconstruction.png").size == (65, 33)
    result = run("laser_reconstruct", str(folder/"out"), "my pictures", "whole=false", "output_dir=square", cwd=tmp_path)
    assert result.returncode == 0, result.stderr                           # every model of the run
    assert {p.name for p in (tmp_path/"square").glob("0_*")} == {f"0_{m}_{what}.png" for m in ("vq", "dl") for what in ("reconstruction", "error")}
    assert Image.open(tmp_path/"square"/"0_vq_reconstruction.png").size == (32, 32)


def test_one_bad_picture_costs_the_others_nothing(job, tmp_path):
    folder, _ = job
    (tmp_path/"pics").mkdir()
    (tmp_path/"pics"/"broken.png").write_bytes(b"no picture")
    noise(tmp_path/"pics"/"fine.png"), noise(tmp_path/"pics"/("x"*250 + ".png"), seed=1), noise(tmp_path/"lr=0.1.png", seed=2)
    noise(Path(os.fsdecode(bytes(tmp_path) + b"/pics/caf\xe9.png")), seed=3)
    result = run("laser_reconstruct", str(folder/"out"/"vqvae"), "pics", "lr=0.1.png", "output_dir=rec", cwd=tmp_path)
    assert result.returncode == 1 and "broken.png" in result.stderr and "1 of 5 pictures" in result.stderr and "Traceback" not in result.stderr
    assert len(list((tmp_path/"rec").glob("*_reconstruction.png"))) == 4 and (tmp_path/"rec"/"sheet.png").is_file()
    assert (tmp_path/"rec"/"lr=0.1_reconstruction.png").is_file()
    assert not [p for p in (tmp_path/"rec").rglob(".*") if p.name != ".hydra"]  # nothing half written


@pytest.mark.parametrize("options", [dict(bottleneck="vq"), dict(bottleneck="dl", sparsity_level=2, patch_size=2), dict(bottleneck="vq", downsampling_factor=16)])
def test_tiles_give_the_pixels_of_the_whole_picture(options):
    torch.manual_seed(0)
    model = Autoencoder(**options, num_hiddens=16, num_residual_hiddens=8, embedding_dim=8, num_embeddings=32)
    model.train()(torch.rand(2, 3, 64, 64))                                # entries that a picture uses
    x = torch.rand(1, 3, 301, 210)
    whole, tiled = cli.by_tiles(model, x, tile=10_000), cli.by_tiles(model, x, tile=64)
    assert whole.shape == x.shape and float((whole - tiled).abs().max()) < 1e-5


@pytest.mark.slow
def test_a_large_picture_takes_bounded_memory(record, tmp_path):
    """4,096 x 4,096 through the command; the picture as floats takes 200 MB."""
    Autoencoder("vq", num_hiddens=32, num_residual_hiddens=8, embedding_dim=8, num_embeddings=32).save_pretrained(tmp_path/"saved")
    noise(tmp_path/"large.png", (4096, 4096))
    code = "import sys; sys.argv[0] = 'laser_reconstruct'; from laser.cli import reconstruct; reconstruct()"
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code, "saved", "large.png", "output_dir=out"], cwd=tmp_path)
    _, status, used = os.wait4(process.pid, 0)
    record.add(1, int(status != 0), time.monotonic() - start)
    assert status == 0 and Image.open(tmp_path/"out"/"large_reconstruction.png").size == (4096, 4096)
    assert used.ru_maxrss < 2e6 * (1e3 if sys.platform == "darwin" else 1)   # 2 GB


def test_pictures_to_small_files_and_back(tmp_path):
    torch.manual_seed(0)
    model = Autoencoder("vq", num_hiddens=8, num_residual_hiddens=4, embedding_dim=8, num_embeddings=16)
    model.train()(torch.rand(2, 3, 32, 32))
    model.fit_tables(torch.rand(4, 3, 32, 32))
    model.eval().save_pretrained(tmp_path/"saved")
    noise(tmp_path/"my pics"/"a=$.png", (37, 50)), noise(tmp_path/"my pics"/"b.png", (64, 33), seed=1)
    result = run("laser_compress", "saved", "my pics", "to=small", cwd=tmp_path)
    assert result.returncode == 0 and "bits a pixel" in result.stdout, result.stderr
    result = run("laser_decompress", "saved", "small", "to=back", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path/"back"/"a=$.png").size == (37, 50)
    from laser.data import load_image
    back = load_image(tmp_path/"back"/"b.png")
    assert torch.equal((model.decompress(model.compress(load_image(tmp_path/"my pics"/"b.png")[None]))[0]*255).round(), back*255)
    before = (tmp_path/"small"/"b.laser").read_bytes()
    (tmp_path/"small"/"b.laser").write_bytes(before[:-3])
    for command, words, text in (("laser_decompress", ["saved", "small/b.laser", "to=x"], "b.laser"), ("laser_compress", ["saved", "my pics", "to=small"], "is there already"),
                                 ("laser_compress", ["saved"], "name at least one file"), ("laser_decompress", ["saved", "my pics/b.png"], "b.png")):
        result = run(command, *words, cwd=tmp_path)
        assert result.returncode == 1 and text in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not list(tmp_path.glob("x/*")) and (tmp_path/"small"/"b.laser").read_bytes() == before[:-3]
    (tmp_path/"my pics"/"broken.png").write_bytes(b"no picture")
    for command, words, bad, total in (("laser_compress", ["my pics", "to=again"], "broken.png", 3), ("laser_decompress", ["small", "to=again"], "b.laser", 2)):
        result = run(command, "saved", *words, cwd=tmp_path)               # one bad file costs the others nothing
        assert result.returncode == 1 and bad in result.stderr and f"1 of {total} files failed" in result.stderr, result.stderr
        assert f"{total - 1} file(s)" in result.stdout
    assert {p.name for p in (tmp_path/"again").iterdir()} == {"a=$.laser", "b.laser", "a=$.png"}
    for i in range(30): noise(tmp_path/"set"/f"{i}.png", (32, 32), seed=i)
    result = run("laser_encode", "saved", "data=folder", "data.root=set", "data.image_size=32", "split=all", "file=codes.safetensors", cwd=tmp_path)
    assert result.returncode == 0 and "30 images" in result.stdout, result.stderr
    assert (tmp_path/"codes.safetensors").is_file()


def test_skipped_pictures_are_counted_and_named_in_the_results(tmp_path):
    for part in ("train", "val", "test"):
        for i in range(8): noise(tmp_path/"pics"/part/f"{i}.png", (32, 32), seed=i)
        (tmp_path/"pics"/part/"bad.png").write_bytes(b"no picture")
    words = ["model=vqvae", "model.num_hiddens=8", "model.num_embeddings=8", "data=folder", "data.root=pics", "data.image_size=16", "data.batch_size=4",
             "data.num_workers=0", "data.on_error=skip", "train.max_steps=2", "train.accelerator=cpu", "output_dir=out"]
    result = run("laser_train", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run("laser_evaluate", "out", "output_dir=table", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for folder, parts in (("out", ["train", "val", "test"]), ("table", ["test"])):
        skipped = json.loads((tmp_path/folder/"results.json").read_text())["skipped"]
        assert skipped == dict(number=len(parts), names=[str(tmp_path/"pics"/part/"bad.png") for part in parts])


@pytest.mark.parametrize("command, words, first", [
    ("laser_benchmark", ["cases=3x16x4", "signals=64", "memory=false", "peers=none", "rounds=1"], "1 case(s) of 1 rounds"),
    ("laser_compare", ["num_images=1"], "[1/5] images")])
def test_the_studies_say_what_they_do_before_they_do_it(command, words, first, tmp_path):
    code = f"import sys; sys.argv[0] = {command!r}; from laser.cli import {command[6:]}; {command[6:]}()"
    with subprocess.Popen([sys.executable, "-c", code, *words, "data=sample", "output_dir=out"], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout.readline().startswith(first)
        assert process.poll() is None and not list((tmp_path/"out").glob("*.csv"))      # into a pipe too, and at once
        lines = process.stdout.readlines()
    assert process.returncode == 0 and any(line.startswith("[1/1] time of 3x16x4" if command == "laser_benchmark" else "[5/5] figures") for line in lines)


# --- mistakes, help, processes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("command, words, texts", [
    ("laser_train", ["epochs=2"], ["did you mean train.max_epochs=2"]),
    ("laser_train", ["data=celeba"], ["CELEBA_DIR", "data.root", "img_align_celeba", "list_eval_partition.txt"]),
    ("laser_train", ["model=dlvae", "data.image_size=42"], ["42", "4"]),
    ("laser_train", ["model=vqvae", "checkpoint.monitor=loss"], ["checkpoint.monitor must be one of val_loss"]),
    ("laser_train", ["train.resume=nowhere"], ["nowhere does not exist"]),
    ("laser_train", ["train.accelerator=cuda"] if not torch.cuda.is_available() else ["train.accelerator=tpu"], ["is not here; choose auto or cpu"]),
    ("laser_train", ["output_dir=/dev/null/x"], ["cannot write to /dev/null/x", "set output_dir=FOLDER"]),
    ("laser_evaluate", ["nowhere"], ["nowhere does not exist"]),
    ("laser_reconstruct", [], ["name at least one picture"]),
    ("laser_benchmark", ["cases=3x16"], ["3x16x4"]),
    ("laser_benchmark", ["data=sample", "peers=none", "model=nowhere"], ["nowhere does not exist"]),
])
def test_mistakes_get_one_clear_message(command, words, texts, tmp_path):
    result = run(command, *words, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for text in texts: assert text in result.stderr, result.stderr


def test_a_checkpoint_of_another_model_is_named(job, tmp_path):
    folder, _ = job
    result = run("laser_train", f"train.resume={folder/'out'/'vqvae'}", "model=dlvae", *SMALL[:4], cwd=tmp_path)
    assert result.returncode == 1 and "bottleneck.codebook" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["compare", "benchmark", "train", "evaluate", "reconstruct", "compress", "decompress", "encode"])
def test_help_and_configuration(command, tmp_path):
    shown = run(f"laser_{command}", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and f"laser_{command}" in shown.stdout and "output_dir" in shown.stdout, shown.stderr
    assert not list(tmp_path.iterdir())                                    # asking for help writes nothing
    for line in shown.stdout.split("meaning")[1].split("\n\n")[0].splitlines()[1:]:  # every key has its meaning
        assert re.fullmatch(r"  \S+=\S* +\S.*|  .*:", line), line
    if command != "train": return
    shown = run("laser_train", "model.type=dlvae", "data=celeba", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0 and "type: dlvae" in shown.stdout and "sparsity_level: 4" in shown.stdout and "image_size: 128" in shown.stdout
    quick = run("laser_train", "--cfg", "job", cwd=tmp_path)
    assert "type: vqvae,dlvae" in quick.stdout and "dataset: sample" in quick.stdout and "image_size: 64" in quick.stdout
    assert not list(tmp_path.iterdir())


def test_a_sweep_trains_each_value(tmp_path):
    result = run("laser_train", "-m", "model=dlvae", "model.sparsity_level=1,2", *SMALL, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    stored = [json.loads((tmp_path/"sweep"/str(i)/"results.json").read_text())["configuration"][0]["model"]["sparsity_level"] for i in range(2)]
    assert stored == [1, 2]


def test_two_processes_from_the_command(tmp_path):
    script = tmp_path/"laser_train"                                        # what pip installs: Fabric starts the second process from it
    script.write_text("import sys\nfrom laser.cli import train\nif __name__ == '__main__': sys.exit(train())\n")
    result = subprocess.run([sys.executable, str(script), *SMALL, "train.devices=2", "train.accelerator=cpu", "output_dir=out (1)"],
                            capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Best checkpoint of each model") == 1                          # the table is printed once
    assert len(list(csv.DictReader(open(tmp_path/"out (1)"/"results.csv")))) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"laser_train", "out (1)"}  # the second process leaves nothing else


def test_the_module_is_light_and_threads_do_not_spin(tmp_path):
    code = "import sys, laser.cli; print([m for m in ('torch', 'hydra', 'lightning', 'matplotlib', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    code = "import os, sys, laser.cli\ntry: laser.cli.compare()\nexcept SystemExit: print(os.environ.get('GOMP_SPINCOUNT'))"
    for setting, wanted in (({}, "10000"), (dict(GOMP_SPINCOUNT="7"), "7"), (dict(OMP_WAIT_POLICY="passive"), "None")):
        env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | setting
        result = subprocess.run([sys.executable, "-c", code, "--nothing"], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert result.stdout.strip() == wanted, result.stderr


def test_saved_models_can_be_evaluated_without_a_run(tmp_path):
    Autoencoder("vq", num_hiddens=8, num_residual_hiddens=4, embedding_dim=8, num_embeddings=16).save_pretrained(tmp_path/"a")
    result = run("laser_evaluate", "a", cwd=tmp_path)
    assert result.returncode == 1 and "choose with data=celeba" in result.stderr
    for i in range(40): noise(tmp_path/"pics"/f"{i}.png", (32, 32), seed=i)
    result = run("laser_evaluate", "a", "data=folder", "data.root=pics", "data.image_size=32", cwd=tmp_path)
    assert result.returncode == 0 and "folder pics" in result.stdout, result.stderr


# --- the README ------------------------------------------------------------------------------------------------------

README = [line.split("#")[0].strip() for line in (Path(__file__).parents[1]/"README.md").read_text(encoding="utf-8").splitlines()]
README = [line for line in README if re.match(r"laser_\w+( |$)", line)]


@pytest.mark.parametrize("line", README)
def test_every_command_line_of_the_readme_runs(line, job, tmp_path):
    """On a small folder, a small CelebA and a small run; what needs a download is only composed."""
    folder, _ = job
    command, *words = shlex.split(line)
    for i in range(40): noise(tmp_path/"my"/"pictures"/f"{i}.png", (64, 64), seed=i)
    for i in (1, 2, 162771, 182638, 182639, 182640, 182641):
        noise(tmp_path/"celeba"/"img_align_celeba"/f"{i:06d}.jpg", (178, 218), seed=i)
    (tmp_path/"outputs").mkdir()
    (tmp_path/"outputs"/"train").symlink_to(folder)
    run_name = dict(laser_benchmark="out/dlvae", laser_compress="out/vqvae", laser_decompress="out/vqvae",
                    laser_encode="out/vqvae").get(command, "out")
    noise(tmp_path/"photo.jpg", (40, 30))
    if command == "laser_decompress":
        assert run("laser_compress", "photo.jpg", cwd=tmp_path).returncode == 0
    words = [re.sub(r"DATE_TIME|RUN(_\w+)?$", run_name, w) for w in words]
    if command == "laser_train" and not any(w.startswith("train.resume") for w in words): words += [w for w in SMALL if "batch" not in w]
    if command == "laser_train": words += ["data.batch_size=2", "data.num_workers=0"] if "train.resume" not in line else []
    if command == "laser_evaluate": words += ["limit=2", "data.num_workers=0"]
    if command == "laser_benchmark": words += ["signals=64", "memory=false", "peers=none", "rounds=1", "data=sample"]
    if any(name in line for name in ("cifar10", "imagenette")): words += ["--cfg", "job"]
    result = run(command, *words, cwd=tmp_path, CELEBA_DIR=str(tmp_path/"celeba"))
    assert result.returncode == 0, result.stderr
