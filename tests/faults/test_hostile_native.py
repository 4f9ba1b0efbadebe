"""A native kernel comes from a folder and a file that nobody else can have written; anything else is built again."""

import os
import shutil
import subprocess

import pytest

from backbones.ops import native_build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of this test, and a library whose ``answer()`` is 42 built from ``source``."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("KARVIS_CACHE", str(folder))
    monkeypatch.setattr(native_build, "_FLAGS", ["-O0"])
    native_build.library.cache_clear()
    yield folder
    native_build.library.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "op" / "native.cpp"
    path.parent.mkdir()
    path.write_text('extern "C" int answer() { return 42; }')
    return path


@pytest.fixture
def evil(tmp_path):
    """The bytes of a library that makes the file MARK when it is loaded."""
    code = (
        f'#include <cstdio>\n__attribute__((constructor)) static void f() {{ fclose(fopen("{tmp_path}/MARK", "w")); }}'
    )
    (tmp_path / "evil.cpp").write_text(code)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", tmp_path / "evil.so", tmp_path / "evil.cpp"], check=True)
    return (tmp_path / "evil.so").read_bytes()


def load(source):
    native_build.library.cache_clear()
    return native_build.library(source).answer()


def as_link(path, data):
    path.with_suffix(".elsewhere").write_bytes(data)
    path.symlink_to(path.with_suffix(".elsewhere"))


def as_hard_link(path, data):
    path.with_suffix(".elsewhere").write_bytes(data)
    path.hardlink_to(path.with_suffix(".elsewhere"))


def writable_by(mode):
    def put(path, data):
        path.write_bytes(data)
        path.chmod(mode)

    return put


FILES = {
    "without_digest": lambda path, data: path.write_bytes(data),
    "link": as_link,
    "hard_link": as_hard_link,
    "dangling_link": lambda path, data: path.symlink_to(path.parent / "nowhere"),
    "writable_by_group": writable_by(0o660),
    "writable_by_all": writable_by(0o606),
    "empty": lambda path, data: path.write_bytes(b""),
    "no_library": lambda path, data: path.write_bytes(b"#!/bin/sh\n" * 99),
    "truncated": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "pipe": lambda path, data: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", FILES)
def test_file_that_is_not_ours_is_built_again(kind, cache, source, evil, tmp_path):
    assert load(source) == 42
    (path,) = cache.glob("*.so")
    path.unlink()
    FILES[kind](path, evil)
    assert load(source) == 42
    assert not (tmp_path / "MARK").exists()
    assert path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600


def test_damaged_library_is_built_again(cache, source):
    load(source)
    (path,) = cache.glob("*.so")
    good = path.read_bytes()
    for bad in (good[:4096], good[:-1], good[:200] + bytes([good[200] ^ 1]) + good[201:]):
        path.write_bytes(bad)
        assert load(source) == 42
        assert path.stat().st_size == len(good)


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777], ids=oct)
def test_folder_others_can_write_to_is_not_used(mode, cache, source, evil, tmp_path):
    load(source)
    (path,) = cache.glob("*.so")
    path.write_bytes(evil)
    cache.chmod(mode)
    with pytest.warns(UserWarning, match="can be written by other users"):
        assert load(source) == 42
    assert path.read_bytes() == evil and not (tmp_path / "MARK").exists()


def test_folder_that_is_a_link_is_not_used(cache, source, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(cache)
    monkeypatch.setenv("KARVIS_CACHE", str(tmp_path / "link"))
    with pytest.warns(UserWarning, match="is a link"):
        assert load(source) == 42
    assert not list(cache.iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_another_users_folder_or_file_is_not_used(what, cache, source, evil, tmp_path):
    load(source)
    (path,) = cache.glob("*.so")
    path.write_bytes(evil)
    os.chown(cache if what == "folder" else path, 65534, 65534)
    assert load(source) == 42
    assert not (tmp_path / "MARK").exists()
