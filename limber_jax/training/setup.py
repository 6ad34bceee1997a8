"""An experiment made concrete on this machine's devices: what training and evaluation share."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from limber_jax import config as config_lib
from limber_jax import registry
from limber_jax.checkpoints.frozen import kept_frozen
from limber_jax.checkpoints.manager import abstract
from limber_jax.checkpoints.state import SHARDING, Frozen, TrainState, check_trainable, split
from limber_jax.config import Config, evaluation_of
from limber_jax.data import tokenizers, transforms
from limber_jax.data.images import ImageOptions
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Eval
from limber_jax.evals.splits import named, own_fields
from limber_jax.map_names import split as split_name
from limber_jax.runtime import parallel
from limber_jax.tasks.base import Task
from limber_jax.training import optimizer
from limber_jax.weights.digest import digest


@dataclasses.dataclass
class Outline:
  """An experiment on a mesh before anything of it is loaded: all that its step is compiled from."""

  config: Config
  mesh: jax.sharding.Mesh
  task: Task
  tx: optax.GradientTransformation
  frozen: Frozen                        # what is not trained: ShapeDtypeStructs with shardings
  like: TrainState                      # the same of what is


@dataclasses.dataclass
class Setup(Outline):
  """An experiment made concrete on this machine's devices: `frozen` holds arrays."""

  digests: dict[str, str]               # of each part of what is not trained
  drawn: tuple[str, ...]                # its parts that are random, and not yet kept in the workdir
  init: Callable[[], TrainState]        # a fresh state
  tokenizer: Any


