"""Bundles are written whole or not at all, and any change shows."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from derc import bundle
from derc.errors import IntegrityError, UsageError

FILES = {"model.py": b"x = 1\n", "reproduce.sh": b"#!/bin/sh\n"}


def test_round_trip(tmp_path):
    sealed = bundle.write(tmp_path / "a" / "b", FILES, {"schema": bundle.SCHEMA, "n": 1.5})
    assert bundle.verify(tmp_path / "a" / "b") == sealed
    assert os.access(tmp_path / "a" / "b" / "reproduce.sh", os.X_OK)


def test_every_flipped_bit_is_found(compiled, tmp_path):
    folder, _, _ = compiled
    copy = tmp_path / "copy"
    for name in [*bundle.read(folder)["files"], bundle.MANIFEST]:
        shutil.copytree(folder, copy)
        data = bytearray((copy / name).read_bytes())
        place = data.index(b'"n') + 1 if name == bundle.MANIFEST else len(data) // 2
        data[place] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(IntegrityError):
            bundle.verify(copy)
        shutil.rmtree(copy)


def test_missing_file_and_no_bundle_are_named(compiled, tmp_path):
    folder, _, _ = compiled
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"model\.onnx is missing"):
        bundle.verify(copy)
    for wrong in (tmp_path / "nothing", tmp_path):
        with pytest.raises(IntegrityError, match="not a derc bundle"):
            bundle.read(wrong)


def test_a_manifest_that_points_outside_is_refused(tmp_path):
    bundle.write(tmp_path / "b", FILES, {"schema": bundle.SCHEMA})
    manifest = json.loads((tmp_path / "b" / bundle.MANIFEST).read_text())
    manifest["files"]["../evil"] = "0" * 64
    (tmp_path / "b" / bundle.MANIFEST).write_text(json.dumps(bundle.seal(manifest)))
    with pytest.raises(IntegrityError, match="outside"):
        bundle.verify(tmp_path / "b")


def test_output_that_cannot_be_taken(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name, word in (("full", "not empty"), ("file", "not a directory")):
        with pytest.raises(UsageError, match=word):
            bundle.check_output(tmp_path / name)
    bundle.check_output(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    bundle.check_output(tmp_path / "empty")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        bundle.write(tmp_path / "b", FILES, {"schema": bundle.SCHEMA})
    assert list(tmp_path.iterdir()) == []
