"""What images look like: equal pixels whatever the file, in the files' order whatever the threads."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medbridge.data import load_image
from medbridge.data.fingerprints import SIDE, fingerprint, read_fingerprints
from medbridge.errors import MedbridgeError


def scan(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Smooth shapes, as in a picture of a body."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def test_the_file_format_does_not_matter_and_the_shape_does(tmp_path: Path) -> None:
    image = scan(0)
    paths = [tmp_path / name for name in ("a.png", "b.bmp", "c.tif", "d.png")]
    for path in paths[:3]:
        image.save(path)
    Image.fromarray(np.asarray(image).reshape(96, 80)).save(paths[3])
    found = [fingerprint(str(path)) for path in paths]
    assert found[0] == found[1] == found[2]
    assert found[3].pixels != found[0].pixels
    assert len(found[0].pixels) == 16 and len(found[0].thumbnail) == SIDE * SIDE and found[0].perceptual < 2**64


@pytest.mark.parametrize("seed", range(5))
def test_copies_keep_their_perceptual_hash_and_others_do_not(tmp_path: Path, seed: int) -> None:
    image = scan(seed, (256, 256))
    squeezed = io.BytesIO()
    image.save(squeezed, "JPEG", quality=60)
    versions = {
        "original": image,
        "compressed": Image.open(squeezed),
        "small": image.resize((128, 128), Image.Resampling.LANCZOS),
        "bright": image.point(lambda level: min(255, int(1.05 * level) + 6)),
        "other": scan(seed + 100, (256, 256)),
    }
    hashes = {}
    for name, version in versions.items():
        version.save(tmp_path / f"{name}.png")
        hashes[name] = fingerprint(str(tmp_path / f"{name}.png")).perceptual
    apart = {name: (value ^ hashes["original"]).bit_count() for name, value in hashes.items()}
    assert max(apart[name] for name in ("compressed", "small", "bright")) <= 6
    assert apart["other"] > 12


@pytest.mark.parametrize("threads", [1, 3])
def test_equal_pixels_share_a_number(tmp_path: Path, make_png: Callable[..., Path], threads: int) -> None:
    paths = [str(make_png(tmp_path / f"{index:02}.png", index % 7, (40, 30))) for index in range(40)]
    Path(paths[11]).write_bytes(b"no image")
    Path(paths[12]).write_bytes(Path(paths[12]).read_bytes()[:60])
    calls: list[tuple[int, int]] = []
    found = read_fingerprints(paths, threads=threads, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 40) for done in range(1, 41)]
    assert list(found.broken) == paths[11:13] and "12.png" in found.broken[paths[12]]
    # the numbers are those of the first seven images, in their order
    assert found.number == {path: index % 7 for index, path in enumerate(paths) if index not in (11, 12)}
    assert found.perceptual.shape == (7,) and found.thumbnails.shape == (7, SIDE * SIDE)
    small = load_image(paths[3]).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    assert (found.thumbnails[3] == np.asarray(small).ravel()).all()


def test_no_images_and_a_broken_one() -> None:
    found = read_fingerprints([])
    assert (found.number, found.broken, found.thumbnails.shape) == ({}, {}, (0, SIDE * SIDE))
    assert read_fingerprints(["/nowhere.png"]).broken == {"/nowhere.png": "/nowhere.png: no such image file."}
    with pytest.raises(MedbridgeError, match="no such image file"):
        fingerprint("/nowhere.png")


def test_an_interrupt_ends_the_reading(tmp_path: Path, make_png: Callable[..., Path]) -> None:
    paths = [str(make_png(tmp_path / f"{index}.png", index)) for index in range(50)]

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_fingerprints(paths, threads=2, progress=stop)
