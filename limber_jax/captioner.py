"""A trained map between its frozen models, opened to be used: what the commands `caption` and `vqa` share.

It comes from a workdir of limber_jax.train, or from the one file that `limber_jax.convert --to=projection` makes of it.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import limber_jax
from limber_jax import config as config_lib
from limber_jax import parallel, workdirs
from limber_jax.checkpoint import Checkpoints, abstract
from limber_jax.classify import attempt
from limber_jax.config import Captions, Config, Decoding, Loss, Mesh
from limber_jax.data import transforms, vocabularies
from limber_jax.data.images import ImageFlags, ImageOptions
from limber_jax.data.sources import folder
from limber_jax.errors import UserError, did_you_mean
from limber_jax.generate import row_keys
from limber_jax.models.encoders import ENCODERS, EncoderSize
from limber_jax.models.gptj import SIZES, Cache
from limber_jax.models.limber import part
from limber_jax.output import Output
from limber_jax.state import split
from limber_jax.tasks import interleaved
from limber_jax.tasks.captioning import Captioning
from limber_jax.tasks.interleaved import Layout, Segments
from limber_jax.train import Setup, check_frozen, setup
from limber_jax.weights import load, projection
from limber_jax.weights.digest import digest


class Written(NamedTuple):
  """What was written about an image."""

  path: str
  text: str
  error: str = ""  # why the image cannot be read; there is no text then


class Captioner:
  """Images and texts in, text out. Batches of `setup.config.batch_size` are spread over all devices of its mesh."""

  def __init__(self, setup: Setup, params: dict, stats: dict, name: str = "", *, blind: bool = False):
    """Takes what `open_run` or `open_projection` return.

    Args:
      setup: of the experiment.
      params, stats: of what was trained.
      name: of the map.
      blind: leave the images out of what the language model reads.
    """
    model, encoder = setup.task.model, setup.task.model.encoder_of(name)
    self.decoding = setup.config.decoding
    self.batch_size = setup.config.batch_size
    self._model, self._mesh, self._tokenizer, self._blind = model, setup.mesh, setup.tokenizer, blind
    self._prompt_length = 0 if blind else model.prompt_length(name)
    self._trained, self._setup, self._name = (params, stats), setup, name
    self._params = {**setup.frozen.params, **params}
    self._stats = {**setup.frozen.stats, **stats}
    self._preprocess = transforms.with_options(
      transforms.Chain((transforms.Decode(), setup.task.rule(encoder))), ImageOptions.of(setup.config.data))
    self._prompts = jax.jit(lambda params, stats, images: model.prompt(
      params, model.encode(params, stats, images, encoder)[0], name), out_shardings=parallel.batch_sharding(self._mesh))
    whole = parallel.replicated(self._mesh)
    self._read = jax.jit(functools.partial(interleaved.read, model), out_shardings=whole)
    self._continue = jax.jit(self._generate, out_shardings=whole)

  def read(self, path: str) -> np.ndarray:
    """Returns the image in a file as the encoder takes it, uint8 [H, W, 3]; raises UserError or OSError."""
    return self._preprocess({"image": folder.read_image(path)}, None)["image"]

  def key(self) -> dict[str, Any]:
    """Returns all that a text depends on but the request and the shots, plain JSON."""
    params, stats = self._trained
    config = self._setup.config
    trained = {part: digest({"params": tree, "stats": stats.get(part, {})}) for part, tree in params.items()}
    return {"weights": self._setup.digests | trained, "model": config_lib.flatten(config.model, known=True),
            "decoding": dataclasses.asdict(self.decoding), "map": self._name, "blind": self._blind,
            "images": ImageOptions.of(config.data).changes(), "tokenizer": self._tokenizer.fingerprint(),
            "dtype": config.compute.dtype, "batch_size": self.batch_size, "version": limber_jax.__version__}

  def write(self, requests: Sequence[tuple[str, Segments]], shots: Sequence[np.ndarray] = (), *,
            start: int = 0) -> Iterator[Written]:
    """Yields what the language model writes after each of the requests, in their order.

    All batches are of one shape: texts are padded on the right to the longest, the last batch with empty rows. What is
    written about an image does not depend on the others, but where it is sampled, on its number among them. What all
    requests begin with goes through the language model once.

    Args:
      requests: the path of an image, and what is read before the text is written: texts, and images by their numbers.
        Those of the shots come first, then that of the request's own image, len(shots).
      shots: S images uint8 [H, W, 3] that all requests share.
      start: how many of the requests are left out because they are done, whole batches.

    Raises:
      UserError: more text and images than the language model's context holds.
    """
    layouts = {segments: Layout.of(segments, self._tokenizer, self._prompt_length)
               for segments in dict.fromkeys(s for _, s in requests)}
    length, context = max(len(layout.ids) for layout in layouts.values()), self._model.size.lm.context
    if length + self.decoding.max_new_tokens > context:
      raise UserError(f"{length} positions of images and text, and max_new_tokens={self.decoding.max_new_tokens}, are "
                      f"more than the language model's context of {context}")
    with jax.set_mesh(self._mesh):
      prompts = self._shots(shots)
      shared = interleaved.common(list(layouts.values()), len(prompts))
      prefix = self._prefix(next(iter(layouts.values())), shared, prompts) if shared else None
    batches = [requests[i : i + self.batch_size] for i in range(start, len(requests), self.batch_size)]
    with ThreadPoolExecutor() as pool:

      def start_reading(batch):
        return [pool.submit(attempt, self.read, path) for path, _ in batch]

      reading = start_reading(batches[0]) if batches else []
      for number, batch in enumerate(batches):
        images = [image.result() for image in reading]
        reading = start_reading(batches[number + 1]) if number + 1 < len(batches) else []
        first = start + number * self.batch_size
        rows = [(image, Layout(*(part[shared:] for part in layouts[segments])), first + i)
                for i, (image, (_, segments)) in enumerate(zip(images, batch, strict=True))
                if not isinstance(image, str)]
        texts = iter(self._write_batch(rows, prompts, prefix, length - shared) if rows else ())
        for image, (path, _) in zip(images, batch, strict=True):
          yield Written(path, "", image) if isinstance(image, str) else Written(path, next(texts))

  def _prefix(self, layout: Layout, start: int, prompts: jax.Array) -> Cache:
    """Returns the cache of the first `start` positions of a layout, on every device."""
    begin = Layout(*(part[:start] for part in layout))
    return self._read(self._params, interleaved.stack([begin], 1, start, self._tokenizer.eot), prompts)

  def _shots(self, images: Sequence[np.ndarray]) -> jax.Array:
    """Returns the prompts [S · P, D] of images, on every device."""
    width = self._model.size.lm.width
    if not images or self._blind:
      return jnp.zeros((0, width), self._model.lm.compute.dtype)
    batches = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
    prompts = np.concatenate([jax.device_get(self._encode(batch)) for batch in batches])[: len(images)]
    return jax.device_put(prompts.reshape(-1, width), parallel.replicated(self._mesh))

  def _encode(self, images: Sequence[np.ndarray]) -> jax.Array:
    """Returns the prompts [B, P, D] of up to B images; the other rows mean nothing."""
    whole = np.zeros((self.batch_size, *images[0].shape), np.uint8)
    whole[: len(images)] = images
    return self._prompts(self._params, self._stats, parallel.global_batch(whole, self._mesh))

  def _write_batch(self, rows, prompts, prefix, length) -> list[str]:
    """Returns the text for each row (image, layout, number)."""
    images, layouts, numbers = zip(*rows, strict=True)
    batch = interleaved.stack(layouts, self.batch_size, length, self._tokenizer.eot)
    batch["number"] = np.zeros(self.batch_size, np.int32)
    batch["number"][: len(rows)] = numbers
    with jax.set_mesh(self._mesh):
      own = None if self._blind else self._encode(images)
      out = jax.device_get(self._continue(self._params, prompts, own, parallel.global_batch(batch, self._mesh), prefix))
    return [self._tokenizer.decode(out.tokens[i, : out.lengths[i]].tolist()) for i in range(len(rows))]

  def _generate(self, params, prompts, own, batch, prefix):
    if self.decoding.method == "sample":
      batch = batch | {"key": row_keys(jax.random.key(self.decoding.seed), batch["number"])}
    return interleaved.write(self._model, params, batch, prompts, own, eos=self._tokenizer.eot, settings=self.decoding,
                             prefix=prefix)


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
    name, blind: see Captioner.

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

    return Captioner(s, *checkpoints.read(checkpoint, read), name, blind=blind)
  finally:
    checkpoints.close()


def read_projection(path: str) -> tuple[Config, str]:
  """Returns (the experiment, the map's name) of a projection's file; raises UserError if it is none."""
  card = projection.load(path)[1]
  config = _captioning(config_lib.from_json(json.dumps(card["config"]), f"{path}, config of its card"), path)
  return config, str(card.get("map", ""))


def open_projection(path: str, config: Config, name: str, *, blind: bool = False) -> Captioner:
  """Returns what a projection's file holds, between the frozen weights that `config` names.

  Args:
    path: of the file.
    config, name: as `read_projection` returns them, the config as `to_use` changes it.
    blind: see Captioner.

  Raises:
    UserError: the frozen weights are not those it was trained on.
  """
  check_map(config, name)
  s = _setup(config)
  digests = {"image": s.digests[part("image", s.task.model.encoder_of(name))], "lm": s.digests["lm"]}
  projection.check(projection.load(path)[1], digests, path)
  here = part("prompt", name)
  return Captioner(s, {here: load.load_part(path, "prompt", None, s.like.params[here])[0]}, {}, name, blind=blind)


def export_projection(workdir: str, path: str, *, checkpoint: str = "best", name: str = "") -> int:
  """Writes one map of a run into the file `path`, and returns the step of its checkpoint.

  The frozen weights are not read: their digests are in the checkpoint.

  Args:
    workdir: of the run.
    path: of the file; one that is there is replaced.
    checkpoint: "latest", "best" or a step.
    name: of the map.

  Raises:
    UserError: no such run, checkpoint or map, or the map alone is not all that was trained.
  """
  config = read_run(workdir)
  check_map(config, name)
  task = Captioning.of(to_use(config))
  here, image = part("prompt", name), part("image", task.model.encoder_of(name))
  params, stats = jax.eval_shape(task.init, jax.random.key(0))
  if here not in config.trainable:
    raise UserError(f"{workdir}: a run that trained no {here!r}; it trained {', '.join(config.trainable)}")
  for other in (image, "lm", "adapters"):
    if other in params and other in config.trainable:
      raise UserError(f"{workdir}: a run that trained {other!r} too; a projection is all there is only where nothing "
                      "else was trained")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = [abstract(tree, jax.tree.map(lambda x: device, tree))
          for tree in (split(params, config.trainable)[0], split(stats, config.trainable)[0])]
  checkpoints = Checkpoints(workdir, config.checkpoint)
  try:
    step, frozen, trained = checkpoints.read(checkpoint, lambda step: (
      step, checkpoints.meta(step)["frozen"], checkpoints.restore_params(step, *like)[0]))
  finally:
    checkpoints.close()
  encoder = task.model.encoders[task.model.encoder_of(name)].size
  projection.save(path, trained[here], {
    "encoder": _named(encoder, ENCODERS), "lm": _named(config.model.lm, SIZES), "map": name,
    "digests": {"image": frozen[image], "lm": frozen["lm"]}, "config": config_lib.flatten(config), "step": step,
    "version": limber_jax.__version__})
  return step


def _named(size: Any, known: Mapping[str, Any]) -> Any:
  """Returns the name of a size, or all of its fields where it has none."""
  plain = dataclasses.replace(size, crop_rounding="even") if isinstance(size, EncoderSize) else size
  return next((name for name, make in known.items() if make() == plain), config_lib.flatten(size, known=True))


def _setup(config: Config, workdir: str = "") -> Setup:
  """Returns the experiment made concrete; an error about frozen weights says by which flag they are found."""
  try:
    return setup(config, workdir)
  except UserError as error:
    if told := re.match(r"--config\.(init\.([\w@]+): .*)", str(error)):
      raise UserError(f"{told[1]}; if it lies elsewhere now, say where by --init={told[2]}=PATH") from error
    raise


def check_map(config: Config, name: str) -> None:
  """Raises UserError if the model has no map of this name."""
  others = config.model.others
  if name and name not in others:
    raise UserError(f"--map: no map {name!r}{did_you_mean(name, others)}" if others else
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
  frozen = [part("image", n) for n in ("", *(k for k, m in config.model.others.items() if m.image))] + ["lm"]
  frozen = [p for p in frozen if p not in config.trainable]
  weights = config.init
  for given in init:
    name, _, path = given.partition("=")
    if name not in frozen or not path:
      raise UserError(f"--init={given}: expected PART=PATH of a frozen part{did_you_mean(name, frozen)}")
    weights = (dataclasses.replace(weights, others={**weights.others, name: path}) if "@" in name else
               dataclasses.replace(weights, **{name: path}))
  return dataclasses.replace(
    config, decoding=decoding or config.decoding, init=weights, mesh=Mesh(fsdp=fsdp), evals={},
    batch_size=-(-max(batch_size, 1) // count) * count, loss=Loss(), captions=Captions(),
    compute=dataclasses.replace(config.compute, attention="auto"))


def change_decoding(own: Decoding, *, prompt: str | None = None, beams: int | None = None,
                    temperature: float | None = None, top_p: float | None = None, seed: int | None = None,
                    max_new_tokens: int | None = None) -> Decoding:
  """Returns a run's own decoding with what was asked for instead: beams, or a temperature (0 is greedy) and top_p.

  Raises:
    UserError: settings that do not go together.
  """
  fresh = Decoding(prompt=own.prompt, max_new_tokens=own.max_new_tokens, seed=own.seed)  # greedy
  if beams is not None and (temperature is not None or top_p is not None):
    raise UserError("--beams searches and --temperature and --top_p sample: choose one of the two")
  if beams is not None:
    penalty = own.length_penalty if own.method == "beam" else fresh.length_penalty
    own = dataclasses.replace(fresh, method="beam", beams=beams, length_penalty=penalty)
  elif temperature == 0:
    if top_p is not None:
      raise UserError("--top_p is for sampling, and --temperature=0 takes the likeliest token")
    own = fresh
  elif temperature is not None or top_p is not None:
    own = own if own.method == "sample" else dataclasses.replace(fresh, method="sample")
    given = {"temperature": temperature, "top_p": top_p}
    own = dataclasses.replace(own, **{k: v for k, v in given.items() if v is not None})
  if seed is not None and own.method != "sample":
    raise UserError(f"--seed is for sampling, and decoding is {own.method!r}; sample with --temperature=0.7")
  if prompt is not None and prompt != prompt.rstrip():
    raise UserError(f"--prompt={prompt!r}: no space at its end; the language model writes it with the next word")
  given = {"prompt": prompt, "seed": seed, "max_new_tokens": max_new_tokens}
  return dataclasses.replace(own, **{k: v for k, v in given.items() if v is not None})


class Flags:
  """The flags that `caption` and `vqa` share."""

  def __init__(self):
    """Defines them."""
    self._workdir = flags.DEFINE_string("workdir", "", "Directory of the run.")
    self._projection = flags.DEFINE_string("projection", "", "In place of --workdir: a file of limber_jax.convert "
                                           "--to=projection.")
    self._init = flags.DEFINE_multi_string("init", [], "PART=PATH of frozen weights that lie elsewhere than at "
                                           "training, such as lm=DIR or image=DIR; once for each.")
    self._checkpoint = flags.DEFINE_string("checkpoint", "", "Of the workdir: latest (if empty), best, or a step.")
    self._map = flags.DEFINE_string("map", "", "Name of a further map of the model; empty: the first.")
    self._blind = flags.DEFINE_bool("blind", False, "Leave the images out of what the language model reads.")
    self._beams = flags.DEFINE_integer("beams", None, "Search with so many beams.", lower_bound=1)
    self._temperature = flags.DEFINE_float("temperature", None, "Sample at this temperature; 0 takes the likeliest "
                                           "token.", lower_bound=0.0)
    self._top_p = flags.DEFINE_float("top_p", None, "Sample from the fewest tokens with this probability together.",
                                     lower_bound=0.0, upper_bound=1.0)
    self._seed = flags.DEFINE_integer("seed", None, "Of what is sampled.", lower_bound=0)
    self._max_new_tokens = flags.DEFINE_integer("max_new_tokens", None, "Tokens of a text at most.", lower_bound=1)
    self._batch_size = flags.DEFINE_integer("batch_size", 32, "Images at a time, over all devices.", lower_bound=1)
    self._fsdp = flags.DEFINE_integer("fsdp", 1, "Devices that each hold a share of the weights, for language models "
                                      "that one cannot hold.", lower_bound=1)
    self._images = ImageFlags()
    self._json = flags.DEFINE_bool("json", False, "Print one JSON object a line.")
    self._out = flags.DEFINE_string("out", "", "Write one JSON object a line to this file, which is there once it is "
                                    "whole; what is stopped goes on.")

  def config(self) -> tuple[Config, str]:
    """Returns (the experiment that the flags name, the map's name); raises UserError for what does not fit."""
    if bool(self._workdir.value) == bool(self._projection.value):
      raise UserError("expected either --workdir or --projection; for example --workdir=runs/limber")
    if self._projection.value:
      config, name = read_projection(self._projection.value)
      if self._checkpoint.value or self._map.value not in ("", name):
        raise UserError(f"--projection={self._projection.value} holds one map of one checkpoint; --checkpoint and "
                        "--map are for --workdir")
    else:
      config, name = read_run(self._workdir.value), self._map.value
    images = self._images.options(ImageOptions.of(config.data))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, formats=images.formats, exif=images.exif)
                               ), name

  def open(self, count: int, prompt: str | None = None) -> Captioner:
    """Returns the model that the flags name, for `count` requests; raises UserError for what does not fit."""
    config, name = self.config()
    decoding = change_decoding(
      config.decoding, prompt=prompt, beams=self._beams.value, temperature=self._temperature.value,
      top_p=self._top_p.value, seed=self._seed.value, max_new_tokens=self._max_new_tokens.value)
    config = to_use(config, decoding=decoding, init=self._init.value, batch_size=min(self._batch_size.value, count),
                    fsdp=self._fsdp.value)
    if self._projection.value:
      return open_projection(self._projection.value, config, name, blind=self._blind.value)
    return open_run(self._workdir.value, config, checkpoint=self._checkpoint.value or "latest", name=name,
                    blind=self._blind.value)

  def prints(self) -> bool:
    """Returns whether the terminal is all that the results go to."""
    return not self._out.value

  def output(self) -> Output:
    """Returns where to and how the flags want it; raises UserError if the file of --out cannot be written."""
    return Output(as_json=self._json.value, path=self._out.value)
