"""Features on disk in place of images: the same losses, whatever ends the writing, and nothing else's features."""

import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from runs import environment, losses

from limber_jax.config import Checkpoint, Compute, Config, Data, Mesh, Optim, Source, Tokenizer
from limber_jax.data import features
from limber_jax.data.sources.digits import Digits
from limber_jax.errors import UserError
from limber_jax.inference import encoding
from limber_jax.inference.encoding import encode
from limber_jax.models import encoders, gptj
from limber_jax.models.limber import LimberConfig, Projector
from limber_jax.runtime import parallel
from limber_jax.runtime.lock import Lock
from limber_jax.training.loop import train
from limber_jax.training.setup import feature_specs, setup


def limber(mesh=(1, 1, 1), *, encoder="beit_l16_mu", extra_projectors=None, dtype="float32", crop="encoder",
           split="test", seed=0, **changes):
  """Returns a tiny experiment on 360 digits; the encoder is random, from `seed`."""
  lm = dataclasses.replace(gptj.SIZES["gptj_mu"](), vocab=260, context=64)
  data = Data(source=Source(name="digits", split=split), tokenizer=Tokenizer(name="bytes"), crop=crop, length=24,
              threads=2)
  defaults = {
    "name": "tiny", "task": "captioning",
    "trainable": ("prompt", *(f"prompt@{name}" for name in extra_projectors or {})),
    "model": LimberConfig(image=encoders.encoder_size(encoder), lm=lm,
                          extra_projectors=extra_projectors or {}),
    "batch_size": 16, "steps": 4, "data": data,
    "optim": Optim(lr=1e-2, warmup_steps=1), "compute": Compute(dtype=dtype), "mesh": Mesh(*mesh),
    "checkpoint": Checkpoint(every=100), "seed": seed, "log_every": 1}
  return Config(**(defaults | changes))


@pytest.fixture(autouse=True)
def only_the_devices_of_the_mesh(monkeypatch):
  """A mesh of one device, of the eight that are simulated, is an error to a user, and what most tests here want."""
  make = parallel.make_mesh
  monkeypatch.setattr(parallel, "make_mesh", lambda sizes: make(sizes, jax.devices()[: math.prod(sizes.values())]))


