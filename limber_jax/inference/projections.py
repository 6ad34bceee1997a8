"""Trained maps from a run's workdir, or from the one file that `limber_jax.convert --to=projection` makes of one."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax

import limber_jax
from limber_jax import config_json
from limber_jax.checkpoints import state, workdirs
from limber_jax.checkpoints.manager import Checkpoints, abstract
from limber_jax.config import Captions, Config, Decoding, Loss, Mesh
from limber_jax.data import vocabularies
from limber_jax.errors import UserError, did_you_mean
from limber_jax.inference.captioner import Captioner
from limber_jax.map_names import join, split
from limber_jax.models import encoders
from limber_jax.models.spec import decoder_of
from limber_jax.tasks.captioning import Captioning
from limber_jax.training.setup import Setup, check_frozen, setup
from limber_jax.weights import parts, projection


def read_run(workdir: str) -> Config:
  """Returns the experiment of a workdir; raises UserError if there is none, or one that writes no captions."""
  return _captioning(workdirs.read_config(workdir), os.path.join(workdir, workdirs.CONFIG))


def _captioning(config: Config, where: str) -> Config:
  if config.task != "captioning":
    raise UserError(f"{where}: a run of task {config.task!r}, which writes no captions; expected 'captioning'")
  vocabularies.check_stored(config.data.tokenizer, where)
  return config


def open_run(workdir: str, config: Config, *, checkpoint: str = "latest", name: str = "",
             blind: bool = False) -> Captioner:
  """Returns what was trained in a workdir.

  Args:
    workdir: of the run.
    config: as `read_run` returns and `to_use` changes it.
    checkpoint: "latest", "best" or a step.
    name: of the map.
    blind: see Captioner.

  Raises:
    UserError: no such checkpoint or map, or the frozen weights are not those it was trained on.
  """
  check_map(config, name)
  checkpoints = Checkpoints(workdir, config.checkpoint)
  try:
    checkpoints.find(checkpoint)  # before the frozen parts are loaded, which may take long
    s = _setup(config, workdir)

    def read(step):
      check_frozen(checkpoints.meta(step), s.digests, workdir, step)
      return checkpoints.restore_params(step, s.like.params, s.like.stats)

    params, stats = checkpoints.read(checkpoint, read)
    return Captioner(s, params, stats, name, blind=blind)
  finally:
    checkpoints.close()


def read_projection(path: str) -> tuple[Config, str]:
  """Returns (the experiment, the map's name) of a projection's file; raises UserError if it is none."""
  metadata = projection.load(path)[1]
  config = _captioning(config_json.from_json(json.dumps(metadata["config"]), f"{path}, config of its metadata"), path)
  return config, str(metadata.get("map", ""))


def open_projection(path: str, config: Config, name: str, *, blind: bool = False) -> Captioner:
  """Returns what a projection's file holds, between the frozen weights that `config` names.

  Args:
    path: of the file.
    config: as `read_projection` returns and `to_use` changes it.
    name: as `read_projection` returns it.
    blind: see Captioner.

  Raises:
    UserError: the frozen weights are not those it was trained on.
  """
  check_map(config, name)
  s = _setup(config)
  digests = {"image": s.digests[join("image", cast(Captioning, s.task).model.encoder_of(name))], "lm": s.digests["lm"]}
  projection.check(projection.load(path)[1], digests, path)
  here = join("prompt", name)
  return Captioner(s, {here: parts.load_part(path, "prompt", None, s.like.params[here])[0]}, {}, name, blind=blind)


def export_projection(workdir: str, path: str, *, checkpoint: str = "", name: str = "") -> int:
  """Writes one map of a run into the file `path`, and returns the step of its checkpoint.

  The frozen weights are not read: their digests are in the checkpoint.

  Args:
    workdir: of the run.
    path: of the file; one that is there is replaced.
    checkpoint: "latest", "best", a step or "", as `Checkpoints.find` has it.
    name: of the map.

  Raises:
    UserError: no such run, checkpoint or map, or the map alone is not all that was trained.
  """
  config = read_run(workdir)
  check_map(config, name)
  task = Captioning.from_config(to_use(config))
  here, image = join("prompt", name), join("image", task.model.encoder_of(name))
  params, stats = jax.eval_shape(task.init, jax.random.key(0))
  if here not in config.trainable:
    raise UserError(f"{workdir}: a run that trained no {here!r}; it trained {', '.join(config.trainable)}")
  for other in (image, "lm", "adapters"):
    if other in params and other in config.trainable:
      raise UserError(f"{workdir}: a run that trained {other!r} too; a projection is all there is only where nothing "
                      "else was trained")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = [abstract(tree, jax.tree.map(lambda x: device, tree))
          for tree in (state.split(params, config.trainable)[0], state.split(stats, config.trainable)[0])]
  checkpoints = Checkpoints(workdir, config.checkpoint)
  try:
    step, frozen, trained = checkpoints.read(checkpoint, lambda step: (
      step, checkpoints.meta(step)["frozen"], checkpoints.restore_params(step, *like)[0]))
  finally:
    checkpoints.close()
  encoder = task.model.encoders[task.model.encoder_of(name)].size
  projection.save(path, trained[here], {
    "encoder": _named(encoder, encoders.known()), "lm": _named(config.model.lm, decoder_of(config.model.lm.kind).named),
    "map": name, "digests": {"image": frozen[image], "lm": frozen["lm"]}, "config": config_json.flatten(config),
    "step": step, "version": limber_jax.__version__})
  return step


def _named(size: Any, known: Mapping[str, Any]) -> Any:
  """Returns the name of a size, or all of its fields where it has none."""
  plain = dataclasses.replace(size, crop_rounding="even") if hasattr(size, "crop_rounding") else size
  return next((name for name, make in known.items() if make() == plain), config_json.flatten(size, known=True))


def _setup(config: Config, workdir: str = "") -> Setup:
  """Returns the experiment made concrete; an error about frozen weights says by which flag they are found."""
  try:
    return setup(config, workdir)
  except UserError as error:
    if told := re.match(r"--config\.(init\.([^:\s]+): .*)", str(error)):
      raise UserError(f"{told[1]}; if it lies elsewhere now, say where by --init={told[2]}=PATH") from error
    raise


def check_map(config: Config, name: str) -> None:
  """Raises UserError if the model has no map of this name."""
  extra = config.model.extra_projectors
  if name and name not in extra:
    raise UserError(f"--map: no map {name!r}{did_you_mean(name, extra)}" if extra else
                    f"--map={name}: the model has a single map, which has no name; leave it out")


def to_use(config: Config, *, decoding: Decoding | None = None, init: Sequence[str] = (), batch_size: int = 1,
           fsdp: int = 1) -> Config:
  """Returns the experiment as it is to be used here, whatever devices it was trained on.

  Args:
    config: the experiment.
    decoding: how to write; None is the experiment's own.
    init: "part=path" of frozen parts whose weights lie elsewhere than in the experiment.
    batch_size: rounded up to a multiple of the devices.
    fsdp: devices that each hold a share of the weights; between groups of so many they are repeated.

  Raises:
    UserError: no such part.
  """
  count = jax.device_count()
  frozen = [join("image", n) for n in ("", *(k for k, m in config.model.extra_projectors.items() if m.image))] + ["lm"]
  frozen = [p for p in frozen if p not in config.trainable]
  weights = config.init
  for given in init:
    name, _, path = given.partition("=")
    if name not in frozen or not path:
      raise UserError(f"--init={given}: expected PART=PATH of a frozen part{did_you_mean(name, frozen)}")
    extra = {**weights.extra_projectors, name: path}
    changed: dict[str, Any] = {"extra_projectors": extra} if split(name)[1] else {name: path}
    weights = dataclasses.replace(weights, **changed)
  return dataclasses.replace(
    config, decoding=decoding or config.decoding, init=weights, mesh=Mesh(fsdp=fsdp), evals={},
    batch_size=-(-max(batch_size, 1) // count) * count, loss=Loss(), captions=Captions(),
    compute=dataclasses.replace(config.compute, attention="auto"))
