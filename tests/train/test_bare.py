"""The trainer without the libraries that only the command line, plots and progress bars need."""

import subprocess
import sys

import numpy as np
import pytest
from bare import ABSENT, environment
from dino_train.data import decode
from dino_train.engine import watch
from PIL import Image

RUN = """\
import sys
from pathlib import Path
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.train import pretrain

folder = Path(sys.argv[1])
pretrain(PretrainConfig(
    data=str(folder / "images"), output_dir=folder / "run", arch="vit_nano", patch_size=8, out_dim=64,
    head_hidden_dim=16, epochs=1, global_crops_size=16, local_crops_size=8, local_crops_number=1,
    batch_size_per_gpu=4, num_workers=1, device="cpu", log_interval=2,
))
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_a_whole_run_with_evaluations(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(44):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i}.{('jpg', 'png')[i // 2 % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(file)
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    *said, modules = done.stdout.splitlines()
    assert not set(ABSENT) & set(modules.split())
    assert (tmp_path / "run/last.pt").is_file()
    assert sum("retrieval" in line and "knn10" in line for line in said) == 2
    assert "curves: not drawn, matplotlib is not installed" in said


def test_without_simplejpeg_pillow_decodes_to_the_same_pixels(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).resize((200, 160)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    expected = decode.decode(data)
    assert decode.jpeg_size(data) == (160, 200)
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert decode.jpeg_size(data) is None and np.array_equal(decode.decode(data), expected)


@pytest.mark.parametrize("installed", [True, False])
def test_on_a_terminal_without_tqdm_progress_is_lines(monkeypatch, capsys, installed):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    progress = watch.Progress()
    progress.begin(0, 10, 1, 4, 1)
    progress.update(1, 0, 2.0, 0.1)
    progress.close()
    assert (progress.bar is not None) is installed
    assert ("step 1/10" in capsys.readouterr().out) is not installed
