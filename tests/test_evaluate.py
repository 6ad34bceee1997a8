"""The command `evaluate` from end to end: data sets in their real layouts, kills, several processes, missing files."""

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import environment, tiny, untrained
from safetensors.numpy import save_file
from standins import (
  write_awa2,
  write_coco,
  write_imagenet_folders,
  write_karpathy,
  write_nocaps,
  write_tfds,
  write_vqa2,
)

from limber_jax import cli
from limber_jax.checkpoints import workdirs
from limber_jax.errors import UserError
from limber_jax.evals.captions import Captions
from limber_jax.models.clip import openai_weights
from limber_jax.models.gptj import GPTJSize
from limber_jax.reports import results_file
from limber_jax.runtime.lock import Lock
from limber_jax.training import results
from limber_jax.training.setup import setup
from limber_jax.weights import convert, load

TESTS = os.path.dirname(__file__)
EXPERIMENT = """
import sys
sys.path.insert(0, {tests!r})
from runs import tiny, tiny_limber
from limber_jax.config import Source, evaluation_of

KARPATHY = Source("coco", "data/coco/dataset_coco.json", "test")
DIGITS = Source("tfds", "data/tfds/digits_in_classes", "test")
AWA2 = Source("awa2", "data/Animals_with_Attributes2", "all")

def evaluation(name, source, **fields):
  return evaluation_of(name)(source, **{{"every": -1, "batch_size": 8, "max_bad_fraction": 0.5, **fields}})

def clip():
  return tiny(mesh=(-1, 1, 1), evals={{
    "digits": evaluation("zeroshot", DIGITS, templates="imagenet7"),
    "retrieval": evaluation("retrieval", KARPATHY, prompt="a photo of {{}}"),
    "robustness": evaluation("robustness", Source("folder", "data/imagenet-r", ""), dataset="imagenet_r",
                             templates="{{}}"),
    "probe": evaluation("linear_probe", DIGITS, train=Source("digits", split="test"), shots=(1, 2), batch_size=64,
                        templates="{{}}"),
    "contamination": evaluation("contamination", DIGITS, train=Source("digits", split="test"), templates="{{}}"),
  }})

def limber():
  return tiny_limber(evals={{
    "coco": evaluation("captions", KARPATHY, metrics=("cider_d", "bleu_4", "clip_s"), scorer={scorer!r}),
    "nocaps": evaluation("captions", Source("coco", "data/nocaps/nocaps_val_4500_captions.json", ""),
                         metrics=("cider_d",)),
    "vqa2": evaluation("vqa", Source("vqa", "data/vqa2", "val2014"), train=Source("vqa", "data/vqa2", "train2014"),
                       shots=(0, 1), metrics=("accuracy",)),
    "awa2": evaluation("class_mention", AWA2),
    "word_recall": evaluation("word_recall", KARPATHY),
    "hallucination": evaluation("hallucination", KARPATHY, metrics=("run_off",)),
    "prompt_probing": evaluation("prompt_probing", AWA2, metrics=("category", "nearest")),
  }})

get_config = {task}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Returns a directory of data sets in their real layouts, damaged in all the ways that there are."""
  root = tmp_path_factory.mktemp("data")
  write_coco(root / "coco", hostile=True)
  write_karpathy(root / "coco", hostile=True)
  write_nocaps(root / "nocaps", hostile=True)
  write_vqa2(root / "vqa2", hostile=True)
  write_vqa2(root / "vqa2", subset="train2014")
  write_awa2(root, hostile=True)
  write_imagenet_folders(root, ("n01443537", "n01484850"), hostile=True)
  write_tfds(root / "tfds", hostile=True)
  return root


class Run:
  """A workdir with an untrained model, and the command on it."""

  def __init__(self, root, task, data):
    self.root, self.data = root, data
    self.experiment = root / "experiment.py"
    scorer = str(root / "clip")
    self.experiment.write_text(EXPERIMENT.format(tests=TESTS, task=task, scorer=scorer))
    if task == "limber":
      untrained(tiny(mesh=(-1, 1, 1)), scorer)
    untrained(cli.load_experiment(str(self.experiment)), str(root / "workdir"))

  def copy(self, name):
    return shutil.copytree(self.root / "workdir", self.root / name)

  def start(self, workdir, *flags, devices=2, processes=1, index=0, port=0):
    return subprocess.Popen(
      [sys.executable, "-m", "limber_jax.evaluate", f"--config={self.experiment}", f"--workdir={workdir}",
       f"--data={self.data}", *flags], env=environment(devices, processes, index, port),
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

  def finish(self, workdir, *flags, **place):
    process = self.start(workdir, *flags, **place)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="module", params=["clip", "limber"])
