"""An archive holds the images of its folder; a damaged one is an error."""

import io
import stat
import tarfile
import zipfile

import pytest
from dino_train.data.archive import plain
from dino_train.data.folder import DataError, ImageFolder
from pictures import fill, zip_of


def linked(root):
    """A folder with links of every kind: images of a, twice under further names, and those of b in two folders."""
    fill(root, "a/1.png", "a/2.png", "b/c/3.png", ".store/4.png")
    (root / "a/hard.png").hardlink_to(root / "a/1.png")
    (root / "a/soft.png").symlink_to("../b/c/3.png")
    (root / "a/again.png").symlink_to("soft.png")
    (root / "d").symlink_to("b")
    (root / "b/c/stored.png").symlink_to("../../.store/4.png")
    (root / "b/up").symlink_to("..")
    return root


def tar_of(folder, arcname="."):
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname)
    return path


def zip_with_links(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.is_symlink():
                info = zipfile.ZipInfo(name)
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(info, str(file.readlink()))
            elif file.is_file():
                archive.write(file, name)
    return path


@pytest.mark.parametrize("pack", [tar_of, lambda f: tar_of(f, "set"), zip_with_links])
def test_links_are_followed_as_in_the_folder(tmp_path, pack):
    folder = ImageFolder(linked(tmp_path / "set"))
    images = ImageFolder(pack(tmp_path / "set"))
    # The folder follows b/up once more, before it finds itself; both have these.
    assert {"a/again.png", "a/hard.png", "a/soft.png", "b/c/stored.png", "d/c/3.png", "d/c/stored.png"} <= {
        *images.names
    }
    assert images.names == folder.names and not images.notes
    assert [images.read(i) for i in range(len(images))] == [folder.read(i) for i in range(len(folder))]


def test_members_outside_and_links_that_lead_nowhere_are_named_and_counted(tmp_path):
    fill(tmp_path, "x.png")
    data = (tmp_path / "x.png").read_bytes()
    with tarfile.open(tmp_path / "t.tar", "w") as tar, zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        for name in ("./a.png", "../out.png", "c/../b.png", "/root/c.png"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            archive.writestr(name, data)
        for name, kind, target in (
            ("gone.png", tarfile.SYMTYPE, "nowhere.png"),
            ("etc", tarfile.SYMTYPE, "/etc"),
            ("circle", tarfile.SYMTYPE, "circle"),
            ("hard.png", tarfile.LNKTYPE, "nowhere.png"),
            ("pipe.png", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    for path, count in ((tmp_path / "t.tar", 6), (tmp_path / "t.zip", 1)):
        images = ImageFolder(path)
        assert images.names == ["a.png", "b.png", "root/c.png"] and images.read(1) == data
        (note,) = images.notes
        assert f"not used: {count}: ../out.png (outside of the archive)" in note


def test_backslashes_in_a_zip_are_slashes(tmp_path):
    root = fill(tmp_path / "set", "cat/a.png", "dog/b.png")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("set\\cat\\", b"")
        for name in ("cat/a.png", "dog/b.png"):
            archive.writestr(f"set\\{name}".replace("/", "\\"), (root / name).read_bytes())
    images = ImageFolder(tmp_path / "w.zip")
    assert images.names == ["cat/a.png", "dog/b.png"] and images.classes == ["cat", "dog"]
    assert images.read(1) == ImageFolder(zip_of(root)).read(1)


def test_a_damaged_byte_in_the_directory_of_a_zip_hides_no_image(tmp_path):
    path = zip_of(fill(tmp_path / "set", *(f"a/{i}.png" for i in range(3))))
    intact = path.read_bytes()
    refused = 0
    for at in range(intact.index(b"PK\1\2"), len(intact)):
        for value in (0, *(intact[at] ^ 1 << bit for bit in range(8))):
            path.write_bytes(intact[:at] + bytes([value]) + intact[at + 1 :])
            try:
                images = ImageFolder(path)
                assert len(images) == 3 or images.notes, (at, value)
            except DataError as error:
                assert "set.zip is a damaged zip" in str(error)
                refused += 1
    assert refused > 200


def test_of_members_with_one_name_in_a_zip_the_last_is_used_and_the_others_are_named(tmp_path):
    path = zip_of(fill(tmp_path / "set", "a.png", "b.png"))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.png", (tmp_path / "set/b.png").read_bytes())
    images = ImageFolder(path)
    assert images.read(0) == images.read(1) and "a.png (an earlier member of that name)" in images.notes[0]


@pytest.mark.parametrize(
    "name, path",
    [("./a//b", "a/b"), ("a/./b/", "a/b"), ("a/../b", "b"), ("..", None), ("a/../../b", None), ("/b", "b")],
)
def test_plain_names(name, path):
    assert plain(name) == path


@pytest.fixture
def tar(tmp_path):
    """Its path, and where the headers are."""
    path = tar_of(fill(tmp_path / "set", *(f"{i}.png" for i in range(5))), "set")
    with tarfile.open(path) as file:
        return path, [member.offset for member in file], file.offset


def test_a_damaged_header_is_an_error_wherever_it_is(tar):
    path, headers, _ = tar
    intact = path.read_bytes()
    for header in headers:
        for at, mask in ((0, 1), (124, 2), (150, 4), (156, 1), (257, 8), (400, 1)):
            data = bytearray(intact)
            data[header + at] ^= mask
            path.write_bytes(data)
            with pytest.raises(DataError, match="set.tar is a damaged tar .*: copy or download it again$"):
                ImageFolder(path)
        path.write_bytes(intact[:header] + bytes(512) + intact[header + 512 :])
        with pytest.raises(DataError, match="set.tar is a damaged tar .there is data after its end"):
            ImageFolder(path)


def test_a_tar_that_is_cut_off_is_an_error_wherever_it_is(tar):
    path, headers, end = tar
    intact = path.read_bytes()
    for cut in (*headers[1:], end, headers[2] + 100, headers[2] + 600, end - 1, end + 511):
        path.write_bytes(intact[:cut])
        with pytest.raises(DataError, match="set.tar is a damaged tar"):
            ImageFolder(path)
    path.write_bytes(intact[: end + 512])
    assert len(ImageFolder(path)) == 5
