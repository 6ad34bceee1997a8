"""Parts of a LiMBeR from disk, each from a workdir of limber_jax.train that has the part, or from what others wrote:

    lm      a directory with config.json of a GPTJForCausalLM, or its file of weights alone
    image   a CLIP of any format of `weights.load`; a directory with config.json of a BEiT or of timm's nf_resnet; their
            file alone
    prompt  a file of `weights.projection`; proj.ckpt of jmerullo/limber
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from limber_jax.checkpoints import workdirs
from limber_jax.checkpoints.frozen import kept_frozen
from limber_jax.checkpoints.manager import Checkpoints
from limber_jax.config import Checkpoint, Compute
from limber_jax.config_json import flatten
from limber_jax.errors import UserError
from limber_jax.models import clip, gptj, prompt, spec
from limber_jax.models.clip import ClipConfig
from limber_jax.models.encoders import Encoder
from limber_jax.models.gptj import GPTJSize
from limber_jax.models.layers import Rows
from limber_jax.models.spec import EncoderConfig, same, spec_of
from limber_jax.weights import identify, names, positions
from limber_jax.weights.configs import naming, read_json
from limber_jax.weights.convert import identity, stream
from limber_jax.weights.formats import Opened
from limber_jax.weights.load import RESAMPLE, check_clip, ignored_beside, open_model
from limber_jax.weights.reading import HF_FILES, check_exists, find_tensors, read_tensors, say


def load_part(path: str, part: str, size: EncoderConfig | GPTJSize | None, like: dict[str, Any],
              stats: dict[str, Any] | None = None, resample: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (params, stats) of one part of a LiMBeR, on the devices: the host never holds more than a few tensors.

  Args:
    path: one of the sources above.
    part: "image", "lm" or "prompt"; from a workdir any that was trained there, such as "adapters".
    size: of the image or the lm; None of other parts. What shapes cannot show is compared with what the source says.
    like: ShapeDtypeStructs of the parameters, whose types and shardings the result has (`convert.stream`).
    stats: the same of the statistics; None or {} if the part has none.
    resample: resample the positions of a CLIP's image tower of another image size, see `weights.positions`.

  Raises:
    UserError: nothing there, another model, or tensors that do not fit exactly; the message names the first.
  """
  check_exists(path)
  if os.path.isdir(os.path.join(path, "checkpoints")) and not (part == "image" and _is_clip_run(path)):
    return _part_of_run(path, part, size, like, stats or {})
  readers = {"image": _image, "lm": _lm, "prompt": _prompt}
  if part not in readers:
    raise UserError(f"{path}: a part {part!r} is read from a workdir of limber_jax.train only")
  source = readers[part](path, size, like)
  with naming(path):
    tensors = source.source
    if part == "image" and spec_of(size.tower.kind).clip and "position" in like:
      tensors = positions.fitted(tensors, source.rows, {"position": like["position"].shape}, resample, RESAMPLE)
    tree = stream(source.rows, tensors, like | ({"stats": stats} if stats else {}), source.ignored)
  return {name: leaf for name, leaf in tree.items() if name != "stats"}, tree.get("stats", {})


@dataclass(frozen=True)
class _Part:
  """A part on disk, its tensors not yet read; paths are those of the part, and of statistics under "stats/"."""

  source: Mapping[str, Any]
  rows: Rows
  ignored: tuple[str, ...] = ()


def _prompt(path: str, size: None, like: dict[str, Any]) -> _Part:
  source = read_tensors(path)
  return _Part(source, prompt.REFERENCE_WEIGHTS if "weight" in source else identity(like))


# GPTJConfig's own defaults, of the settings that we have too, and what they are called here.
_GPTJ = {"vocab_size": ("vocab", 50_400), "n_positions": ("context", 2048), "n_embd": ("width", 4096),
         "n_layer": ("layers", 28), "n_head": ("heads", 16), "rotary_dim": ("rotary", 64)}
# And of those that are fixed here.
_GPTJ_SAME = {"activation_function": ("gelu_new",), "layer_norm_epsilon": (1e-5,), "tie_word_embeddings": (False,)}


