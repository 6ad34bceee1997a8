"""The README's two quickstarts at full length, by the commands themselves."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_a_newcomer_gets_a_clip_and_a_limber_from_nothing(tmp_path):
  (tmp_path / "experiments").symlink_to(ROOT / "experiments")
  start = time.perf_counter()
  # It trains the quickstart's CLIP and the language model first.
  done = subprocess.run([sys.executable, "-m", "limber_jax.train", "--config=experiments/quickstart_limber.py",
                         "--workdir=runs/limber"], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  print(f"{time.perf_counter() - start:.0f} s")

  def last(run, key):
    records = map(json.loads, (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if key in r][-1]

  assert last("quickstart", "zeroshot/top1")["zeroshot/top1"] >= 0.95
  named = last("limber", "digits/right")
  assert named["digits/right"] >= 0.9 and named["digits/right@random"] < named["digits/right"]
  assert named["digits/blind"] <= 0.2 and named["digits/count"] == 360
  assert (tmp_path / "runs/quickstart/similarity.png").is_file()
  assert (tmp_path / "runs/limber/captions_digits.png").is_file()
