"""bench/reliability.py in small: nothing fails, and what would fail is counted."""

import os
import time

import pytest
import reliability


def test_damaged_images_and_archives(tmp_path):
    reliability.make_images(tmp_path / "images")
    for number in range(30):
        for check, things in (
            (reliability.check_image, reliability.image_files()),
            (reliability.check_archive, {name: (tmp_path / name,) for name in ("pack.tar", "plain.tar", "images.zip")}),
        ):
            folder = tmp_path / f"{check.__name__}{number}"
            folder.mkdir()
            check(folder, *list(things.values())[number % len(things)], number)


def faulty(folder, kind, number):
    if kind == "loss":
        raise reliability.SilentLoss("an image")
    if kind == "error":
        raise KeyError("x")
    if kind == "crash":
        os._exit(9)
    if kind == "hang":
        time.sleep(60)


@pytest.mark.slow
def test_every_kind_of_failure_is_counted(monkeypatch):
    monkeypatch.setattr(reliability, "FILE_LIMIT", 4)  # of a worker that starts anew, too
    things = {kind: (kind,) for kind in ("loss", "error", "crash", "hang", "none")}
    failures = list(reliability.checked(faulty, 6, things))
    assert [failure and failure[0] for failure in failures] == ["loss", "traceback", "traceback", "hang", None, "loss"]
    assert failures[1][1] == "error, number 1: KeyError('x')"


@pytest.mark.slow
def test_all_cases_in_small(capsys):
    words = ["--kills", "2", "--images", "5", "--checkpoints", "3", "--archives", "3", "--disk-full", "1"]
    assert reliability.main(words) == 0
    rows = [line.split(" | ")[1:5] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [[count, "0", "0", "0"] for count in ("2", "5", "3", "3", "1")]