def run(request, tmp_path_factory, data):
  root = tmp_path_factory.mktemp(request.param)
  out = Run(root, request.param, data)
  out.workdir = out.copy("whole")
  out.code, out.out, out.err = out.finish(out.workdir)
  return out


def lines(workdir):
  """Returns the number of results of examples that are on disk."""
  return sum(path.read_bytes().count(b"\n") for path in Path(workdir, "evaluation").rglob("*.jsonl"))


@pytest.mark.process
def test_every_evaluation_runs_on_the_real_layouts_and_says_what_it_left_out(run):
  assert run.code == 0, run.err
  found = json.loads((run.workdir / "results.json").read_text())
  config = cli.load_experiment(str(run.experiment))
  assert found["failed"] == {} and found["evaluations"].keys() == config.evals.keys()
  for name, e in found["evaluations"].items():
    metadata = e["metadata"]
    assert e["metrics"] and metadata["covered"] == metadata["num_examples"] - metadata["damaged"] > 0, name
    assert metadata["damaged"] > 0, name
    for line in metadata["damage"]:  # each named once, by the evaluation
      assert run.err.count(f"{name}: {line}\n") >= 1 and metadata["damage"].count(line) == 1, line
  report = (run.workdir / "report.md").read_text()
  assert all(name in report for name in config.evals)
  assert "of" in report and str(run.data) not in json.dumps([e["metrics"] for e in found["evaluations"].values()])


@pytest.mark.process
def test_killed_and_started_again_it_writes_the_same_results(run):
  workdir = run.copy("killed")
  for share in (0.2, 0.7):
    process = run.start(workdir)
    while lines(workdir) < share * lines(run.workdir) and process.poll() is None:
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  assert lines(workdir) > 0
  code, _, err = run.finish(workdir)
  assert code == 0, err
  assert (workdir / "results.json").read_bytes() == (run.workdir / "results.json").read_bytes()
  assert (workdir / "report.md").read_bytes() == (run.workdir / "report.md").read_bytes()


@pytest.mark.process
def test_two_processes_write_the_same_results(run):
  workdir = run.copy("two")
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  both = [run.start(workdir, devices=1, processes=2, index=i, port=port) for i in range(2)]
  ends = [p.communicate(timeout=600) for p in both]
  assert [p.returncode for p in both] == [0, 0], ends
  assert (workdir / "results.json").read_bytes() == (run.workdir / "results.json").read_bytes()


@pytest.fixture
def clip(tmp_path, data):
  """Returns (the experiment of CLIP, its workdir)."""
  run = Run(tmp_path, "clip", data)
  return cli.load_experiment(str(run.experiment)), tmp_path / "workdir"


@pytest.mark.process
def test_missing_data_are_named_and_the_others_go_on(clip, data, capsys):
  config, workdir = clip
  config.evals = {name: config.evals[name] for name in ("digits", "retrieval")}
  config.evals["retrieval"].source.path = "data/nowhere.json"
  found = results.results(config, str(workdir), data=str(data))
  assert found["evaluations"].keys() == {"digits"} and found["failed"].keys() == {"retrieval"}
  assert f"retrieval: not evaluated: {found['failed']['retrieval']}" in capsys.readouterr().err
  assert "nowhere.json" in found["failed"]["retrieval"] and "https://" in found["failed"]["retrieval"]
  results_file.write(found, str(workdir))
  # With the data there, the one that was missing is added to what there is.
  config.evals["retrieval"].source.path = str(data / "coco/dataset_coco.json")
  more = results.results(config, str(workdir), only=("retrieval",))
  results_file.write(more, str(workdir))
  found = json.loads((workdir / "results.json").read_text())
  assert found["evaluations"].keys() == {"digits", "retrieval"} and not found["failed"]


