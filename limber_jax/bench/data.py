"""`bench data`: images a second out of files, tars and packed shards, beside plain Pillow's and webdataset's.

All read the same JPEG files, cut out of the two photographs that come with scikit-learn, in the same number of
processes, and make uint8 [size, size, 3] of each: decoded, the shorter side scaled to `size` by PIL's bicubic filter, a
random square. Plain Pillow does that with the loose files and no more. Ours also tokenizes, stacks, and hands batches
to this process, in the order of a permutation of all records. webdataset reads the tars one after the other, and hands
batches over through torch's DataLoader.

Rounds go in turn, so that a machine that slows down slows all; a ratio is the median of the rounds'. A round begins
when the others have filled their buffers and rest, and after the batches that were ready. Where other programs take a
part of the cores, the time that cores worked for a contestant, with all of its processes, says more: the "cpu" ratios
are of that (on Linux).

At last a CLIP is trained from the tars with as many workers: "data_wait" is the share of its time, without the first
steps, in which a step waited for its batch.
"""

import contextlib
import glob
import io
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image
from sklearn.datasets import load_sample_images

from limber_jax.bench import measure
from limber_jax.config import Checkpoint, Compute, Config, Data, Optim, Source, Tokenizer
from limber_jax.data import pipeline, transforms
from limber_jax.data.packing import pack
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError, did_you_mean
from limber_jax.models import clip
from limber_jax.training.loop import train

_IMAGES = flags.DEFINE_integer("images", 512, "JPEG files, of 500 × 375 pixels.", 4)
_SIZE = flags.DEFINE_integer("size", 224, "Pixels of a side of the result.", 1, 375)
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that read.", 1)
_THREADS = flags.DEFINE_integer("threads", 1, "Reading threads of each process of ours.", 1)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images of a batch.", 1)
_ROUND = flags.DEFINE_integer("round", 20, "Batches that are timed at once.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds.", 1)
_PEER = flags.DEFINE_bool("peer", True, "Time webdataset with torch's DataLoader too, if both are installed.")
_STEPS = flags.DEFINE_integer("steps", 12, "Steps of the training run; 0 leaves it out.", 0)
_MODEL = flags.DEFINE_string("model", "clip_vit_b32", "What is trained.")
_PAIRS = flags.DEFINE_integer("pairs", 16, "Pairs of a step of training.", 1)

LAYOUTS = {"files": "captions", "tars": "webdataset", "packed": "packed"}  # to the source that reads them
SETTLE = 6  # batches, at least as many as are ready ahead of a caller
WARM = 4    # steps of training that do not count: compiling, and batches that were ready before


def main(argv: list[str]) -> None:
  """Prints one JSON object."""
  if argv:
    raise UserError(f"bench data: unexpected argument {argv[0]!r}")
  if _MODEL.value not in clip.SIZES:
    raise UserError(f"--model: no CLIP {_MODEL.value!r}{did_you_mean(_MODEL.value, clip.SIZES)}")
  if 0 < _STEPS.value <= WARM:
    raise UserError(f"--steps={_STEPS.value}: wanted 0, or more than the {WARM} that do not count")
  with tempfile.TemporaryDirectory() as folder:
    images = write(folder, _IMAGES.value, 4 * _WORKERS.value)
    out = measure.surroundings(("grain", "pillow")) | {
      "images": len(images), "bytes_an_image": statistics.mean(map(os.path.getsize, images)), "size": _SIZE.value,
      "workers": _WORKERS.value, "threads": _THREADS.value, "batch": _BATCH.value, **rates(folder, images)}
    if _STEPS.value:
      out["run"] = run(folder)
  measure.show(out)


def photographs(count: int) -> Iterator[bytes]:
  """Yields JPEG files of 500 × 375 pixels, each another part of two photographs, half of them mirrored."""
  rng, whole = np.random.default_rng(0), [Image.fromarray(image) for image in load_sample_images().images]
  for number in range(count):
    left, top = int(rng.integers(640 - 500 + 1)), int(rng.integers(427 - 375 + 1))
    part = whole[number % 2].crop((left, top, left + 500, top + 375))
    file = io.BytesIO()
    (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number % 4 < 2 else part).save(file, "JPEG", quality=90)
    yield file.getvalue()


