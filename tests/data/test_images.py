"""Images: decoding, paths that leave the folder, broken files, the cache."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medbridge.data import ImageCache, load_image
from medbridge.data.images import check_image, resolve_image
from medbridge.errors import MedbridgeError

MakePng = Callable[..., Path]


def pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_grey_becomes_rgb(tmp_path: Path, make_png: MakePng) -> None:
    found = pixels(make_png(tmp_path / "a.png", 7))
    assert found.shape == (3, 4, 3) and found[0, 0].tolist() == [7, 7, 7]


def test_sixteen_bits_are_stretched_not_cut(tmp_path: Path) -> None:
    values = np.array([[0, 1000], [2000, 4000]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[..., 0].tolist() == [[0, 64], [128, 255]]


@pytest.mark.parametrize("values", [[[0.0, np.nan], [np.inf, 2.0]], [[5.0, 5.0], [5.0, 5.0]]])
def test_float_images_never_fail(tmp_path: Path, values: list[list[float]]) -> None:
    Image.fromarray(np.array(values, dtype=np.float32)).save(tmp_path / "a.tiff")
    assert pixels(tmp_path / "a.tiff").shape == (2, 2, 3)


def test_transparency_is_laid_on_black(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").max() == 0


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (2, 6)


def test_first_of_several_frames(tmp_path: Path) -> None:
    frames = [Image.new("L", (2, 2), value) for value in (9, 200)]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.tiff").max() == 9


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few bytes that says it has side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_bombs_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    with pytest.raises(MedbridgeError, match=r"a\.png: (\d+ x \d+ pixels|not a readable image)"):
        check_image(bomb(tmp_path / "a.png", side), "header")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    for how in ("header", "decode"):
        with pytest.raises(MedbridgeError, match=r"a\.png: not a readable image"):
            check_image(tmp_path / "a.png", how)
    check_image(tmp_path / "a.png", "exists")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(MedbridgeError, match="not a readable image"):
        load_image(tmp_path / "a.png")


def test_truncated_image_passes_the_header_only(tmp_path: Path, make_png: MakePng) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    check_image(tmp_path / "a.png", "header")
    with pytest.raises(MedbridgeError, match=r"a\.png: not a readable image"):
        check_image(tmp_path / "a.png", "decode")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.png", "leaves the data folder"),
        ("sub/../../outside.png", "leaves the data folder"),
        ("..\\outside.png", "leaves the data folder"),
        ("/etc/hostname", "is absolute"),
        ("C:\\a.png", "is absolute"),
        ("\\\\host\\a.png", "is absolute"),
        ("https://example.org/a.png", "is an address"),
        ("", "not a file name"),
        ("a\0.png", "not a file name"),
        ("\ud800.png", "not a file name"),
        ("none.png", "is missing"),
        ("sub", "is missing"),
        ("x" * 5000, "is missing"),
        ("link.png", "a link that leaves"),
        ("linked/outside.png", "a link that leaves"),
        ("loop.png", "is missing"),
    ],
)
def test_paths_stay_in_the_folder(tmp_path: Path, make_png: MakePng, name: str, message: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    make_png(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    with pytest.raises(MedbridgeError, match=message):
        resolve_image(root, name)


def test_links_inside_the_folder_and_of_the_folder_are_fine(tmp_path: Path, make_png: MakePng) -> None:
    root = tmp_path / "root"
    make_png(root / "sub" / "a.png", 3)
    (root / "b.png").symlink_to(root / "sub" / "a.png")
    (tmp_path / "alias").symlink_to(root)
    for name in ("sub/a.png", "b.png", "./sub//a.png"):
        found = resolve_image(tmp_path / "alias", name)
        assert Path(found).is_absolute() and pixels(Path(found))[0, 0, 0] == 3


def test_a_folder_whose_name_begins_alike_is_outside(tmp_path: Path, make_png: MakePng) -> None:
    make_png(tmp_path / "rootbeer" / "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").symlink_to(tmp_path / "rootbeer" / "a.png")
    with pytest.raises(MedbridgeError, match="a link that leaves"):
        resolve_image(tmp_path / "root", "a.png")


def test_cache_reads_once_and_keeps_its_budget(tmp_path: Path, make_png: MakePng) -> None:
    paths = [str(make_png(tmp_path / f"{n}.png", n, (10, 10))) for n in range(3)]
    cache = ImageCache(2 * 300)
    first = cache.get(paths[0])
    assert cache.get(paths[0]) is first
    cache.get(paths[1])
    cache.get(paths[0])  # now number 1 is the oldest
    cache.get(paths[2])
    assert len(cache) == 2 and cache.get(paths[0]) is first
    Path(paths[0]).unlink()
    assert cache.get(paths[0]) is first
    small = ImageCache(100)
    assert small.get(paths[1]).size == (10, 10) and len(small) == 0


def test_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"none\.png: no such image file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(MedbridgeError, match=r"none\.png: no such image file"):
        check_image(tmp_path / "none.png", "exists")
