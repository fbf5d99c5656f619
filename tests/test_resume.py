"""A run whose process is killed, and that goes on from its last checkpoint, ends with the same bytes as one that ran through."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from laser.checkpoints import find_checkpoint

RUN = """
import os, signal, sys
import torch
from laser.training import *
folder, model, data, kill_at, resume = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "resume"
sizes = dict(num_hiddens=8, num_residual_hiddens=4, embedding_dim=8, num_embeddings=16)
config = Config(
    model=model_config(model)(**sizes, **(dict(sparsity_level=2) if model == "dlvae" else {})),
    data=DataConfig(dataset="folder", root=data, image_size=16, batch_size=4, num_workers=2, limit_val=4),
    train=TrainConfig(max_epochs=2, warmup_steps=3, ema_decay=0.9, progress=False, accelerator="cpu", log_every_n_steps=1, pictures=0),
    checkpoint=CheckpointConfig(every_n_steps=3), output_dir=folder)
if kill_at:  # die, without a chance to clean up, right before that step
    import laser.training
    real = laser.training.learning_rate_at
    def die(step, *rest):
        if step == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        return real(step, *rest)
    laser.training.learning_rate_at = die
torch.set_num_threads(1)
result = fit(config, resume=folder if resume else None)
print(result.steps)
"""


def start(folder, model, data, kill_at=0, resume=False, **kwargs):
    return subprocess.run([sys.executable, "-c", RUN, str(folder), model, str(data), str(kill_at), "resume" if resume else "new"],
                          capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """32 small pictures to train on, 4 to validate and 4 to test: smooth noise, each of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    parts = ["train"]*32 + ["val"]*4 + ["test"]*4
    for part in set(parts): (folder/part).mkdir()
    for i, part in enumerate(parts):
        torch.manual_seed(1000 + i)
        coarse = (torch.rand(6, 6, 3)*255).byte().numpy()
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(folder/part/f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("model", ["vqvae", "dlvae"])
def test_killed_and_resumed_is_the_same_to_the_byte(model, pictures, tmp_path):
    whole = start(tmp_path/"whole", model, pictures)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.split() == ["16"]                                  # 2 epochs of 32 training pictures, 4 at a time

    killed = start(tmp_path/"parts", model, pictures, kill_at=11)          # in the second epoch, after the checkpoint of step 9
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert find_checkpoint(tmp_path/"parts").name == "step-00000009"

    resumed = start(tmp_path/"parts", model, pictures, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    a, b = find_checkpoint(tmp_path/"whole"), find_checkpoint(tmp_path/"parts")
    assert a.name == b.name == "step-00000016"
    assert (a/"model.safetensors").read_bytes() == (b/"model.safetensors").read_bytes()
    left, right = (torch.load(c/"training.pt", weights_only=True) for c in (a, b))
    assert all(torch.equal(left["model"][k], right["model"][k]) for k in left["model"])
    for k, state in left["optimizer"]["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(right["optimizer"]["state"][k][name])) for name, v in state.items())

    for file, times in (("steps.csv", {"images_per_second"}), ("metrics.csv", {"images_per_second", "waiting_for_data", "seconds"})):
        rows = []
        for run in ("whole", "parts"):
            header, *lines = (tmp_path/run/file).read_text().splitlines()
            rows.append([{k: v for k, v in zip(header.split(","), line.split(",")) if k not in times} for line in lines])
        assert rows[0] == rows[1]                                          # no step twice, none missing


def test_ctrl_c_saves_and_says_how_to_go_on(pictures, tmp_path):
    slow = RUN.replace("max_epochs=2", "max_epochs=500")
    process = subprocess.Popen([sys.executable, "-c", slow, str(tmp_path/"run"), "vqvae", str(pictures), "0", "new"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 120
    while not (tmp_path/"run"/"metrics.csv").exists() and time.time() < deadline and process.poll() is None: time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)                                  # as a terminal does: loader processes get it too
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Interrupted at step" in out and f"laser_train train.resume={tmp_path/'run'}" in out
    step = json.loads((tmp_path/"run"/"checkpoints"/"checkpoints.json").read_text())["last"]
    assert int(step.split("-")[1]) == int(out.split("Interrupted at step ")[1].split(" ")[0].replace(",", ""))
    state = torch.load(Path(tmp_path/"run"/"checkpoints"/step/"training.pt"), weights_only=True)
    assert state["position"]["step"] == int(step.split("-")[1])


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="the superuser may write anywhere")
def test_no_permission_at_a_checkpoint(pictures, tmp_path):
    (tmp_path/"locked").mkdir(mode=0o555)
    result = start(tmp_path/"locked"/"run", "vqvae", pictures)
    assert result.returncode != 0 and "Permission denied" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_keeps_the_last_good_checkpoint(pictures, tmp_path):
    """The disk fills up between the first and the second checkpoint: a file in the way of every write stands for it."""
    full = RUN.replace("torch.set_num_threads(1)", "torch.set_num_threads(1)\nreal_save = torch.save\ndef save(state, path):\n"
                       "    if state['position']['step'] > 3: path = '/dev/full'\n    with open(path, 'wb', buffering=0) as f: real_save(state, f)\ntorch.save = save\n")
    result = subprocess.run([sys.executable, "-c", full, str(tmp_path/"run"), "vqvae", str(pictures), "0", "new"], capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "CheckpointError" in result.stderr and "the last good checkpoint is" in result.stderr, result.stderr
    assert find_checkpoint(tmp_path/"run").name == "step-00000003"
    assert sorted(p.name for p in (tmp_path/"run"/"checkpoints").iterdir() if p.is_dir() and not p.is_symlink()) == ["step-00000003"]


def test_sigterm_to_all_processes_saves(pictures, tmp_path):
    """What a scheduler sends reaches the loader processes too."""
    slow = RUN.replace("max_epochs=2", "max_epochs=500")
    process = subprocess.Popen([sys.executable, "-c", slow, str(tmp_path/"run"), "vqvae", str(pictures), "0", "new"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 120
    while not (tmp_path/"run"/"metrics.csv").exists() and time.time() < deadline and process.poll() is None: time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Interrupted at step" in out, err


def test_the_second_run_of_a_folder_is_refused(pictures, tmp_path):
    slow = RUN.replace("max_epochs=2", "max_epochs=500")
    first = subprocess.Popen([sys.executable, "-c", slow, str(tmp_path/"run"), "vqvae", str(pictures), "0", "new"], start_new_session=True)
    try:
        deadline = time.time() + 120
        while not (tmp_path/"run"/"steps.csv").exists() and time.time() < deadline and first.poll() is None: time.sleep(0.05)
        second = start(tmp_path/"run", "vqvae", pictures)
        assert second.returncode != 0 and f"in use by process {first.pid}" in second.stderr, second.stderr
    finally:
        first.kill()
        first.wait()
    third = start(tmp_path/"run", "vqvae", pictures, resume=(tmp_path/"run"/"checkpoints"/"checkpoints.json").exists())
    assert third.returncode == 0, third.stderr                             # the claim of a dead process holds nobody up
