"""Nothing is opened through a link, with openat2 or without."""

from __future__ import annotations

import errno
import os

import pytest

from cachefs.cache import beneath

READ = os.O_RDONLY | os.O_NONBLOCK


@pytest.fixture(params=["openat2", "in steps"])
def opened(request, tmp_path, monkeypatch):
    """`opened(path)`: what is read there, or the name of the errno."""
    if request.param == "in steps":
        monkeypatch.setattr(beneath, "_has_openat2", False)
    (tmp_path / "top/a/b").mkdir(parents=True)
    (tmp_path / "top/a/b/file").write_bytes(b"content")
    (tmp_path / "top/file").write_bytes(b"at the top")
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "top/a/link").symlink_to("b/file")
    (tmp_path / "top/folder").symlink_to("a")
    (tmp_path / "top/out").symlink_to("..")
    (tmp_path / "top/self").symlink_to("/proc/self/fd")
    top = os.open(tmp_path / "top", os.O_RDONLY | os.O_DIRECTORY)

    def read(path):
        before = len(os.listdir("/proc/self/fd"))
        try:
            fd = beneath.open_beneath(path, READ, top)
        except OSError as error:
            assert len(os.listdir("/proc/self/fd")) == before, "no descriptor is left"
            return errno.errorcode[error.errno]
        assert not os.get_inheritable(fd)
        with open(fd, "rb") as file:
            return file.read()

    yield read
    os.close(top)


def test_what_is_beneath_is_opened(opened):
    assert opened("a/b/file") == b"content"
    assert opened("file") == b"at the top"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("a/link", "ELOOP"),
        ("folder/b/file", "ELOOP"),
        ("out/outside", "ELOOP"),
        ("self/0", "ELOOP"),
        ("../outside", "EXDEV"),
        ("a/../../outside", "EXDEV"),
        ("a/b/nothing", "ENOENT"),
        ("nothing/file", "ENOENT"),
    ],
)
def test_everything_else_is_not(opened, path, code):
    assert opened(path) == code
