"""`medbridge data check` at full size: time and memory for 10,000 images of 512 x 512 with 100,000 questions.

    pytest bench/bench_data_check.py -s

Half of the images are grey PNG files, half JPEG files in colour; all differ but for 100 copies of training images in
the test split and 100 that are compressed anew, which the check must find and nothing else. Each run is a process of
its own, from opening the questions to the printed report. Memory is its peak, also for a quarter of the data. Seconds
stand beside their target and are not asserted: on shared cores they say as much about the neighbours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measure import MIB, rounded
from PIL import Image

IMAGES, QUESTIONS, COPIES, ROUNDS, SIDE = 10_000, 10, 100, 2, 512
TARGET_SECONDS, MOST_BYTES = 60.0, 600
"""A minute for each 10,000 images on two cores, and what a question with its share of an image may add to the peak."""


def picture(index: int) -> Image.Image:
    """Smooth shapes with some grain, as a scan has it, of its own for each index."""
    random = np.random.default_rng(index)
    shapes = Image.fromarray(random.integers(0, 256, (12, 12), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grain = random.integers(-4, 5, (SIDE // 4, SIDE // 4), np.int16)
    grey = np.clip(np.asarray(shapes, np.int16) + np.tile(grain, (4, 4)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey)


def make(folder: Path, images: int) -> Path:
    """A data folder: nine in ten images in train, the rest in test, of which 2 * COPIES are train's."""
    (folder / "images").mkdir(parents=True)
    train = images * 9 // 10
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for index in range(images):
        copied, anew = images - 2 * COPIES <= index, images - COPIES <= index
        image = picture(index - train if copied else index)
        name = f"images/{index}.{'jpg' if index % 2 else 'png'}"
        if index % 2 and not copied:
            image.convert("RGB").save(folder / name, quality=90)
        elif anew:
            name = f"images/{index}.jpg"
            image.convert("RGB").save(folder / name, quality=70)
        else:
            name = f"images/{index}.png"
            source = folder / f"images/{index - train}.jpg"
            (Image.open(source) if copied and source.is_file() else image).save(folder / name, compress_level=1)
        for number in range(QUESTIONS):
            row = {
                "dataset_name": "bench", "dataset_index": index * QUESTIONS + number, "image_paths": [name],
                "question": f"What is seen in region {number}?", "options": ["nothing", "a mass", "fluid", "air"],
                "answer": "nothing",
            }  # fmt: skip
            rows["train" if index < train else "test"].append(json.dumps(row))
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def check(folder: Path, threads: int) -> tuple[float, dict[str, Any]]:
    """Seconds and the report of one check in a process of its own, with its `peak` in KiB and `processor` seconds."""
    program = (
        "import json, sys, time; from pathlib import Path; from medbridge.data import *;"
        "f = open_items(DataSettings(sources=[SourceSettings(kind='jsonl', path=sys.argv[1])]), base_dir=Path('/'),"
        " cache_dir=Path('/'));"
        "report = check_items(f, threads=int(sys.argv[2])).to_dict();"
        "report['peak'] = next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'));"
        "report['processor'] = time.process_time();"
        "json.dump(report, open(sys.argv[3], 'w'))"
    )
    report = folder / "report.json"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, str(folder), str(threads), str(report)], check=True)
    return time.perf_counter() - start, json.loads(report.read_text())


def test_data_check(
    tmp_path: Path, save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, quarter = make(tmp_path / "whole", IMAGES), make(tmp_path / "quarter", IMAGES // 4)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for threads, taken in seconds.items():
            spent, report = check(whole, threads)
            taken.append(spent)
    small, peak = (found["peak"] * 1024 / MIB for found in (check(quarter, 2)[1], report))
    assert len(report["shared_images"]) == COPIES and len(report["near_images"]) == COPIES
    assert len(report["shared_questions"]) == COPIES * QUESTIONS == len(report["near_questions"])
    growth = (peak - small) * MIB / (QUESTIONS * (IMAGES - IMAGES // 4))
    figures = {
        "images": IMAGES,
        "questions": IMAGES * QUESTIONS,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": rounded(os.getloadavg()[0]),
        "seconds": {f"{threads} thread(s)": [rounded(spent) for spent in taken] for threads, taken in seconds.items()},
        "processor_seconds": rounded(report["processor"]),
        "target_seconds": TARGET_SECONDS,
        "peak_MiB": {str(IMAGES // 4): rounded(small), str(IMAGES): rounded(peak)},
        "bytes_a_question": rounded(growth),
        "found": {"shared": len(report["shared_images"]), "near": len(report["near_images"])},
    }
    with capsys.disabled():
        print(f"\n{json.dumps(figures, indent=1)}")
    save("data_check", "pytest bench/bench_data_check.py -s", figures)
    assert growth < MOST_BYTES