def quiet(config, out):
  """Encodes in shards of 96 records: whole batches of 16 images × 16 tokens × 64 × 4 bytes, less than 0.4 MB."""
  said = []
  return encode(config, str(out), shard_mb=0.4, log=said.append), said


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A finished directory of `limber()`; not to be changed."""
  out = tmp_path_factory.mktemp("written") / "features"
  with pytest.MonkeyPatch.context() as patch:
    make = parallel.make_mesh
    patch.setattr(parallel, "make_mesh", lambda sizes: make(sizes, jax.devices()[:1]))
    done, said = quiet(limber(), out)
  assert done and "4 of 4 shards" in said[0] and said[-1] == f"done: train with --config.data.features={out}"
  return out


def contents(directory):
  return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


def with_features(config, directory):
  config.data.features = str(directory)
  return config


class TestWhatIsWritten:

  def test_features_stand_at_the_number_of_their_record_and_are_the_encoders_own(self, written):
    s = setup(limber())
    source, specs = Digits(Source(split="test")), feature_specs(s)
    stored = features.FeatureSource(source, str(written), specs)
    assert len(stored) == len(source) == 360 and stored.classes == source.classes
    assert stored.fingerprint() == source.fingerprint()
    chosen = [0, 95, 96, 200, 359]
    transform = s.task.transform(s.tokenizer, s.config.data, train=False)
    images = np.stack([transform(source[i], None)["image"] for i in chosen])
    expected = s.task.predict()["features"](s.frozen.params, s.frozen.stats, {"image": images})
    for i, want in zip(chosen, np.asarray(expected), strict=True):
      record = stored[i]
      assert "image" not in record and record["id"] == source.annotation(i)["id"]
      assert record["features"].dtype == np.float32 and record["features"].shape == (16, 64)
      np.testing.assert_allclose(record["features"], want, atol=1e-5)  # outside of jit: other sums

  def test_the_manifest_says_what_the_features_are_of(self, written):
    manifest = json.loads((written / "manifest.json").read_text())
    assert sorted(os.listdir(written)) == [*(f"features-0000{i}-of-00004.array_record" for i in range(4)),
                                           "manifest.json"]
    assert [s["records"] for s in manifest["shards"]] == [96, 96, 96, 72]
    assert manifest["records"] == 360 and manifest["source"] == Digits(Source(split="test")).fingerprint()
    image = manifest["encoders"]["image"]
    assert image["shape"] == [16, 64] and image["dtype"] == "float32" and len(image["weights"]) == 32
    assert image["pixels"] == {"size": 32, "crop": "squash", "resample": "bilinear"}
    assert image["encoder"]["mean"] == [0.5, 0.5, 0.5] and image["encoder"]["tower.patch"] == 8

  def test_a_source_survives_pickling_and_threads_and_many_shards(self, written, monkeypatch):
    monkeypatch.setattr(features, "OPEN", 2)
    stored = features.FeatureSource(Digits(Source(split="test")), str(written), feature_specs(setup(limber())))
    expected = [stored[i]["features"] for i in range(360)]
    copy = pickle.loads(pickle.dumps(stored))
    wrong = []

    def read(seed):
      for i in np.random.default_rng(seed).integers(360, size=200).tolist():
        if not np.array_equal(copy[i]["features"], expected[i]):
          wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert not wrong and len(copy._readers) <= 2


class TestTraining:

  def test_losses_from_features_equal_those_from_images(self, written, tmp_path):
    live = train(limber(), str(tmp_path / "live"), log=lambda _: None)
    # The images are gone: nothing may read them.
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(Digits, "__getitem__", lambda *_: pytest.fail("an image was read"))
      from_disk = train(with_features(limber(), written), str(tmp_path / "cached"), log=lambda _: None)
    assert losses(str(tmp_path / "cached")) == losses(str(tmp_path / "live"))
    for a, b in zip(jax.tree.leaves(from_disk.params), jax.tree.leaves(live.params), strict=True):
      np.testing.assert_array_equal(a, b)

  def test_a_run_resumes_with_features_where_it_began_with_images(self, written, tmp_path):
    def config():
      return limber(checkpoint=Checkpoint(every=2, keep=2))

    train(config(), str(tmp_path), log=lambda _: None)
    whole = losses(str(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    said = []
    train(with_features(config(), written), str(tmp_path), log=said.append)
    assert "resuming from step 2" in said[0] and losses(str(tmp_path)) == whole

  def test_bfloat16_features_of_several_encoders(self, tmp_path):
    clip = dataclasses.replace(encoders.encoder_size("clip_vit_b32_mu"), features="pooled")
    config = limber(extra_projectors={"pooled": Projector(image=clip)}, dtype="bfloat16")
    done, _ = quiet(config, tmp_path / "features")
    manifest = json.loads((tmp_path / "features" / "manifest.json").read_text())
    assert done and list(manifest["encoders"]) == ["image", "image@pooled"]
    assert {e["dtype"] for e in manifest["encoders"].values()} == {"bfloat16"}
    s, source = setup(config), Digits(Source(split="test"))
    stored = features.FeatureSource(source, str(tmp_path / "features"), feature_specs(s))
    transform = {on: s.task.transform(s.tokenizer, dataclasses.replace(config.data, features=on), train=True)
                 for on in ("", "x")}
    rows = {on: [transform[on](records[i], None) for i in range(16)] for on, records in (("", source), ("x", stored))}
    live, read = ({k: np.stack([row[k] for row in rows[on]]) for k in rows[on][0]} for on in ("", "x"))
    assert sorted(read) == ["features", "features@pooled", "label", "mask", "tokens"]
    assert read["features"].dtype == read["features@pooled"].dtype == np.dtype("bfloat16")
    params, predict = s.frozen.params | s.init().params, s.task.predict()
    a, b = (jax.jit(predict["nll@pooled"])(params, s.frozen.stats, batch) for batch in (read, live))
    # On its way from the encoder to the map XLA may keep more bits than bfloat16 has: training losses were equal to the
    # bit with --xla_allow_excess_precision=false, and 5e-6 apart without.
    np.testing.assert_allclose(a, b, rtol=1e-3)


def stopped_at(record, how):
  """Returns a ShardWriter that does `how()` before it writes a record."""
  count = 0

  class Stopped(features.ShardWriter):
    def write(self, data):
      nonlocal count
      count += 1
      if count == record:
        how()
      super().write(data)

  return Stopped


class Killed(BaseException):
  pass


class TestGoingOn:

  def test_killed_anywhere_and_started_again_gives_identical_files(self, written, tmp_path, monkeypatch):
    out = tmp_path / "features"

    def kill():
      raise Killed

    for record in (150, 1, 97):
      with monkeypatch.context() as patch:
        patch.setattr(features, "ShardWriter", stopped_at(record, kill))
        patch.setattr(features.ShardWriter, "detach", lambda self: None)  # a killed process tidies nothing up
        with pytest.raises(Killed):
          quiet(limber(), out)
      assert any(name.endswith(".tmp") for name in os.listdir(out)) and "manifest.json" not in os.listdir(out)
      with pytest.raises(UserError, match="is not finished: run the same"):
        features.FeatureSource(Digits(Source(split="test")), str(out), {})
    _, said = quiet(limber(), out)
    assert "2 of 4 shards" in said[0]
    assert contents(out) == contents(written)

  def test_sigterm_leaves_whole_shards_and_the_same_command_resumes(self, written, tmp_path, monkeypatch):
    out = tmp_path / "features"
    with monkeypatch.context() as patch:
      patch.setattr(features, "ShardWriter", stopped_at(150, lambda: os.kill(os.getpid(), signal.SIGTERM)))
      done, said = quiet(limber(), out)
    assert not done and said[-1].startswith("stopped by SIGTERM")
    assert not any(name.endswith(".tmp") for name in os.listdir(out))
    monkeypatch.setattr(encoding, "PROGRESS", 0)
    done, said = quiet(limber(), out)
    assert done and re.fullmatch(r"\d+ of 264 images  [\d,]+ images/s  left 0:00:\d\d", said[1])
    assert contents(out) == contents(written)

  def test_a_complete_directory_is_left_alone_and_a_lost_shard_written_again(self, written, tmp_path):
    (written / "unfinished.json").write_text("of a run killed at its very end")
    before = {name: os.stat(written / name).st_mtime_ns for name in contents(written) if name != "unfinished.json"}
    done, said = quiet(limber(), written)
    assert done and said == [f"{written} is complete: features of 360 images in 4 shards"]
    assert {name: os.stat(written / name).st_mtime_ns for name in os.listdir(written)} == before
    out = tmp_path / "features"
    out.mkdir()
    for name, data in contents(written).items():
      (out / name).write_bytes(data if "00002-of" not in name else data[:-1])
    _, said = quiet(limber(), out)
    assert "1 of 4 shards" in said[0] and contents(out) == contents(written)

  def test_shards_without_a_manifest_are_not_adopted(self, written, tmp_path):
    name = "features-00000-of-00004.array_record"
    (tmp_path / name).write_bytes((written / name).read_bytes())
    with pytest.raises(UserError, match=r"holds shards but no manifest\.json"):
      quiet(limber(), tmp_path)

  def test_no_room_is_reported_before_the_work(self, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"360 images with 4,096 bytes of features each take 0\.0 GB, only 0\.0 GB are"):
      quiet(limber(), tmp_path / "features")


def cropped():
  """Returns `limber()` with an encoder whose directory asked for a larger resize and another rounding."""
  config = limber()
  config.model.image = dataclasses.replace(config.model.image, resize_to=40, crop_rounding="down")
  return config


OTHER = [
  (cropped, r"\(image\.pixels\.resize_to: got None, wanted 40; image\.pixels\.crop_rounding: got None, wanted down"),
  (lambda: limber(seed=1), r"\(image\.weights: got [0-9a-f]{12}, wanted [0-9a-f]{12}"),
  (lambda: limber(split="train"), r"source: got \w+, wanted \w+; records: got 360, wanted 1437"),
  (lambda: limber(crop="center"), r"\(image\.pixels\.crop: got squash, wanted center"),
  (lambda: limber(dtype="bfloat16"), r"\(image\.dtype: got float32, wanted bfloat16"),
  (lambda: limber(extra_projectors={"x": Projector(image=encoders.encoder_size("beit_l16_mu"))}),
   r"not the same 'image@x'"),
]


class TestWhatIsRefused:

  @pytest.mark.parametrize(("config", "message"), OTHER)
  def test_features_of_something_else(self, written, config, message):
    s = setup(config(), only="image")
    source = Digits(s.config.data.source)
    for call in (lambda: features.FeatureSource(source, str(written), feature_specs(s)),
                 lambda: quiet(config(), written)):
      with pytest.raises(UserError, match=message) as caught:
        call()
      assert "\n" not in str(caught.value) and str(written) in str(caught.value)

  def test_an_encoder_that_computes_something_else_with_the_same_weights(self, written, tmp_path):
    changed = limber()
    changed.model.image = dataclasses.replace(changed.model.image, mean=(0.4, 0.5, 0.5))
    with pytest.raises(UserError, match=r"encoder\.mean: got \[0\.5, 0\.5, 0\.5\], wanted \[0\.4, 0\.5, 0\.5\]"):
      train(with_features(changed, written), str(tmp_path), log=lambda _: None)

  @pytest.mark.parametrize(("damage", "message"), [
    (lambda shard: shard.write_bytes(shard.read_bytes()[:-4096]), "wanted 96 records in .* bytes, got"),
    (lambda shard: shard.unlink(), "wanted 96 records in .* bytes, it is missing"),
  ])
  def test_damaged_shards_when_they_are_opened(self, written, tmp_path, damage, message):
    for name, data in contents(written).items():
      (tmp_path / name).write_bytes(data)
    specs = feature_specs(setup(limber(), only="image"))
    damage(tmp_path / "features-00001-of-00004.array_record")
    with pytest.raises(UserError, match=message):
      features.FeatureSource(Digits(Source(split="test")), str(tmp_path), specs)

  def test_changed_bytes_when_they_are_read(self, written, tmp_path):
    for name, data in contents(written).items():
      (tmp_path / name).write_bytes(data)
    shard = tmp_path / "features-00001-of-00004.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    specs = feature_specs(setup(limber(), only="image"))
    stored = features.FeatureSource(Digits(Source(split="test")), str(tmp_path), specs)
    with pytest.raises(UserError, match="cannot be read"):
      [stored[i] for i in range(96, 192)]
    # As long as the manifest says, but empty: this is how ArrayRecord opens a file cut short.
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="wanted 96 records, got 0"):
      pickle.loads(pickle.dumps(stored))[96]

  @pytest.mark.parametrize(("text", "message"), [
    (None, r"no manifest\.json there; make it with"), ("{", "is no manifest of features"),
    ('{"version": 9}', "features of version 9, this program reads 1"), ('{"version": 1}', "no 'encoders' in it")])
  def test_what_is_no_directory_of_features(self, tmp_path, text, message):
    if text is not None:
      (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
      features.FeatureSource(Digits(Source()), str(tmp_path), {})

  @pytest.mark.parametrize(("changes", "message"), [
    ({"crop": "random"}, r"config\.data\.crop='random' shows an encoder another crop in every epoch"),
    ({"crop": "resized"}, r"config\.data\.crop='resized'"),
    ({"trainable": ("prompt", "image")}, "a trained one needs the images"),
  ])
  def test_features_that_would_change_in_training(self, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
      encode(limber(**changes), str(tmp_path / "features"))
    with pytest.raises(UserError, match=message):
      train(with_features(limber(**changes), tmp_path), str(tmp_path / "run"))
    assert not os.listdir(tmp_path)

  def test_an_encoder_that_is_yet_to_be_trained(self, tmp_path):
    config = limber(prerequisites={"runs/nowhere": "experiments/quickstart.py"})
    config.init.image = "runs/nowhere"
    with pytest.raises(UserError, match=r"first, in runs/nowhere: .*train --config=experiments/quickstart"):
      encode(config, str(tmp_path / "features"))

  def test_tasks_without_frozen_encoders(self, tmp_path):
    from runs import tiny
    with pytest.raises(UserError, match="none of task 'contrastive'"):
      encode(tiny(), str(tmp_path / "features"))


EXPERIMENT = """
import sys
sys.path.insert(0, {tests!r})
from test_encode import limber

