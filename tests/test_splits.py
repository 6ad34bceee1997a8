"""Which part of the data an evaluation reads where none was named: the only one, or the user is asked."""

import copy
import dataclasses
import json
import os
import types

import pytest
from PIL import Image

from limber_jax import config_json
from limber_jax.config import Data, Source, Unnamed
from limber_jax.errors import UserError
from limber_jax.evals.linear_probe import LinearProbe
from limber_jax.evals.splits import named
from limber_jax.evals.zeroshot import ZeroShot
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.training.setup import make_eval
from tests import layouts, made, standins
from tests.runs import tiny

RECORDS = layouts.digits(6)


def folders(root, *parts):
  for part in parts:
    for name in ("cat", "dog"):
      os.makedirs(root / part / name)
      for i in range(2):
        Image.new("RGB", (4, 4), (i, len(part), 0)).save(root / part / name / f"{i}.png")
  return root


def split_of(name, path, **fields):
  config = named(ZeroShot(source=Source(name, str(path), **fields)), "pets")
  assert type(config.source.split) is str and len(config.source.open())
  return config.source.split


WITH_SEVERAL = {
  "folder": lambda d: folders(d / "f", "train", "test"),
  "folder around": lambda d: folders(d / "g", "outer/train", "outer/test"),
  "webdataset": lambda d: max(layouts.write_webdataset(d / "w" / s, RECORDS, suffix="png")
                              for s in ("train", "test")).parent,
  "parquet": lambda d: layouts.write_hub_parquet(d / "p", {"train": RECORDS, "test": RECORDS}),
  "huggingface": lambda d: layouts.write_saved_splits(d / "h", {"train": RECORDS, "test": RECORDS}),
  "coco": lambda d: standins.write_karpathy(d, counts={"train": 2, "test": 2}).path,
}


@pytest.mark.parametrize("layout", WITH_SEVERAL)
def test_an_evaluation_on_data_with_several_splits_lists_them_and_resumes_with_one(tmp_path, layout):
  name = layout.split()[0]
  path = WITH_SEVERAL[layout](tmp_path)
  with pytest.raises(UserError, match=r"config\.evals\.pets\.source: .* has the splits (train, test|test, train); say "
                                      r"which: --config\.evals\.pets\.source\.split=test$") as caught:
    split_of(name, path)
  assert "\n" not in str(caught.value)
  assert split_of(name, path, split="train") == "train" and split_of(name, path, split="test") == "test"


WITH_ONE = {
  "folder": (lambda d: (folders(d / "f", "val"), (d / "f" / "readme").mkdir())[0], "val"),
  "folder of classes": (lambda d: folders(d / "c", "."), ""),
  "webdataset": (lambda d: layouts.write_webdataset(d / "w" / "test", RECORDS, suffix="png").parent, "test"),
  "webdataset without": (lambda d: layouts.write_webdataset(d / "v", RECORDS, suffix="png"), "train"),
  "parquet": (lambda d: layouts.write_hub_parquet(d / "p", {"test": RECORDS}), "test"),
  "parquet without": (lambda d: layouts.write_img2dataset_parquet(d / "q", RECORDS), "train"),
  "huggingface": (lambda d: layouts.write_saved_splits(d / "h", {"test": RECORDS}), "test"),
  "huggingface without": (lambda d: layouts.write_saved(d / "s", RECORDS), "train"),
  "coco": (lambda d: standins.write_coco(d, count=3).path, ""),
  "captions": (lambda d: layouts.write_tsv(d / "t", RECORDS), "train"),
  "jsonl": (lambda d: layouts.write_jsonl(d / "j", RECORDS), "train"),
}


@pytest.mark.parametrize("layout", WITH_ONE)
def test_the_only_split_there_is_needs_no_name(tmp_path, layout):
  write, wanted = WITH_ONE[layout]
  assert split_of(layout.split()[0], write(tmp_path)) == wanted


def test_what_probes_learn_from_is_the_training_part(tmp_path):
  path = str(folders(tmp_path / "f", "train", "val"))
  found = named(LinearProbe(source=Source("folder", path, "val"), train=Source("folder", path)), "probe")
  assert (found.source.split, found.train.split, found.validation) == ("val", "train", None)
  with pytest.raises(UserError, match=r"evals\.probe\.validation"):
    named(dataclasses.replace(found, validation=Source("folder", path)), "probe")


def test_parts_of_the_data_are_never_taken_for_classes(tmp_path):
  with pytest.raises(UserError, match=r"its folders train, val are no classes but parts of the data; name one"):
    Source("folder", str(folders(tmp_path / "a", "train", "val", "meta")), "").open()
  vehicles = folders(tmp_path / "b", ".")
  os.rename(vehicles / "dog", vehicles / "train")  # which has no folders: a class
  assert Source("folder", str(vehicles), "").open().classes == ("cat", "train")
  os.makedirs(vehicles / "train" / "steam")
  Image.new("RGB", (4, 4)).save(vehicles / "train" / "steam" / "1.png")
  assert Source("folder", str(vehicles), "").open().classes == ("cat", "train")


def test_the_documentations_own_example_reads_class_folders_and_asks_which_of_several_parts(tmp_path, monkeypatch):
  """`Source(name="folder", path="data/my-pets")` of an evaluation, as docs/evaluate.md has it."""
  monkeypatch.chdir(tmp_path)
  folders(tmp_path / "data" / "my-pets", ".")
  evaluation = ZeroShot(source=Source(name="folder", path="data/my-pets"), every=1000,
                        templates="a photo of a {}, a type of pet.", batch_size=8)
  config = tiny(evals={"pets": evaluation})
  seen = []
  monkeypatch.setattr("limber_jax.evals.zeroshot.ZeroShot.open", lambda self, context: seen.append(self))
  setup = types.SimpleNamespace(config=config, task=Contrastive.from_config(config))
  context = made.context()
  make_eval(setup, "pets", context)
  assert seen[0].source.split == "" and evaluation.source.split == "train"
  os.rename(tmp_path / "data" / "my-pets" / "cat", tmp_path / "data" / "cat")
  folders(tmp_path / "data" / "my-pets", "train", "val")
  with pytest.raises(UserError, match="has the splits train, val"):
    make_eval(setup, "pets", context)


def test_old_configurations_mean_what_they_meant():
  plain = Source("folder", "x")
  assert plain.split == "train" and isinstance(plain.split, Unnamed)
  for same in (copy.deepcopy(plain), dataclasses.replace(plain, path="y"), Source(**dataclasses.asdict(plain))):
    assert isinstance(same.split, Unnamed)
  config = tiny(evals={"a": ZeroShot(source=plain)})
  values = json.loads(config_json.to_json(config))
  assert values["data.source.split"] == values["evals.a.source.split"] == "train"
  back = config_json.from_json(json.dumps(values), "x")
  assert not isinstance(back.evals["a"].source.split, Unnamed)  # it was written down
  config_json.check_same(config, json.dumps(values), "x")
  assert Data().source.split == "train" and named(back.evals["a"], "a") is back.evals["a"]
