"""A run whose process is killed, and that goes on from its last checkpoint, ends with the same bytes as one that ran through."""
import ctypes
import json
import os
import shutil
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
result = fit(config, resume="auto" if resume else None)
print(result.steps)
"""


def start(folder, model, data, kill_at=0, resume=False, code=RUN, **kwargs):
    return subprocess.run([sys.executable, "-c", code, str(folder), model, str(data), str(kill_at), "resume" if resume else "new"],
                          capture_output=True, text=True, timeout=3000, **kwargs)


def log_of(folder, file, *times):
    """The lines of a log without the columns that a clock has filled."""
    header, *lines = (folder/file).read_text().splitlines()
    return [{k: v for k, v in zip(header.split(","), line.split(",")) if k not in times} for line in lines]


def assert_same_to_the_byte(one, other):
    """Weights, what resuming needs, and logs; no step twice, none missing."""
    a, b = find_checkpoint(one), find_checkpoint(other)
    assert a.name == b.name == "step-00000016"                             # 2 epochs of 32 training pictures, 4 at a time
    assert (a/"model.safetensors").read_bytes() == (b/"model.safetensors").read_bytes()
    left, right = (torch.load(c/"training.pt", weights_only=True) for c in (a, b))
    assert all(torch.equal(left["model"][k], right["model"][k]) for k in left["model"])
    for k, state in left["optimizer"]["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(right["optimizer"]["state"][k][name])) for name, v in state.items())
    for log in (("steps.csv", "images_per_second"), ("metrics.csv", "images_per_second", "waiting_for_data", "seconds")):
        assert log_of(one, *log) == log_of(other, *log)


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
    assert whole.stdout.split() == ["16"]

    killed = start(tmp_path/"parts", model, pictures, kill_at=11)          # in the second epoch, after the checkpoint of step 9
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert find_checkpoint(tmp_path/"parts").name == "step-00000009"

    resumed = start(tmp_path/"parts", model, pictures, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_to_the_byte(tmp_path/"whole", tmp_path/"parts")


KILLS = RUN.split("if kill_at")[0].replace("every_n_steps=3", "every_n_steps=1") + """
import json, random, time, traceback
from pathlib import Path
from laser.checkpoints import check_digests, read_index
torch.set_num_threads(1)
rng, place, kills, within, failures, worst = random.Random(model), Path(folder), 0, 0, [], 0.0

def life(run, seconds, in_checkpoint=False):
    # of one process, killed after so many seconds, or while it writes a checkpoint; whether it came to its end
    global kills, within
    pid, start, ended = os.fork(), time.monotonic(), 0
    if not pid:
        config.output_dir = str(run)
        try: fit(config, resume="auto")
        except BaseException as e: (place/"error").write_text(traceback.format_exc())
        os._exit(0)
    while not ended and time.monotonic() - start < seconds:
        ended = os.waitpid(pid, os.WNOHANG)[0]
        if in_checkpoint and time.monotonic() - start > seconds/2 and list(run.glob("checkpoints/.*.writing")): break
        time.sleep(0.0005)
    if not ended:
        os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
        kills, within = kills + 1, within + bool(list(run.glob("checkpoints/.*")))
    if (place/"error").exists(): failures.append((place/"error").read_text()), (place/"error").unlink()
    if (run/"checkpoints"/"checkpoints.json").exists() and (last := read_index(run/"checkpoints")["last"]):
        check_digests(run/"checkpoints"/last, "model.safetensors", "training.pt", "run.json")  # the last good checkpoint is whole
    return ended

start = time.monotonic()
life(place/"whole", 1e9)
usual, runs = time.monotonic() - start, 0
while kills < kill_at and not failures:
    runs += 1
    while not life(place/f"run-{runs}", rng.uniform(0, 1.2*usual) if kills < kill_at else 1e9, kills % 2) and not failures: pass
print(json.dumps(dict(kills=kills, within=within, runs=runs, failures=failures, usual=usual)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.parametrize("model", ["vqvae", "dlvae"])
def test_killed_at_any_moment(model, pictures, record, tmp_path):
    """The same command again and again, until the run is finished: every second kill falls into a checkpoint, if it can."""
    began = time.monotonic()
    done = start(tmp_path, model, pictures, kill_at=15 if record.long else 2, code=KILLS)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    record.add(result["kills"], len(result["failures"]), time.monotonic() - began)
    assert not result["failures"] and result["kills"] >= (15 if record.long else 2), result
    assert result["within"] or not record.long
    for i in range(result["runs"]): assert_same_to_the_byte(tmp_path/"whole", tmp_path/f"run-{i + 1}")


def test_a_folder_deleted_under_way(pictures, tmp_path):
    """An error that says so; the same command then starts anew, or goes on, to the same end."""
    slow = RUN.replace("max_epochs=2", "max_epochs=500")
    process = subprocess.Popen([sys.executable, "-c", slow, str(tmp_path/"run"), "vqvae", str(pictures), "0", "resume"],
                               stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 600
        while not (tmp_path/"run"/"metrics.csv").exists() and time.time() < deadline and process.poll() is None: time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
        (tmp_path/"run").rename(tmp_path/"moved")                              # at once, as a deletion is not
        err = process.communicate(timeout=600)[1]
    finally: process.kill()
    assert process.returncode != 0 and str(tmp_path/"run") in err and "is gone, deleted or moved" in err, err
    shutil.rmtree(tmp_path/"moved"), shutil.rmtree(tmp_path/"run", ignore_errors=True)
    for run in ("run", "whole"):
        again = start(tmp_path/run, "vqvae", pictures, resume=True)
        assert again.returncode == 0, again.stderr
    assert_same_to_the_byte(tmp_path/"whole", tmp_path/"run")


GROWTH = """
import laser.training
end_epoch = laser.training.end_epoch
def watched(*args):
    end_epoch(*args)
    pages = int(open("/proc/self/statm").read().split()[1])
    print("EPOCH", time.monotonic(), pages*os.sysconf("SC_PAGE_SIZE")/2**20, len(os.listdir("/proc/self/fd")))
laser.training.end_epoch = watched
import time
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
@pytest.mark.parametrize("model", ["vqvae", "dlvae"])
def test_many_epochs_without_growth(model, pictures, record, tmp_path):
    """Of memory or of open files, from the second quarter of the run to the last."""
    epochs = 100 if record.long else 8
    code = RUN.replace("max_epochs=2", f"max_epochs={epochs}").replace("torch.set_num", GROWTH + "torch.set_num")
    done = start(tmp_path/"run", model, pictures, code=code)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("EPOCH")]
    when, megabytes, files = torch.tensor([[float(v) for v in line] for line in lines], dtype=torch.float64).T
    record.add(len(when), 0, float(when.diff().max()))
    second, last = slice(epochs//4, epochs//2), slice(3*epochs//4, epochs)
    assert len(when) == epochs and files[last].max() <= files[second].max()
    assert megabytes[last].median() - megabytes[second].median() < 10


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


def as_anyone():
    """The superuser may write anywhere: a process started with this may not."""
    if os.geteuid() == 0: ctypes.CDLL(None).prctl(24, 1)                   # Linux: PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders are locked in other ways")
def test_no_permission_at_a_checkpoint(pictures, tmp_path):
    (tmp_path/"locked").mkdir(mode=0o555)
    result = start(tmp_path/"locked"/"run", "vqvae", pictures, preexec_fn=as_anyone)
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