def _lm(path: str, size: GPTJSize, like: dict[str, Any]) -> _Part:
  if os.path.isdir(path):
    config = os.path.join(path, "config.json")
    if not os.path.isfile(config):
      raise UserError(f"{path}: no config.json there, which says what model it is; {identify.LOADABLE['lm']}")
    with naming(config):
      values = read_json(config)
    if values.get("model_type") != "gptj":
      raise identify.foreign(config, identify.of_config(values), "lm", "a GPT-J")
    with naming(config):
      _check_gptj(values, size)
    source = find_tensors(path, (*HF_FILES, "flax_model.msgpack"))
    if source is None:
      raise UserError(f"{path}: no weights there; looked for {', '.join(HF_FILES)} and flax_model.msgpack")
  else:
    source = read_tensors(path)
    if (what := identify.of_tensors(source, clip=True)) and what != identify.GPTJ:
      raise identify.foreign(path, what, "lm", identify.GPTJ)
    values, config = _own_config(path, lambda values: values.get("model_type") == "gptj",
                                 {name: (getattr(size, _GPTJ[name][0]), _GPTJ[name][1]) for name in _GPTJ_SHOWN})
    if values:
      with naming(config):
        _check_gptj(values, size)
    else:
      say(f"{path}: heads ({size.heads}) and rotary dimensions ({size.rotary}) are taken from the config, for nothing "
           "beside the file says them")
  flax_names = any("/" in name for name in source)
  return _Part(source, gptj.FLAX_WEIGHTS if flax_names else gptj.HF_WEIGHTS, gptj.HF_IGNORED)


_GPTJ_SHOWN = ("vocab_size", "n_embd", "n_layer")  # by shapes: with others a configuration beside a file is not its own


def _own_config(path: str, describes: Callable[[dict[str, Any]], bool], shown: dict[str, tuple[Any, Any]]
                ) -> tuple[dict[str, Any], str]:
  """Returns (values, its path) of the config.json beside a lone file of weights; ({}, …) if none there is the file's.

  Args:
    path: of the weights.
    describes: whether a configuration is of such a model.
    shown: what shapes show of the model, by transformers' names, and what a configuration that is silent means.
  """
  config = os.path.join(os.path.dirname(names.split(path)[0]), "config.json")
  if not os.path.lexists(config):
    return {}, config
  with naming(config):
    values = read_json(config)
  own = describes(values) and all(values.get(name, silent) in (want, [want, want])
                                  for name, (want, silent) in shown.items())
  return (values if own else {}), config


def _check_gptj(values: dict[str, Any], size: GPTJSize) -> None:
  """Raises if a configuration of transformers is not of this size."""
  for theirs, (ours, default) in _GPTJ.items():
    if (value := values.get(theirs, default)) != getattr(size, ours):
      raise UserError(f"{theirs} is {value!r}, but this config's language model has {ours}={getattr(size, ours)!r}")
  if values.get("n_inner") not in (None, 4 * size.width):
    raise UserError(f"n_inner is {values['n_inner']!r}, expected {4 * size.width}")
  same(values, _GPTJ_SAME)


def _image(path: str, size: EncoderConfig, like: dict[str, Any]) -> _Part:
  tower, spec = size.tower, spec_of(size.tower.kind)
  encoder = Encoder.from_config(size, Compute(dtype="float32", attention="xla"))
  if spec.clip:
    opened = open_model(path, parts=("image",), role="image", preprocessing=False, given=ClipConfig(
      size.embed_dim, tower, activation=size.activation))
    if opened.size.image.kind != tower.kind:
      raise UserError(f"{path} has an image tower of kind {opened.size.image.kind!r}, but this config's model has "
                      f"{tower.kind!r}")
    check_clip(path, "image", opened.size, {"activation": size.activation, "image.heads": tower.heads},
                encoder=True)
    rows = tuple((ours.replace("image/", "", 1), theirs, how) for ours, theirs, how in opened.rows
                 if ours.removeprefix("stats/").startswith("image/"))
    return _Part(_headed(path, opened, size), rows, ignored_beside(opened, "image"))
  if not os.path.isdir(path):
    source = read_tensors(path)
    _check_lone_encoder(path, tower)
  else:
    config = os.path.join(path, "config.json")
    if os.path.isfile(config):
      _check_encoder(config, tower)
    source = find_tensors(path, HF_FILES)
    if source is None:
      raise UserError(f"{path}: no weights there; looked for {', '.join(HF_FILES)}")
  if (what := identify.of_tensors(source, clip=True)) and what != spec.title:
    raise identify.foreign(path, what, "image", spec.title)
  with naming(path):
    return _Part(source, encoder.rows(source), spec.ignored)


