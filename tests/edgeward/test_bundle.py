"""The bundle's file format: one form only, and everything else refused."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.bundle import FORMAT, FORMAT_NAME, MAX_MEMBERS, Bundle, Source, open_bundle, write_bundle
from edgeward.errors import PackageError

DIGEST = "ab" * 32
MEMBERS = {
    "tuf/1.root.json": b"{}",
    "tuf/timestamp.json": b"t" * 511,
    "desired/line-1a.json": b"d" * 512,
    f"manifests/{DIGEST}.json": b"m" * 513,
    f"blobs/{DIGEST}": b"",
}


def sources(members: dict[str, bytes]) -> list[Source]:
    return [Source(name, len(data), [data]) for name, data in members.items()]


def opened(content: bytes) -> Bundle:
    return Bundle(io.BytesIO(content), "b")


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    write_bundle(tmp_path / "b", sources(MEMBERS))
    return (tmp_path / "b").read_bytes()


def made(
    change: Callable[[tarfile.TarInfo], None] = lambda info: None,
    *names: str,
    form: int = tarfile.USTAR_FORMAT,
) -> bytes:
    """An archive as tarfile writes it, with what `change` makes of the last member's header."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name in (FORMAT_NAME, *names):
            data = FORMAT if name == FORMAT_NAME else b"x"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name == names[-1]:
                change(info)
            archive.addfile(info, io.BytesIO(data))
        size = archive.offset
    return file.getvalue()[:size] + bytes(1024)


def test_what_was_written_is_read_and_tar_lists_it(good: bytes) -> None:
    bundle = opened(good)
    assert bundle.names == [FORMAT_NAME, *MEMBERS]
    assert {name: bundle.read(name, len(data)) for name, data in MEMBERS.items()} == MEMBERS
    with tarfile.open(fileobj=io.BytesIO(good)) as archive:
        assert archive.getnames() == bundle.names
    with pytest.raises(PackageError, match="513 bytes, at most 512"):
        bundle.read(f"manifests/{DIGEST}.json", 512)
    assert opened(made(lambda info: None, "tuf/timestamp.json")).names == [FORMAT_NAME, "tuf/timestamp.json"]


@pytest.mark.parametrize(
    "name",
    [
        "../desired/a.json", "/etc/passwd", "blobs/../x", "desired/a/b.json", "blobs/" + "A" * 64, "tuf/root.json",
        "tuf/0.root.json", "tuf/1.../x.json", "desired/-a.json", "desired/a.json\n", "extra", "blobs/short", "tuf/",
        "./format", "desired/ä.json",
    ],
)  # fmt: skip
def test_a_name_that_a_bundle_does_not_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="has no place in a bundle"):
        opened(made(lambda info: None, name))
    with pytest.raises(PackageError, match="has no place in a bundle"):
        write_bundle(tmp_path / "b", [Source(name, 1, [b"x"])])
    assert list(tmp_path.iterdir()) == []


def as_type(kind: bytes, target: str = "") -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, target
        if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info.size = 0

    return change


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
     tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE],
)  # fmt: skip
def test_a_member_that_is_no_plain_file_is_refused(kind: bytes) -> None:
    with pytest.raises(PackageError, match=r"not that of a plain file|has no place"):
        opened(made(as_type(kind, "/etc/passwd"), f"blobs/{DIGEST}"))


def test_headers_that_say_more_than_name_and_size_are_refused() -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.mtime = 1

    with pytest.raises(PackageError, match="damaged"):
        opened(made(change, f"blobs/{DIGEST}"))
    with pytest.raises(PackageError, match="not an Edgeward bundle"):
        opened(made(lambda info: None, f"blobs/{DIGEST}", form=tarfile.GNU_FORMAT))
    with pytest.raises(PackageError, match="@PaxHeader' has no place"):
        opened(made(lambda info: info.pax_headers.update(a="b"), f"blobs/{DIGEST}", form=tarfile.PAX_FORMAT))


def test_members_come_once_and_in_order(tmp_path: Path) -> None:
    for names in (("desired/a.json", "desired/a.json"), ("desired/b.json", "desired/a.json"),
                  (f"blobs/{DIGEST}", "tuf/timestamp.json")):  # fmt: skip
        with pytest.raises(PackageError, match="stands twice, or out of its order"):
            opened(made(lambda info: None, *names))
        with pytest.raises(PackageError, match="stands twice, or out of its order"):
            write_bundle(tmp_path / "b", [Source(name, 1, [b"x"]) for name in names])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [513, 1024, 1 << 20, 8**11 - 1])
def test_a_size_beyond_the_file_is_refused_without_reading_it(size: int) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.size = size

    class Meter(io.BytesIO):
        read_bytes = 0

        def read(self, count: int | None = -1, /) -> bytes:
            data = super().read(count)
            self.read_bytes += len(data)
            return data

    content = made(as_type(tarfile.REGTYPE), f"blobs/{DIGEST}")
    header = tarfile.TarInfo(f"blobs/{DIGEST}")
    change(header)
    block = header.tobuf(tarfile.USTAR_FORMAT)
    file = Meter(content[:1024] + block + content[1536:])
    with pytest.raises(PackageError, match="which is said to have"):
        Bundle(file, "b")
    assert file.read_bytes < 4096


def test_more_members_than_any_bundle_has_are_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", [Source(f"blobs/{index:064x}", 0, []) for index in range(MAX_MEMBERS)])
    with pytest.raises(PackageError, match=f"more than {MAX_MEMBERS} members"), open_bundle(tmp_path / "b"):
        pass


def test_a_source_that_brings_other_than_its_size_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"before")
    for chunks in ([b"x"], [b"xx", b"xx"]):
        with pytest.raises(PackageError, match="announced were 2"):
            write_bundle(tmp_path / "b", [Source("desired/a.json", 2, chunks)])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_every_cut_is_refused(good: bytes) -> None:
    for length in range(len(good)):
        with pytest.raises(PackageError):
            opened(good[:length])
    for more in (b"\0", bytes(512), b"x"):
        with pytest.raises(PackageError, match="behind its end"):
            opened(good + more)


def test_only_a_file_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "not a file"),
        (tmp_path, "not a file"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(PackageError, match=why), open_bundle(path):
            pass


def test_a_changed_bit_outside_the_contents_is_refused(good: bytes) -> None:
    @settings(max_examples=400)
    @given(st.integers(0, len(good) - 1), st.integers(0, 7))
    def changed(at: int, bit: int) -> None:
        content = bytearray(good)
        content[at] ^= 1 << bit
        try:
            bundle = opened(bytes(content))
            got = {name: bundle.read(name, 1 << 20) for name in bundle.names}
        except PackageError:
            return
        differing = [name for name, value in MEMBERS.items() if got[name] != value]
        assert list(got) == [FORMAT_NAME, *MEMBERS] and len(differing) == 1

    changed()


@given(st.binary(max_size=3000))
def test_arbitrary_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(PackageError):
        opened(content)
