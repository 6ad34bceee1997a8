"""The flags that `caption` and `vqa` share, and what they make of a run's own settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from limber_jax.config import Config, Decoding
from limber_jax.data.images import ImageFlags, ImageOptions
from limber_jax.errors import UserError
from limber_jax.inference import destination
from limber_jax.inference.captioner import Captioner
from limber_jax.inference.output import OutFlags, Output
from limber_jax.inference.projections import open_projection, open_run, read_projection, read_run, to_use


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
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    own = dataclasses.replace(own, **{k: v for k, v in sampling.items() if v is not None})
  if seed is not None and own.method != "sample":
    raise UserError(f"--seed is for sampling, and decoding is {own.method!r}; sample with --temperature=0.7")
  if prompt is not None and prompt != prompt.rstrip():
    raise UserError(f"--prompt={prompt!r}: no space at its end; the language model writes it with the next word")
  given: dict[str, Any] = {"prompt": prompt, "seed": seed, "max_new_tokens": max_new_tokens}
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
    self._map = flags.DEFINE_string("map", "", "Name of an extra projector of the model; empty: the first.")
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
    self._out = OutFlags()
    self.prints = self._out.prints

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
    images = self._images.options(ImageOptions.from_config(config.data))
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

  def output(self, reads: Sequence[str]) -> Output:
    """Returns where rows about what is read go; raises UserError if the file of --out must not be written."""
    parts = [self._projection.value, *(given.partition("=")[2] for given in self._init.value)]
    return self._out.output([*reads, *(file for path in parts for file in destination.weights(path))])