@pytest.mark.process
def test_a_file_cut_in_half_fails_its_evaluation_alone(clip, data, tmp_path):
  config, workdir = clip
  whole = (data / "coco/dataset_coco.json").read_bytes()
  (tmp_path / "cut.json").write_bytes(whole[: len(whole) // 2])
  config.evals = {name: config.evals[name] for name in ("digits", "retrieval")}
  config.evals["retrieval"].source.path = str(tmp_path / "cut.json")
  found = results.results(config, str(workdir), data=str(data))
  assert found["evaluations"].keys() == {"digits"}
  assert "cut.json" in found["failed"]["retrieval"] and "byte" in found["failed"]["retrieval"]


@pytest.mark.process
def test_two_commands_do_not_run_one_evaluation_in_one_workdir_but_others_may(clip, data):
  config, workdir = clip
  config.evals = {name: config.evals[name] for name in ("digits", "retrieval")}
  with Lock(workdir / "evaluation" / "retrieval.lock"), Lock(workdir / ".lock"):  # one is trained further beside
    with pytest.raises(UserError, match=rf"evaluation/retrieval is in use by process {os.getpid()} on host .*--only"):
      results.results(config, str(workdir), data=str(data))
    assert results.results(config, str(workdir), data=str(data), only=("digits",))["evaluations"].keys() == {"digits"}
  assert not list(workdir.rglob("*.lock"))


@pytest.mark.process
def test_mistakes_are_one_line(clip, data, tmp_path):
  config, workdir = clip
  for changes, message in (
      ({"only": ("digit",)}, "--only: no evaluation 'digit' in this experiment; did you mean 'digits'"),
      ({"checkpoint": "7"}, "7"),
      ({"weights": str(tmp_path / "none")}, "none"),
  ):
    with pytest.raises(UserError, match=message):
      results.results(config, str(workdir), data=str(data), **changes)
  with pytest.raises(UserError, match=r"no run there .*--weights"):
    results.results(config, str(tmp_path / "nothing"))
  config.evals = {"captions": Captions(config.evals["digits"].source)}
  with pytest.raises(UserError, match="evaluation 'captions' asks a model for 'generate', which task 'contrastive'"):
    results.results(config, str(workdir), data=str(data))


@pytest.mark.process
def test_weights_from_elsewhere_give_the_metrics_of_their_run(clip, data, tmp_path):
  config, workdir = clip
  config.evals = {"digits": config.evals["digits"]}
  trained = results.results(config, str(workdir), data=str(data))
  config.name, config.seed = "other", 5  # nothing of this experiment's weights is looked at
  found = results.results(config, str(tmp_path / "imported"), weights=str(workdir), data=str(data))
  assert found["evaluations"]["digits"]["metrics"] == trained["evaluations"]["digits"]["metrics"]
  assert {k: found["weights"][k] for k in ("image", "text")} == {k: trained["weights"][k] for k in ("image", "text")}
  loaded = load.load(str(workdir))
  file = str(tmp_path / "x.safetensors")
  save_file(convert.export(openai_weights(loaded.size.image.kind), loaded.params), file)
  with pytest.raises(UserError, match=r"says neither how many heads nor which activation .* --model="):
    results.results(config, str(tmp_path / "alone"), weights=file, data=str(data))
  config.model = None  # what the experiment says of a model is not looked at
  found = results.results(config, str(tmp_path / "alone"), weights=file, model=str(workdir), data=str(data))
  assert found["evaluations"]["digits"]["metrics"] == trained["evaluations"]["digits"]["metrics"]


@pytest.mark.process
def test_a_map_from_elsewhere_gives_the_metrics_of_its_run(data, tmp_path):
  run = Run(tmp_path, "limber", data)
  config = cli.load_experiment(str(run.experiment))
  config.evals = {"awa2": config.evals["awa2"]}
  trained = results.results(config, str(tmp_path / "workdir"), data=str(data))
  found = results.results(config, str(tmp_path / "imported"), weights=str(tmp_path / "workdir"), data=str(data))
  assert found["evaluations"]["awa2"]["metrics"]["right"] == trained["evaluations"]["awa2"]["metrics"]["right"]
  assert found["weights"]["prompt"] == trained["weights"]["prompt"]


@pytest.mark.process
@pytest.mark.parametrize("text", [
  "", "[]", '{"name": "x"', '{"name": "x", "step": 1, "seed": 0, "weights": {}, "versions": {}}'])
def test_results_that_are_no_results_are_never_written_over(text, tmp_path):
  found = {"name": "x", "run": None, "step": 1, "seed": 0, "weights": {}, "versions": {}, "evaluations": {},
           "failed": {}}
  (tmp_path / "results.json").write_text(text)
  with pytest.raises(UserError, match=r"results.json: not what this command writes \(.*move it away"):
    results_file.write(found, str(tmp_path))
  assert (tmp_path / "results.json").read_text() == text


@pytest.mark.process
def test_results_of_something_else_are_refused_before_anything_is_measured(clip, data, tmp_path, monkeypatch):
  config, workdir = clip
  config.evals = {"digits": config.evals["digits"]}
  found = results.results(config, str(workdir), data=str(data))
  assert found["run"] == workdirs.identity(str(workdir)) and len(found["run"]) == 32
  results_file.write(found, str(workdir))
  before, own = (workdir / "results.json").read_bytes(), copy.deepcopy(config)
  file = str(tmp_path / "x.safetensors")
  loaded = load.load(str(workdir))
  other = jax.tree.map(lambda x: x + 1, loaded.params)
  save_file(convert.export(openai_weights(loaded.size.image.kind), other), file)
  measured = []
  real = results._one
  monkeypatch.setattr(results, "_one", lambda *args: measured.append(1) or real(*args))
  with pytest.raises(UserError, match=r"results.json is of something else, of .*--out=DIRECTORY"):
    results.results(config, str(workdir), weights=file, model=str(workdir), data=str(data))
  assert not measured and (workdir / "results.json").read_bytes() == before
  out = str(tmp_path / "out")
  found = results.results(config, str(workdir), weights=file, model=str(workdir), data=str(data), out=out)
  results_file.write(found, out)
  assert found["run"] is None and (workdir / "results.json").read_bytes() == before
  assert {p.name for p in (tmp_path / "out").iterdir()} >= {"results.json", "report.md", "evaluation"}
  with pytest.raises(UserError, match=r"results.json is of something else, of weights"):  # and the other way round
    results.results(own, str(workdir), data=str(data), out=out)


@pytest.mark.process
def test_results_of_another_step_of_the_run_are_kept_beside(tmp_path, capsys):
  found = {"name": "x", "run": "9f", "step": 1, "seed": 0, "weights": {"image": "ab"}, "versions": {}, "task": "t",
           "model": "", "evaluations": {}, "failed": {}}
  written = []
  for step, digest in ((1, "ab"), (2, "cd"), (1, "ab"), (2, "cd")):
    results_file.write(found | {"step": step, "weights": {"image": digest}}, str(tmp_path))
    written.append(capsys.readouterr().err)
  assert sorted(p.name for p in tmp_path.glob("*.json")) == [
    "results-step1-2.json", "results-step1.json", "results-step2.json", "results.json"]
  assert written[0] == "" and all("it is kept as results-step" in line for line in written[1:])
  for other in ({"run": "77"}, {"run": None}):
    with pytest.raises(UserError, match=r"is of something else, of x at step 2 of the run 9f"):
      results_file.write(found | {"weights": {"image": "ef"}} | other, str(tmp_path))


def test_weights_of_a_language_model_are_what_is_measured_and_no_map(tmp_path):
  def config(seed):
    size = GPTJSize(vocab=259, context=160, width=64, layers=2, heads=2, rotary=16)
    return tiny(task="language_modelling", model=size, trainable=("lm",), seed=seed, mesh=(-1, 1, 1))

  untrained(config(0), str(tmp_path / "run"))
  _, params, _, step = results.imported(config(1), "", str(tmp_path / "run"))
  wanted, drawn = (setup(config(seed)).init().params["lm"]["embedding"] for seed in (0, 1))
  np.testing.assert_array_equal(params["lm"]["embedding"], wanted)
  assert step == 0 and not np.array_equal(wanted, drawn)
  with pytest.raises(UserError, match=r"--model=x is of the weights of a CLIP; the language model is config\.model"):
    results.imported(config(1), "", str(tmp_path / "run"), "x")