def write(folder: str, count: int, tars: int) -> list[str]:
  """Writes the same pairs in every layout; returns the paths of the loose images."""
  paths, rows = [], []
  os.mkdir(os.path.join(folder, "tars"))
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(tarfile.open(os.path.join(folder, "tars", f"{k:05d}.tar"), "w")) for k in range(tars)]
    for number, image in enumerate(photographs(count)):
      name, text = f"{number:09d}", f"photograph {number} of a temple or of a flower"
      paths.append(os.path.join(folder, f"{name}.jpg"))
      with open(paths[-1], "wb") as file:
        file.write(image)
      rows.append(f"{text}\t{name}.jpg\n")
      for suffix, data in (("jpg", image), ("txt", text.encode())):
        member = tarfile.TarInfo(f"{name}.{suffix}")
        member.size = len(data)
        files[number * tars // count].addfile(member, io.BytesIO(data))
  with open(os.path.join(folder, "files"), "w", encoding="utf-8") as file:
    file.writelines(rows)
  pack(Source("webdataset", os.path.join(folder, "tars")), os.path.join(folder, "packed"), log=lambda _: None)
  return paths


def rates(folder: str, images: list[str]) -> dict[str, Any]:
  """Returns {"images_per_second": {contestant: …}, "files": {"speed_against_pillow", …}, "tars": …, "packed": …}."""
  size, batch, workers = _SIZE.value, _BATCH.value, _WORKERS.value
  transform = transforms.train(size, ByteTokenizer(), 77, "random", (0.9, 1.0))
  with contextlib.ExitStack() as stack:
    runs: dict[str, Callable[[int], Any]] = {}
    pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
    parts = [(images, size, k) for k in range(workers)]
    runs["pillow"] = lambda count: pool.starmap(pillow, [(*p, count * batch // workers) for p in parts], chunksize=1)

    def reader(batches: Iterator[Any]) -> Callable[[int], None]:
      return lambda count: [next(batches) for _ in range(count)] and None

    for layout, name in LAYOUTS.items():
      source = Source(name, os.path.join(folder, layout)).open()
      runs[layout] = reader(stack.enter_context(pipeline.train_batches(
        source, transform, batch_size=batch, rows=np.arange(batch), seed=0, workers=workers, threads=_THREADS.value)))
    if _PEER.value and (batches := webdataset(os.path.join(folder, "tars"), size, batch, workers)) is not None:
      runs["webdataset"] = reader(batches)
      stack.callback(lambda: runs.pop("webdataset"))  # its workers end with it

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_REPEATS.value):
      for name, read in runs.items():
        rest()
        read(SETTLE)
        start, used = time.perf_counter(), cpu_seconds()
        read(_ROUND.value)
        seconds[name].append(time.perf_counter() - start)
        cpu[name].append(cpu_seconds() - used)

  def rate(name: str) -> float:
    return _ROUND.value * batch / statistics.median(seconds[name])

  def against(peer: str, layout: str) -> dict[str, Any]:
    ratio, each = measure.ratios(seconds[peer], seconds[layout])
    out = {f"speed_against_{peer}": ratio, f"speed_of_each_round_against_{peer}": each}
    if all((*cpu[peer], *cpu[layout])):  # the system counts hundredths of a second
      ratio, each = measure.ratios(cpu[peer], cpu[layout])
      out |= {f"cpu_speed_against_{peer}": ratio, f"cpu_speed_of_each_round_against_{peer}": each}
    return out

  out: dict[str, Any] = {"images_per_second": {name: rate(name) for name in seconds}}
  out |= {layout: against("pillow", layout) for layout in LAYOUTS}
  if "webdataset" in seconds:
    out["tars"] |= against("webdataset", "tars")
  return out


def rest() -> None:
  """Waits until all processes have nothing more to do."""
  before = -1.0
  while before < 0 or cpu_seconds() - before > 0.05:
    before = cpu_seconds()
    time.sleep(0.5)


def cpu_seconds() -> float:
  """Returns the seconds that cores have worked for this process and its children, 0 where there is no /proc."""
  total = 0.0
  for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
    try:
      with open(f"/proc/{pid}/stat", "rb") as file:
        user, system = file.read().rpartition(b")")[2].split()[11:13]
    except OSError:
      return 0.0
    total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
  return total


def square(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
  """Returns uint8 [size, size, 3], as anyone would write it with Pillow."""
  short = min(image.size)
  image = image.resize((int(size * image.width / short), int(size * image.height / short)), Image.Resampling.BICUBIC)
  left, top = (int(rng.integers(side - size + 1)) for side in image.size)
  return np.array(image.crop((left, top, left + size, top + size)))


def pillow(images: list[str], size: int, seed: int, count: int) -> None:
  """Reads `count` of the files in a random order."""
  rng = np.random.default_rng(seed)
  for number in rng.integers(len(images), size=count):
    with Image.open(images[number]) as image:
      square(image.convert("RGB"), size, rng)


class Prepared:
  """What webdataset makes of (image, text)."""

  def __init__(self, size: int):
    self._size, self._rng = size, np.random.default_rng(0)

  def __call__(self, pair: tuple[Image.Image, str]) -> tuple[np.ndarray, str]:
    return square(pair[0], self._size, self._rng), pair[1]


def webdataset(folder: str, size: int, batch: int, workers: int) -> Iterator[Any] | None:
  """Returns endless batches of webdataset and torch; None, with a line on stderr, where one is not installed."""
  try:
    import torch
    import webdataset as wds
  except ImportError as error:
    measure.no_peer("webdataset", f"{error}; pip install webdataset torch brings it")
    return None
  urls = sorted(glob.glob(os.path.join(folder, "*.tar")))
  pairs = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "txt").map(Prepared(size)).repeat()
  return iter(torch.utils.data.DataLoader(pairs, batch, num_workers=workers, prefetch_factor=2,
                                          multiprocessing_context="spawn"))


def run(folder: str) -> dict[str, Any]:
  """Returns {"data_wait", "seconds_a_step", …} of a training run fed from the tars."""
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  data = Data(source=Source("webdataset", os.path.join(folder, "tars")), tokenizer=Tokenizer("bytes"),
              workers=_WORKERS.value, threads=_THREADS.value)
  config = Config("bench_data", clip.SIZES[_MODEL.value](), data=data, batch_size=_PAIRS.value, steps=_STEPS.value,
                  optim=Optim(warmup_steps=1), compute=Compute(dtype=dtype), log_every=1,
                  checkpoint=Checkpoint(every=_STEPS.value))
  workdir = os.path.join(folder, "run")
  train(config, workdir, log=lambda _: None)
  with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
    records = [r for r in map(json.loads, file) if "data_wait" in r and r["step"] > WARM]
  total = sum(r["seconds_per_step"] for r in records)
  return {"model": _MODEL.value, "pairs": _PAIRS.value, "steps": len(records),
          "seconds_a_step": total / len(records),
          "data_wait": sum(r["data_wait"] * r["seconds_per_step"] for r in records) / total,
          "data_wait_of_each_step": [r["data_wait"] for r in records]}
