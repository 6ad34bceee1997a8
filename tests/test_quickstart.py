"""The README's two quickstarts at full length, by the commands themselves."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import layouts
from tests.runs import losses

ROOT = Path(__file__).parent.parent


@pytest.mark.process
@pytest.mark.long
def test_a_newcomer_gets_a_clip_and_a_limber_from_nothing(tmp_path):
  (tmp_path / "experiments").symlink_to(ROOT / "experiments")
  start = time.perf_counter()
  # It trains the quickstart's CLIP and the language model first.
  done = subprocess.run([sys.executable, "-m", "limber_jax.train", "--config=experiments/quickstart_limber.py",
                         "--workdir=runs/limber"], cwd=tmp_path, capture_output=True, text=True)
  wall = time.perf_counter() - start
  assert done.returncode == 0, done.stderr
  told = [json.loads(p.read_text())["wall_seconds"] for p in (tmp_path / "runs").glob("*/goodput.json")]
  print(f"R24: {wall:.1f} s, of which the ledgers of {len(told)} runs account for {sum(told):.1f} s")
  assert sum(told) == pytest.approx(wall, rel=0.01)

  def last(run, key):
    records = map(json.loads, (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if key in r][-1]

  assert last("quickstart", "zeroshot/top1")["zeroshot/top1"] >= 0.95
  named = last("limber", "digits/right")
  assert named["digits/right"] >= 0.9 and named["digits/right@random"] < named["digits/right"]
  assert named["digits/blind"] <= 0.2 and named["digits/count"] == 360
  assert (tmp_path / "runs/quickstart/similarity.png").is_file()
  assert (tmp_path / "runs/limber/captions_digits.png").is_file()


@pytest.mark.process
@pytest.mark.long
def test_the_quickstarts_losses_are_bit_equal_from_every_layout(tmp_path):
  records, steps = layouts.digits(1437), 100
  layouts.write_webdataset(tmp_path / "tars", records, 500, "png")
  layouts.write_img2dataset_parquet(tmp_path / "parquet", records, 500)
  layouts.write_tsv(tmp_path / "table", records)

  def run(module, *arguments):
    done = subprocess.run([sys.executable, "-m", f"limber_jax.{module}", *arguments], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr

  run("pack", str(tmp_path / "tars"), str(tmp_path / "packed"))
  found = {}
  for name, path in (("webdataset", "tars"), ("parquet", "parquet"), ("captions", "table/train.tsv"),
                     ("packed", "packed")):
    run("train", "--config=experiments/quickstart.py", f"--workdir={tmp_path / name}", f"--config.steps={steps}",
        "--config.log_every=1", f"--config.data.source.name={name}", f"--config.data.source.path={tmp_path / path}")
    found[name] = losses(tmp_path / name)
  print(f"{steps} steps of the quickstart from {', '.join(found)}: the last loss is "
        f"{', '.join(float.fromhex(f[steps]).hex() for f in found.values())}")
  assert list(found["packed"]) == list(range(1, steps + 1)) and all(f == found["packed"] for f in found.values())