@dataclasses.dataclass(frozen=True)
class _Start:
  """Where the parts of a model start: on disk, at what was kept of an earlier start, or at random."""

  config: Config
  task: Task
  mesh: jax.sharding.Mesh
  params: dict[str, Any]  # ShapeDtypeStructs with shardings, by part
  stats: dict[str, Any]

  @classmethod
  def of(cls, config: Config, task: Task, mesh: jax.sharding.Mesh) -> "_Start":
    """Returns the start of an experiment; raises UserError if its model has no such parts to train."""
    params, stats = jax.eval_shape(task.init, jax.random.key(config.seed))
    check_trainable(config.trainable, params)
    bare = cls(config, task, mesh, {}, {})
    return dataclasses.replace(bare, params=bare.abstract_state(jax.eval_shape(bare.cast, params)),
                               stats=bare.abstract_state(stats))

  def abstract_state(self, tree: Any) -> Any:
    """Returns ShapeDtypeStructs with the shardings that a state, or a part of one, has on the mesh."""
    return abstract(tree, parallel.shardings(tree, (*SHARDING, *self.task.sharding), self.mesh))

  def cast(self, params: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters, what is not trained in the precision that it is computed in."""
    dtype = jnp.dtype(self.config.compute.dtype)
    fixed = split(params, self.config.trainable)[1]
    return params | jax.tree.map(lambda x: x.astype(dtype) if x.ndim else x, fixed)

  def read(self, path: str, part: str) -> tuple[dict, dict]:
    """Returns (params, stats) of a part from disk; raises UserError that names the setting."""
    try:
      return self.task.load(path, part, self.params[part], self.stats.get(part, {}),
                            self.config.init.resample_positions)
    except UserError as error:
      raise UserError(f"--config.init.{part}: {error}") from error

  def values(self, parts: Iterable[str], kept: dict[str, dict]) -> tuple[dict, dict]:
    """Returns (params, stats) of some parts, from disk, from what was `kept`, or at random."""
    paths = {part: path for part in parts if (path := self.config.init.path_of(part))}
    random = [part for part in parts if part not in paths and part not in kept]
    rng = jax.random.key(self.config.seed)

    def draw():  # what is not returned is not computed
      params, stats = self.task.init(rng)
      return self.cast({p: params[p] for p in random}), {p: stats[p] for p in random if p in stats}

    with jax.set_mesh(self.mesh):
      layout = jax.tree.map(lambda x: x.sharding, ({p: self.params[p] for p in random},
                                                   {p: self.stats[p] for p in random if p in self.stats}))
      params, stats = jax.jit(draw, out_shardings=layout)()
    found = {part: self.read(path, part) for part, path in paths.items()}
    found |= {part: (tree["params"], tree["stats"]) for part, tree in kept.items()}
    for part, (params[part], part_stats) in found.items():
      if part_stats:
        stats[part] = part_stats
    return params, stats


def outline(config: Config, mesh: jax.sharding.Mesh) -> Outline:
  """Returns an experiment on a mesh, whose devices need not be there: nothing is loaded, and nothing computed.

  Args:
    config: the experiment, which `config.check` has passed.
    mesh: as `parallel.make_mesh` makes it.

  Raises:
    UserError: settings that do not fit together, or a model or a batch that the mesh does not divide.
  """
  parallel.local_rows(config.batch_size, mesh)
  if config.compute.dtype == "float16" and mesh.devices.flat[0].platform == "cpu":  # else XLA says it, of one product
    raise UserError("config.compute.dtype='float16': on a CPU there are no products of it with sums in float32; choose "
                    "float32 or bfloat16")
  task = registry.lookup("task", registry.TASKS, config.task).from_config(config)
  if config.data.features and not hasattr(task, "feature_specs"):
    raise UserError(f"config.data.features: there are none of task {config.task!r}, only of 'captioning'")
  tx = optimizer.make(config.optim, config.steps)
  start = _Start.of(config, task, mesh)
  (trained, fixed), (moving, still) = (split(tree, config.trainable) for tree in (start.params, start.stats))
  like = jax.eval_shape(lambda p, s: TrainState.create(p, s, tx, config.optim.spike.window), trained, moving)
  return Outline(config, mesh, task, tx, Frozen(fixed, still), start.abstract_state(like))


def example_row(task: Task, config: Config) -> dict[str, np.ndarray]:
  """Returns a row of a batch as the task's own transform makes it, of a black image; its shapes are those of any."""
  record: dict[str, Any] = {"id": "", "image": np.zeros((9, 9, 3), np.uint8), "text": "a caption"}
  if config.data.features:  # in place of images
    record |= {part.replace("image", "features", 1): np.zeros(of["shape"], jnp.dtype(of["dtype"]))
               for part, of in task.feature_specs(config.data).items()}
  transform = task.transform(tokenizers.ByteTokenizer(), config.data, train=True)
  return transform(record, np.random.default_rng(0))


def setup(config: Config, workdir: str = "", *, only: str = "") -> Setup:
  """Returns what training and evaluation share.

  Args:
    config: the experiment; its model's preprocessing is what `weights.adopt` made it.
    workdir: of the run, where random frozen parts are kept; "" draws them anew.
    only: such as "image": the other kinds of frozen parts are not loaded.

  Raises:
    UserError: settings that do not fit together, or weights that are not there or do not fit.
  """
  config_lib.check(config)
  o = outline(config, parallel.make_mesh(dataclasses.asdict(config.mesh)))
  tokenizer = tokenizers.load(config.data.tokenizer)
  if tokenizer.vocab_size > o.task.vocab:
    raise UserError(f"config.data.tokenizer has {tokenizer.vocab_size} ids, the model only {o.task.vocab}; "
                    "choose another tokenizer, or set the vocab of config.model")
  trained, fixed = o.like.params, o.frozen.params
  start = _Start(config, o.task, o.mesh, trained | fixed, o.like.stats | o.frozen.stats)
  loaded = [part for part in fixed if only in ("", split_name(part)[0])]
  random = [part for part in loaded if not config.init.path_of(part)]
  parallel.check_fits([trained, [start.params[part] for part in loaded]], o.mesh, "config.model")
  kept = {part: tree for part in random if workdir and (tree := kept_frozen(
    workdir, part, {"params": start.params[part], "stats": start.stats.get(part, {})})) is not None}
  frozen = Frozen(*start.values(loaded, kept) if loaded else ({}, {}))
  digests = {part: digest({"params": frozen.params[part], "stats": frozen.stats.get(part, {})}) for part in loaded}

  def create(params, stats):
    return TrainState.create(params, stats, o.tx, config.optim.spike.window)

  def init() -> TrainState:
    layout = jax.tree.map(lambda x: x.sharding, o.like)
    return jax.jit(create, out_shardings=layout)(*start.values(list(trained), {}))

  drawn = tuple(part for part in random if part not in kept)
  return Setup(config, o.mesh, o.task, o.tx, frozen, o.like, digests, drawn, init, tokenizer)


def check_frozen(meta: dict[str, Any], digests: dict[str, str], workdir: str, step: int) -> None:
  """Raises UserError if the frozen parts are not those that the checkpoint `step` with `meta` was trained on."""
  for part, was in meta.get("frozen", {}).items():
    if digests.get(part) != was:
      raise UserError(f"{workdir} was trained on other weights of {part!r}: its checkpoint {step} has the digest "
                      f"{was[:12]}, config.init.{part} now gives {digests.get(part, 'none')[:12]}; name the same "
                      "weights, wherever they are now, or choose another --workdir")


def feature_specs(setup: Setup) -> dict[str, dict[str, Any]]:
  """Returns all that features of the experiment's encoders depend on but the data; see `data.features.describe`."""
  options = ImageOptions.from_config(setup.config.data).changes()
  return {part: what | {"weights": setup.digests[part]} | ({"images": options} if options else {})
          for part, what in setup.task.feature_specs(setup.config.data).items()}


def make_eval(setup: Setup, name: str, context: Context) -> Eval:
  """Returns an evaluation of the experiment, its data opened; raises UserError if it or its data do not fit."""
  config = named(setup.config.evals[name], name)
  if missing := sorted(set(config.needs) - setup.task.predict().keys()):
    fitting = [n for n in registry.EVALS if set(evaluation_of(n).needs) <= setup.task.predict().keys()]
    raise UserError(f"config.evals.{name}: evaluation {config.name!r} asks a model for {missing[0]!r}, which task "
                    f"{setup.config.task!r} cannot answer; those it can: {', '.join(fitting)}")
  with own_fields(config, name):
    folder = context.results_dir and f"{context.results_dir}/{name}"
    return config.open(dataclasses.replace(context, name=name, results_dir=folder))


def make_context(setup: Setup, workdir: str, stop: Callable[[], bool] = lambda: False,
                 waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext) -> Context:
  """Returns what the evaluations of the experiment share; they keep no results of examples. See also `Context`."""
  config = setup.config
  options = ImageOptions.from_config(config.data)
  transform = transforms.with_options(setup.task.transform(setup.tokenizer, config.data, train=False), options)
  return Context(tokenizer=setup.tokenizer, transform=transform, length=setup.task.length, decoding=config.decoding,
                 images=options, mesh=setup.mesh, workdir=workdir, stop=stop, waiting=waiting)


def evaluate(setup: Setup, evals: dict[str, Eval], params: dict, stats: dict) -> dict[str, float]:
  """Returns {"zeroshot/top1": …} of the evaluations given; raises evals.base.Stopped when asked to stop."""
  predict = setup.task.predict()
  params, stats = {**setup.frozen.params, **params}, {**setup.frozen.stats, **stats}
  found = {}
  for name, run in evals.items():
    with own_fields(setup.config.evals[name], name):
      # Of numpy's numbers, too, which an evaluation of one's own may give, and JSON has none of.
      found |= {f"{name}/{key}": float(value) for key, value in run(predict, params, stats).items()}
  return found
