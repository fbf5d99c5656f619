"""Files of a run, damaged or forged: an error that names the file, or the right result; nothing outside the run is touched, no pickle is run."""
import copy
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from laser.checkpoints import Checkpoints, append_row, find_checkpoint, keep_rows
from laser.data import load_image
from laser.models import load_pretrained, write_digests
from laser.training import (CheckpointConfig, Config, DataConfig, Run, TrainConfig, fit, make_fabric, model_config, restore,
                            stored_config)

ODD = (None, True, -1, 0, 2, 10**9, 10**30, 1e308, float("nan"), "", "x", "../../x", "/etc/passwd", "step-00000001/../..", "\0", "a"*10_000,
       [], {}, [[]], [1]*1000, {"x": {}})


class Evil:
    """A pickle that leaves a mark when it is loaded."""
    def __reduce__(self): return os.system, ("touch executed",)


def mutated_bytes(data, rng):
    """Flipped, cut, longer, exchanged or no bytes."""
    data, kind = bytearray(data), rng.integers(5)
    start = int(rng.integers(len(data)))
    if kind == 0: data[start] ^= 1 << int(rng.integers(8))
    elif kind == 1: data = data[:start]
    elif kind == 2: data += rng.bytes(int(rng.integers(1, 100)))
    elif kind == 3: data[start:start + 4] = rng.bytes(4)
    else: data = bytearray(data.replace(data[start:start + 1], b""))
    return bytes(data)


def mutated_tree(values, rng):
    """JSON with one value, somewhere, exchanged, gone or under another name."""
    values = copy.deepcopy(values)
    at = values
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = keys[rng.integers(len(keys))]
        if not (isinstance(at[key], (dict, list)) and len(at[key]) and rng.random() < 0.8): break
        at = at[key]
    kind = rng.integers(4) if isinstance(at, dict) else 0
    if kind < 2: at[key] = ODD[rng.integers(len(ODD))]
    else:
        value = at.pop(key)
        if kind == 3: at[str(ODD[rng.integers(len(ODD))])] = value
    return values


def mutated(name, data, rng):
    """A file's bytes with damage of a kind that such a file can have."""
    if rng.random() < 0.5 or name.endswith((".csv", ".png", ".jpg", "SUMS")): return mutated_bytes(data, rng)
    if name.endswith(".json"): return json.dumps(mutated_tree(json.loads(data), rng)).encode()
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(mutated_tree(json.loads(data[8:8 + length]), rng)).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length:]
    kind, out = rng.integers(3), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if kind == 2 else zipfile.ZIP_STORED) as new:
        for entry in old.namelist():
            part = old.read(entry)
            if entry.endswith("data.pkl"): part = mutated_bytes(part, rng) if kind else pickle.dumps(Evil())
            new.writestr(entry, part)
        if kind == 2: new.writestr("archive/data/bomb", bytes(1 << 26))
    return out.getvalue()


watched = []                                                               # the folder that may be written to, and what else happened

def look(event, args):
    """An audit hook: what Python is about to do to files."""
    if not watched: return
    folder, seen = watched
    if event in ("os.system", "subprocess.Popen", "pickle.find_class"): seen.append((event, str(args)))
    if event == "open": paths = [args[0]] if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
    elif event in ("os.rename", "shutil.rmtree", "os.mkdir", "os.symlink", "os.link", "os.truncate", "shutil.copyfile"):
        paths = [args[1]] if event in ("os.symlink", "shutil.copyfile") else [args[0]]
    elif event in ("os.remove", "os.rmdir"): paths = [args[0]] if args[-1] == -1 else []     # below a folder of shutil.rmtree otherwise
    else: return
    seen += [(event, str(p)) for p in paths if not isinstance(p, int) and not os.path.realpath(os.fsdecode(p)).startswith(str(folder) + os.sep)]

sys.addaudithook(look)


