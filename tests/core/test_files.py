"""Files are whole or not there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcompress.core.errors import UserError
from rlcompress.core.files import JsonLines, read_archive, save_bytes, save_json
from rlcompress.core.schedule import Measurement, Record, Schedule
from rlcompress.core.tensors import load_tensors, save_tensors

MEASURED = Measurement(0.9, 0.3, 0.1, 1000, 200, 300, 400, 90.0)
RECORD = Record(Schedule({"a": 0.5}, {"a": 4}), MEASURED, "ppo", 1, 7)
lines = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1))


@given(whole=lines, tail=st.binary(max_size=20).filter(lambda b: b"\n" not in b), more=lines)
def test_an_unterminated_last_line_is_dropped_and_the_rest_goes_on(scratch, whole, tail, more):
    scratch.write_bytes("".join(line + "\n" for line in whole).encode() + tail)
    with JsonLines(scratch) as file:
        for line in more:
            file.append(line)
    assert scratch.read_bytes().decode() == "".join(line + "\n" for line in whole + more)


@pytest.mark.parametrize("interval", [0.0, 3600.0])
def test_each_line_can_be_read_when_append_returns(tmp_path, interval):
    path = tmp_path / "folder" / "archive.jsonl"
    with JsonLines(path, interval=interval) as file:
        for count in (1, 2, 3):
            file.append(RECORD.to_json())
            assert read_archive(path) == [RECORD] * count


def test_two_processes_may_save_one_file(tmp_path, monkeypatch):
    path, fsync = tmp_path / "x.json", os.fsync

    def saved_meanwhile(file: int) -> None:
        fsync(file)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            patched.setattr(os, "getpid", lambda: 1)
            save_bytes(path, b"theirs")
        assert path.read_bytes() == b"theirs"

    monkeypatch.setattr(os, "fsync", saved_meanwhile)
    save_bytes(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small tmpfs")
def test_a_full_disk_is_named_and_leaves_whole_lines_and_files(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], check=True)
    try:
        path, text = full / "archive.jsonl", RECORD.to_json()
        file = JsonLines(path)
        with pytest.raises(OSError, match=r"No space left on device.*archive\.jsonl") as caught:
            deque(map(file.append, itertools.repeat(text)))
        assert caught.value.errno == errno.ENOSPC
        file.close()
        count = path.read_text().count("\n")
        assert count > 100
        assert read_archive(path) == [RECORD] * count
        with pytest.raises(OSError, match=r"No space left on device.*spec\.json"):
            save_json(full / "spec.json", "x" * 2**17)
        assert [p.name for p in full.iterdir()] == ["archive.jsonl"]
        with JsonLines(path) as again:  # cuts off the half line
            assert again.path.read_text() == (text + "\n") * count
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_no_archive_is_an_empty_one(tmp_path):
    assert read_archive(tmp_path / "archive.jsonl") == []


def test_a_line_still_being_written_is_not_read(tmp_path):
    path = tmp_path / "archive.jsonl"
    path.write_text(RECORD.to_json() + "\n" + RECORD.to_json()[:-5])
    assert read_archive(path) == [RECORD]


@pytest.mark.parametrize(
    "damaged", ["", "{", "null", "[]", "{}", RECORD.to_json().replace("0.5", "1.5"), "\udcff\udcfe"]
)
def test_a_damaged_line_is_named(tmp_path, damaged):
    path = tmp_path / "archive.jsonl"
    text = "\n".join([RECORD.to_json(), damaged, RECORD.to_json(), ""])
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_archive(path)
    assert f"{path}, line 2:" in str(caught.value)


def test_tensors_and_what_is_said_of_them_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(3), "c": torch.zeros(0, 2)}
    tensors["d"] = tensors["a"]
    save_tensors(tmp_path / "t", tensors, key="k", curve=[{"epoch": 1, "loss": 0.1}])
    back, about = load_tensors(tmp_path / "t")
    assert {*back} == {*tensors}
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())
    assert about == {"key": "k", "curve": [{"epoch": 1, "loss": 0.1}]}
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    save_json(path, {"a": 1})
    with pytest.raises(TypeError):
        save_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
