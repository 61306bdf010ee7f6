"""Training that is killed, at whatever instant, goes on: nothing half written is taken for whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from kvspn import atomic as writing
from kvspn.atomic import atomic

pytest.importorskip("peft")

from kvspn.training.checkpoints import SEAL, last_whole
from kvspn.training.trainer import fit


def write_file(path: Path, text: str) -> None:
    path.write_text(text)


def write_folder(path: Path, text: str) -> None:
    path.mkdir()
    for name in ("first", "second"):
        (path / name).write_text(text)


def read(path: Path) -> list[str]:
    return [file.read_text() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


KINDS = pytest.mark.parametrize("write", [write_file, write_folder])
Write = Callable[[Path, str], None]


@KINDS
def test_a_write_replaces_the_old_and_what_a_kill_has_left(tmp_path: Path, write: Write) -> None:
    target = tmp_path / "above" / "target"
    for text in ("old", "new"):
        (tmp_path / "above" / "target.part").mkdir(parents=True)
        with atomic(target) as part:
            write(part, text)
        assert set(read(target)) == {text}
        assert os.listdir(target.parent) == ["target"]


@KINDS
@pytest.mark.parametrize("step", ["write", "flush", "rename"])
@pytest.mark.parametrize("old", [False, True])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, step: str, old: bool
) -> None:
    def fail(*args: object) -> None:
        raise OSError("the disk is full")

    target = tmp_path / "target"
    if old:
        write(target, "old")
    if step == "flush":
        monkeypatch.setattr(os, "fsync", fail)
    elif step == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"), atomic(target) as part:
        write(part, "new")
        if step == "write":
            fail()
    kept = old and not (
        step == "rename" and write is write_folder
    )  # A folder is removed before it is replaced.
    assert os.listdir(tmp_path) == (["target"] if kept else [])
    assert not kept or set(read(target)) == {"old"}


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(writing, "_sync", lambda path: synced.append(path.name))
    with atomic(tmp_path / "target") as part:
        write_folder(part, "new")
    assert sorted(synced[:2]) == ["first", "second"]
    assert synced[2:] == ["target.part", tmp_path.name]


def train(folder: Path, steps: int) -> tuple[dict[str, torch.Tensor], int]:
    """A small network's weights after `steps` steps in all, and how many were taken in this call."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    tokens, taken = torch.arange(5), []

    def losses(network: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        taken.extend([1] * network.training)
        return {"loss": F.cross_entropy(network(batch["tokens"]).float(), batch["tokens"])}

    fit(
        network,
        folder,
        [{"input_ids": [0]}] * 2,
        lambda items: {"tokens": tokens},
        losses,
        [{"tokens": tokens}],
        steps=steps,
        batch=2,
        learning_rate=1e-3,
        seed=0,
    )
    return network.state_dict(), len(taken)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    for steps in (1, 2):
        train(folder, steps)
    return folder


def in_order_of_writing(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.iterdir(), key=lambda file: (file.stat().st_mtime_ns, file.name == SEAL))


def test_a_checkpoint_is_trusted_only_as_it_was_sealed(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed in the middle of each of its files, or damaged later: the one before is used, with a warning."""
    files = in_order_of_writing(run / "checkpoint-2")
    assert files[-1].name == SEAL
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {f.name for f in files}
    assert last_whole(run) == run / "checkpoint-2"
    for i, file in enumerate(files):
        for killed in (True, False):
            shutil.copytree(run, copy := tmp_path / f"{i}-{killed}")
            damaged = copy / "checkpoint-2" / file.name
            if killed:
                os.truncate(damaged, damaged.stat().st_size // 2)
                for later in files[i + 1 :]:
                    (copy / "checkpoint-2" / later.name).unlink()
            else:
                content = bytearray(damaged.read_bytes())
                content[len(content) // 2] ^= 1
                damaged.write_bytes(content)
            caplog.clear()
            assert last_whole(copy) == copy / "checkpoint-1", damaged
            assert [record.getMessage() for record in caplog.records] == [
                f"{copy / 'checkpoint-2'} is damaged or unfinished: passed over"
            ]
            assert not (copy / "checkpoint-2").exists()


def test_no_checkpoint_is_whole(run: Path, tmp_path: Path) -> None:
    assert last_whole(tmp_path / "nothing") is None
    shutil.copytree(run, tmp_path / "run")
    for seal in tmp_path.glob(f"run/*/{SEAL}"):
        seal.unlink()
    assert last_whole(tmp_path / "run") is None


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from test_faults_training import train
real = torch.save
def save(content, file, *args, **kwargs):
    real(content, file, *args, **kwargs)
    if "checkpoint-2" in str(file) and "optimizer" in str(file):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
train(Path(sys.argv[1]), 2)
"""


def test_training_goes_on_after_sigkill(run: Path, tmp_path: Path) -> None:
    """Killed inside of a checkpoint, then run again: the step is taken again, the weights are the same."""
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    weights, taken = train(tmp_path, 2)
    assert taken == 1
    expected = load_file(run / "checkpoint-2" / "model.safetensors")
    assert set(weights) == set(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
