"""Two processes with half a batch each learn what one process learns with the whole batch (gloo, on the CPU)."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laser.checkpoints import find_checkpoint

RUN = """
import sys
import torch
from laser.training import *
if __name__ == "__main__":
    folder, model, devices = sys.argv[1:4]
    sizes = dict(num_hiddens=8, num_residual_hiddens=4, embedding_dim=8, num_embeddings=16)
    config = Config(
        model=model_config(model)(**sizes, revive_below=0.3, **(dict(sparsity_level=2) if model == "dlvae" else {})),
        data=DataConfig(dataset="sample", image_size=32, batch_size=8, num_workers=0, limit=48, limit_val=9),
        train=TrainConfig(max_epochs=1, warmup_steps=2, learning_rate=1e-3, progress=False, accelerator="cpu", devices=devices, pictures=0),
        output_dir=folder)
    torch.set_num_threads(1)
    fit(config)
"""


def start(tmp_path, name, model, devices):
    script = tmp_path/"run.py"
    script.write_text(RUN)
    result = subprocess.run([sys.executable, str(script), str(tmp_path/name), model, devices], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    checkpoint = find_checkpoint(tmp_path/name)
    header, line = (tmp_path/name/"metrics.csv").read_text().splitlines()
    return load_file(checkpoint/"model.safetensors"), dict(zip(header.split(","), line.split(","))), torch.load(checkpoint/"training.pt", weights_only=True)


@pytest.mark.parametrize("model", ["vqvae", "dlvae"])
def test_two_processes_learn_what_one_learns(model, tmp_path):
    one, one_row, _ = start(tmp_path, "one", model, "1")
    two, two_row, state = start(tmp_path, "two", model, "2")
    assert len(state["rng"]) == 2                                          # each process has generators of its own
    assert one_row["step"] == two_row["step"] == "6"
    for name, weights in one.items():
        # sums over a batch are added up in another order, so to rounding, not to the bit
        assert torch.allclose(weights.float(), two[name].float(), rtol=2e-3, atol=2e-4), name
    assert torch.equal(one["bottleneck.steps"], two["bottleneck.steps"])
    for column in ("train_loss", "val_loss", "val_mse", "val_psnr", "val_ssim"):
        assert float(one_row[column]) == pytest.approx(float(two_row[column]), rel=2e-3), column
    assert float(one_row["val_bits_per_pixel"]) == float(two_row["val_bits_per_pixel"])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the other process in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_when_one_process_is_lost_the_other_ends_and_says_so(how, record, tmp_path):
    script = tmp_path/"run.py"
    script.write_text(RUN.replace("max_epochs=1", "max_epochs=10000"))
    log = open(tmp_path/"log", "w")                                        # a pipe would stay open in the stopped process
    first = subprocess.Popen([sys.executable, str(script), str(tmp_path/"run"), "vqvae", "2"], stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 120
        while not (tmp_path/"run"/"checkpoints"/"last").exists() and time.time() < deadline and first.poll() is None: time.sleep(0.1)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        other = [int(pid) for pid in children if str(script) in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(other) == 1
        os.kill(other[0], how)
        killed = time.monotonic()
        first.wait(timeout=60)
        record.add(1, 0, time.monotonic() - killed)
        err = (tmp_path/"log").read_text()
        assert first.returncode != 0 and "has died or hangs" in err and "step-0" in err and "train.resume=" in err, err
    finally:
        os.killpg(first.pid, signal.SIGKILL)