def _headed(path: str, opened: Opened, size: EncoderConfig) -> Mapping[str, Any]:
  """Returns the tensors of an image tower, of a CLIPVisionModel with a projection that changes nothing.

  Its pooled output is the class token before any projection. Where the language model gets the patches, and the pooled
  output has another width here, it is 0, for nobody looks at it.

  Raises:
    UserError: the pooled output goes to the language model, and has another width.
  """
  name, width = "visual_projection.weight", opened.size.image.width
  if opened.rows != clip.hf_weights() or name in opened.source:
    return opened.source
  if size.embed_dim != width and size.features == "pooled":
    raise UserError(f"{path}: a CLIPVisionModel without a projection; its pooled output has a width of {width}, this "
                    f"config's encoder one of {size.embed_dim}; set --config.model.image.embed_dim={width}")
  head = np.eye(width) if size.embed_dim == width else np.zeros((size.embed_dim, width))
  return {**opened.source, name: head.astype(np.float32)}


def _check_lone_encoder(path: str, tower: Any) -> None:
  """Raises if the configuration beside a lone file of an encoder, if it is the file's own, is not of this encoder.

  What no tensor shows (activation, epsilon, pooling, timm's architecture) is taken as published without one, and said.
  """
  spec = spec_of(tower.kind)
  values, config = _own_config(path, spec.describes, spec.shown(tower) if spec.shown else {})
  if values:
    with naming(config):
      spec.check_config(values, tower)
  else:
    say(f"{path}: taken for {spec.title} as published (activation, epsilon, pooling), for nothing beside the file "
         "says otherwise")


def _check_encoder(config: str, tower: Any) -> None:
  """Raises if the model that a config.json describes is not this encoder."""
  spec = spec_of(tower.kind)
  with naming(config):
    values = read_json(config)
  silent = not values.get("model_type") and not values.get("architecture")
  if not (spec.describes(values) or (silent and spec.processor == "timm")):
    raise identify.foreign(config, identify.of_config(values), "image", spec.title)
  with naming(config):
    spec.check_config(values, tower)


def _is_clip_run(path: str) -> bool:
  return "model.image.kind" in _run_config(path) and "model.text.vocab" in _run_config(path)


def _run_config(path: str) -> dict[str, Any]:
  config = os.path.join(path, "config.json")
  with naming(config):
    return read_json(config)


def _part_of_run(path: str, part: str, size: Any, like: dict[str, Any], stats: dict[str, Any]
                 ) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what `load_part` does, from the best checkpoint of a workdir; what was frozen there from where it was."""
  with naming(os.path.join(path, "config.json")):
    values = _run_config(path)
    if size is not None:
      _check_run_size(values, part, size)
    trained, init, best = values["trainable"], values.get(f"init.{part}"), values["checkpoint.best"]
  if part not in trained:
    if not init:
      kept = kept_frozen(path, part, {"params": like, "stats": stats})
      if kept is None:
        raise UserError(f"{path}: a run without a part {part!r} of its own; it trained {', '.join(trained)}")
      return kept["params"], kept["stats"]
    return load_part(workdirs.finder(path)(init), part, size, like, stats, values.get("init.resample_positions", False))
  checkpoints = Checkpoints(path, Checkpoint(best=best))

  def read(step: int) -> tuple[dict, dict]:
    with ocp.StandardCheckpointer() as reader:
      there = reader.metadata(os.path.join(checkpoints.directory, str(step), "params")).item_metadata
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {}
    for kind, want in (("params", like), ("stats", stats)):
      # The other parts are restored too, for a checkpoint is read whole or not at all.
      tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), there[kind] or {})
      _check_leaves(f"{checkpoints.directory}/{step}", want, tree.get(part, {}))
      wanted[kind] = tree | ({part: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), want)} if want else {})
    return checkpoints.restore_params(step, wanted["params"], wanted["stats"])

  try:
    params, restored = checkpoints.read("", read)
  finally:
    checkpoints.close()
  return params[part], restored.get(part, {})


def _check_leaves(where: str, want: dict[str, Any], got: dict[str, Any]) -> None:
  want, got = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (want, got))
  for name in sorted(want.keys() | got.keys()):
    shapes = [tuple(tree[name].shape) if name in tree else None for tree in (want, got)]
    if shapes[0] != shapes[1]:
      raise UserError(f"{where}: {name}: expected {shapes[0] or 'nothing'}, got {shapes[1] or 'nothing'}")


def _check_run_size(values: dict[str, Any], part: str, size: Any) -> None:
  """Raises if the run's configuration says that its part is of another size."""
  key = "tower.kind" if hasattr(size, "tower") else "kind"
  starts = [s for s in (f"model.{part}.", "model.encoder.", "model.") if s + key in values]
  if not starts:
    raise UserError(f"a run whose model has no part {part!r}")
  for name, ours in flatten(size).items():
    if name in spec.PIXELS:
      continue
    theirs = values.get(starts[0] + name)
    if theirs != ours:
      raise UserError(f"{starts[0]}{name} is {theirs!r}, but this config's part {part!r} has {ours!r}")