@contextmanager
def nothing_else(folder, seconds=10):
    """`with nothing_else(folder):` no writing outside, no foreign code, and an end within seconds of computing."""
    def late(*_): raise AssertionError(f"took more than {seconds} s")
    before, seen = signal.signal(signal.SIGVTALRM, late), []
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    watched[:] = folder.resolve(), seen
    try: yield
    finally:
        watched.clear()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert not seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, and its parts for another start."""
    folder = tmp_path_factory.mktemp("damage")
    sizes = dict(num_hiddens=8, num_residual_hiddens=4, embedding_dim=8, num_embeddings=16)
    config = Config(
        model=model_config("vqvae")(**sizes), data=DataConfig(dataset="sample", image_size=16, batch_size=4, num_workers=0, limit=8, limit_val=2),
        train=TrainConfig(max_epochs=1, warmup_steps=1, progress=False, accelerator="cpu", log_every_n_steps=1, pictures=0),
        checkpoint=CheckpointConfig(every_n_steps=1, save_top_k=2), output_dir=str(folder/"run"))
    fit(config)
    for suffix in ("png", "jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)).save(folder/"run"/f"picture.{suffix}")
    fabric = make_fabric(config.train)
    fabric.launch()
    run = Run(config, fabric)
    return folder/"run", run


def weights(folder, run): return load_pretrained(find_checkpoint(folder)).state_dict()
def configuration(folder, run): return dict(asdict(stored_config(find_checkpoint(folder))), output_dir=None)   # which is where the run lies

def resumed(folder, run):
    restore(run, find_checkpoint(folder))
    return run.model.state_dict(), asdict(run.at), run.optimizer.state_dict(), torch.get_rng_state()

def reopen(folder, run):
    """Start with what the index says, clean up, write a checkpoint."""
    def write(new): (new/"model.safetensors").write_bytes(b"")
    kept = Checkpoints(folder/"checkpoints", save_top_k=2)
    kept.clean()
    kept.save(900, write, 0.5)
    assert find_checkpoint(folder).name == "step-00000900"

def go_on_writing(folder, run):
    log = folder/"steps.csv"
    keep_rows(log, 10**6)
    append_row(log, dict(step=3, loss=0.5))
    header, *lines = log.read_text(encoding="utf-8").splitlines()
    assert lines and all(line.count(",") == header.count(",") for line in lines)

def picture(suffix):
    def read(folder, run): assert load_image(folder/f"picture.{suffix}").shape[0] == 3
    return read


READERS = {"config.json": weights, "model.safetensors": weights, "SHA256SUMS": weights, "run.json": configuration, "training.pt": resumed,
           "checkpoints.json": reopen, "steps.csv": go_on_writing, "picture.png": picture("png"), "picture.jpg": picture("jpg")}


CHECKED = {"config.json", "model.safetensors", "run.json", "training.pt"}   # what the digests stand for


def same(a, b):
    """Whether two nested results are equal, tensors included."""
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", READERS)
def test_damaged_and_forged_files(name, trained, record, tmp_path, monkeypatch):
    """Half of the checkpoints' files with digests made right again."""
    source, run = trained
    right = copy.deepcopy(READERS[name](source, run)) if name in CHECKED else None
    monkeypatch.chdir(tmp_path)
    rng, before = np.random.default_rng(len(name)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in record.upto(12, 1112):
        folder = tmp_path/"run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder, symlinks=True)
        checkpoint = find_checkpoint(folder)
        file = next(p for p in (checkpoint/name, folder/"checkpoints"/name, folder/name) if p.exists())
        file.write_bytes(mutated(name, file.read_bytes(), rng))
        forged = i % 2 and file.parent == checkpoint and name != "SHA256SUMS"
        if forged: write_digests(checkpoint)
        with record.case(), nothing_else(folder):
            try:
                found = READERS[name](folder, run)
                assert right is None or forged or same(found, right)
            except (ValueError, OSError) as error: assert str(folder) in str(error) and "weights_only" not in str(error), repr(error)
    assert not list(tmp_path.rglob("executed")) and {p.name for p in tmp_path.iterdir()} == {"run"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6 * (1e3 if sys.platform == "darwin" else 1)   # 1 GB