def get_config():
  return limber((-1, 1, 1), split="train")
"""


@pytest.fixture
def command(tmp_path):
  """Returns a function that starts the real command on `limber()` with all 1,437 digits: six shards of 1 MB."""
  file = tmp_path / "tiny.py"
  file.write_text(EXPERIMENT.format(tests=os.path.dirname(__file__)))

  def start(out, *more, devices=1, processes=1, index=0, port=0):
    env = environment(devices, processes, index, port)
    return subprocess.Popen([sys.executable, "-m", "limber_jax.encode", f"--config={file}", f"--out={out}",
                             "--shard_mb=1", *more],
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  return start


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@pytest.mark.process
def test_two_processes_write_what_one_does_also_after_a_kill(command, tmp_path):
  port = free_port()
  pair = [command(tmp_path / "pair", processes=2, index=i, port=port) for i in range(2)]
  alone = command(tmp_path / "alone", devices=2)
  alone.stdout.readline()
  alone.kill()  # while it compiles or writes
  alone.communicate()
  outputs = [p.communicate(timeout=240)[0] for p in pair]
  assert [p.returncode for p in pair] == [0, 0], outputs
  assert "6 of 6 shards to write" in outputs[0] and "done: train with" in outputs[0] and "done" not in outputs[1]
  alone = command(tmp_path / "alone", devices=2)
  output, _ = alone.communicate(timeout=240)
  assert alone.returncode == 0, output
  assert contents(tmp_path / "pair") == contents(tmp_path / "alone")


def test_two_do_not_encode_into_one_directory(tmp_path):
  with Lock(tmp_path / "out" / ".lock"):
    with pytest.raises(UserError, match=f"--out=.*/out is in use by process {os.getpid()} on host"):
      quiet(limber(), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [".lock"]
  assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_the_command_tells_a_mistake_in_one_line_and_exits_2(command, tmp_path):
  for more, message in (
      (["--config.data.crop=random"], "error: config.data.crop='random' shows an encoder another crop in every epoch"),
      (["--out="], "error: --out is missing")):
    process = command(tmp_path / "features", *more)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and output.startswith(message) and output.count("\n") == 1, output
