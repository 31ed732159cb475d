"""How fast near images are found: `python -m benchmarks.image_search [--images 200]`.

First the search for hashes within 4 bits: random hashes, to 1 % of which a copy with 0 to 4 changed bits was planted.
Then fingerprints of photograph-like JPEG and PNG files beside decoding alone. Each figure is the best of three; beside
the seconds stand those of the processor, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from filters.images import fingerprints, near_matches, near_pairs

DISTANCE = 4
NUM_RUNS = 3


def best_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds of the clock and of the processor, each the best of the runs."""
    runs = []
    for _ in range(NUM_RUNS):
        clock, processor = time.perf_counter(), time.process_time()
        work()
        runs.append((time.perf_counter() - clock, time.process_time() - processor))
    return min(run[0] for run in runs), min(run[1] for run in runs)


def with_bits_changed(hashes: NDArray[np.uint64], rng: np.random.Generator) -> NDArray[np.uint64]:
    """Returns copies with 1 to 4 bits changed; a bit drawn twice is changed once."""
    changed = np.zeros_like(hashes)
    num_bits = rng.integers(1, DISTANCE + 1, len(hashes))
    for draw in range(DISTANCE):
        bits = np.uint64(1) << rng.integers(0, 64, len(hashes), np.uint64)
        changed |= np.where(num_bits > draw, bits, np.uint64(0))
    return hashes ^ changed


def search(num: int, rng: np.random.Generator) -> None:
    """Random hashes have 3e-14 n^2 pairs within 4 bits by chance, none to be expected below five million."""
    num_planted = num // 100
    hashes = rng.integers(0, 2**64, num - num_planted, np.uint64)
    table = np.concatenate((hashes, with_bits_changed(hashes[:num_planted], rng)))
    first, second = near_pairs(table, DISTANCE)
    num_found = int(((second - first) == len(hashes)).sum())
    assert num_found == num_planted and len(first) == num_planted, (num_found, len(first), num_planted)
    for num_workers in (1, 2):
        clock, processor = best_seconds(lambda: near_pairs(table, DISTANCE, num_workers=num_workers))  # noqa: B023
        print(
            f"near_pairs    {num:>10,} hashes, {num_workers} thread(s): {clock:6.2f} s, processor {processor:6.2f} s, "
            f"found {num_found:,} of {num_planted:,} planted"
        )


def refresh(num_new: int, num_old: int, rng: np.random.Generator) -> None:
    old = rng.integers(0, 2**64, num_old, np.uint64)
    new = np.concatenate(
        (rng.integers(0, 2**64, num_new * 9 // 10, np.uint64), with_bits_changed(old[: num_new // 10], rng))
    )
    first, _ = near_matches(new, old, DISTANCE)
    assert len(first) == num_new // 10, (len(first), num_new // 10)
    clock, processor = best_seconds(lambda: near_matches(new, old, DISTANCE))
    print(f"near_matches  {num_new:,} new, {num_old:,} old, 2 threads: {clock:6.2f} s, processor {processor:6.2f} s")


def photograph(rng: np.random.Generator) -> Image.Image:
    """Returns noise of many scales, 1024 x 768 pixels, 1.2 bits a pixel as JPEG of quality 85."""
    total = np.zeros((768, 1024, 3), np.float32)
    for cells in (4, 16, 64, 256, 768):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(noise.resize((1024, 768), Image.Resampling.BICUBIC), np.float32) / cells**0.45
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def decode(encoded: bytes) -> None:
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()


def hashing(form: str, num_images: int, rng: np.random.Generator) -> None:
    files = []
    for _ in range(8):
        stream = io.BytesIO()
        photograph(rng).save(stream, form, quality=85)
        files.append(stream.getvalue())
    images = {f"{place:064x}": files[place % len(files)] for place in range(num_images)}

    def decode_all(num_workers: int) -> None:
        with ThreadPoolExecutor(num_workers) as pool:
            for _ in pool.map(decode, images.values()):
                pass

    kilobytes = sum(map(len, files)) // len(files) // 1024
    for num in (1, 2):
        clock, processor = best_seconds(lambda: fingerprints(images.__getitem__, list(images), num_workers=num))  # noqa: B023
        plain, plain_processor = best_seconds(lambda: decode_all(num))  # noqa: B023
        print(
            f"fingerprints  {form}, 1024 x 768, {kilobytes} KiB, {num} thread(s): {num_images / clock:6.0f} images/s; "
            f"decoding alone {num_images / plain:6.0f}; time {clock / plain:.2f} x decoding "
            f"(processor {processor / plain_processor:.2f} x)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="images hashed per run")
    parser.add_argument("--old", type=int, default=10_000_000, help="old hashes of the refresh")
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    near_pairs(np.arange(9, dtype=np.uint64), DISTANCE)
    for num in (100_000, 1_000_000):
        search(num, rng)
    refresh(100_000, options.old, rng)
    for form in ("JPEG", "PNG"):
        hashing(form, options.images, rng)


if __name__ == "__main__":
    main()
