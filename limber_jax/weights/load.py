"""Weights from disk, in any of the formats below; which one is seen from the files themselves.

Whole CLIPs, by `load`:

    a directory   limber_config.json + params.safetensors                          written by `weights.export`
                  open_clip_config.json + open_clip_model.safetensors              open_clip
                  config.json + model.safetensors (or its shards and their index)  CLIPModel of HF transformers
                  config.json + checkpoints                                        a workdir of limber_jax.train: its
                                                                                   best checkpoint, or else its newest
    a file        safetensors, npz, torch.save, torch.jit.save                     a state dict in OpenAI's names, or
                                                                                   in those of transformers

Parts of a LiMBeR, by `load_part`, each from a workdir that has the part, too:

    lm      a directory with config.json of a GPTJForCausalLM, or its file of weights alone
    image   any of the CLIPs above; a directory with config.json of a BEiT or of timm's nf_resnet; their file alone
    prompt  a file of `weights.projection`; proj.ckpt of jmerullo/limber

Where a directory has no safetensors, PyTorch's pickles are read (`weights.pickles` says how that is safe), and of a
GPT-J Flax's msgpack. What training scripts put before the names of a file comes off, and of several sets of weights one
is chosen by `PATH#KEY` (`weights.names`). A state dict has no configuration: its shapes show the sizes of a CLIP, and
heads and activation are said by `model`, by a configuration beside it or by OpenAI's own marks, or it is refused
(`weights.bare`). A further format of CLIP is one function in `FORMATS`.
"""

import dataclasses
import functools
import os
import sys
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
from limber_jax.config import Checkpoint, Compute, Tokenizer, flatten
from limber_jax.data import vocabularies
from limber_jax.errors import UserError
from limber_jax.models import clip, gptj, prompt, spec
from limber_jax.models.clip import ClipConfig
from limber_jax.models.encoders import Encoder
from limber_jax.models.gptj import GPTJSize
from limber_jax.models.layers import Rows
from limber_jax.models.spec import EncoderConfig, same, spec_of
from limber_jax.weights import bare, configs, files, identify, names, positions
from limber_jax.weights.configs import naming, read_json
from limber_jax.weights.convert import convert, identity, pattern, stream
from limber_jax.weights.preprocessing import Preprocessing

PARTS = ("image", "text")
RESAMPLE = "--config.init.resample_positions=True"


@dataclass(frozen=True)
class Loaded:
  """A model from disk; leaves are float32 numpy arrays."""

  size: ClipConfig
  params: dict[str, Any]  # {"image": …, "text": …, "logit_scale": [], and of a SigLIP "logit_bias": []}
  stats: dict[str, Any]   # {"image": …} of a ResNet, {} of a ViT


@dataclass(frozen=True)
class Opened:
  """A model on disk, its tensors not yet read."""

  size: ClipConfig
  source: Mapping[str, Any]      # their name -> anything with `shape` and `dtype` that np.asarray reads
  rows: Rows                     # paths of statistics start with "stats/"
  ignored: tuple[str, ...] = ()  # patterns of tensors that carry no weights
  parts: tuple[str, ...] = PARTS  # that are there
  preprocessing: Callable[[], Preprocessing] | None = None  # what lies beside it says; None: what `size` has


def load(path: str, model: str = "", *, flag: str = "--model") -> Loaded:
  """Returns the model at `path`.

  Args:
    path: one of the sources above.
    model: what the user says of it, see `configs.described`; "" if nothing. Needed where nothing else says it.
    flag: how the user says it, for messages.

  Raises:
    UserError: nothing there, a file that is not only weights, a model of another build or of one that is not said, or
      tensors that do not fit it exactly.
  """
  opened = open_model(path, model, flag=flag)
  with naming(path):
    like = shapes(opened.size, "logit_bias" in opened.source)
    params = convert(opened.rows, opened.source, like, opened.ignored)
  stats = params.pop("stats", {})
  return Loaded(opened.size, params, stats)


def load_into(path: str, part: str, size: ClipConfig, params: dict[str, Any],
              stats: dict[str, Any] | None = None, resample: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (params, stats) of one part of the model at `path`, float32 numpy arrays.

  Args:
    path: as of `load`.
    part: "image" or "text".
    size: the model that they are for. What shapes cannot show is compared with it: activation and heads; a state dict,
      beside which nothing says them, is taken for such a model. Its preprocessing is what `adopt` made it.
    params: shapes that the parameters of the part shall have.
    stats: shapes that its statistics shall have; None or {} if it has none.
    resample: resample the positions of another image size or context length, see `weights.positions`.

  Raises:
    UserError: as of `load`, or a leaf has another shape; the message names it.
  """
  opened = open_model(path, parts=(part,), given=size, preprocessing=False)
  with naming(path):
    source = positions.fitted(opened.source, opened.rows, {f"{part}/position": np.shape(params.get("position", ()))},
                              resample, RESAMPLE)
    tree = convert(opened.rows, source, {part: params} | ({"stats": {part: stats}} if stats else {}),
                   ignored_beside(opened, part))
  check_clip(path, part, opened.size, {"activation": size.activation, f"{part}.heads": getattr(size, part).heads})
  if part == "text" and opened.size.text.eos != size.text.eos:
    raise UserError(f"{path} has text.eos={opened.size.text.eos}, but this config's model has {size.text.eos}; "
                    f"set --config.model.text.eos={opened.size.text.eos}")
  return tree[part], tree.get("stats", {}).get(part, {})


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


def open_model(path: str, model: str = "", *, parts: tuple[str, ...] = PARTS, given: ClipConfig | None = None,
               flag: str = "--model", role: str = "clip", preprocessing: bool = True) -> Opened:
  """Returns the model at `path` with its tensors yet to be read; raises UserError as `load` does.

  Args:
    path, model, flag: as of `load`.
    parts: that will be read; without the others a source will do.
    given: the model that they are for: believed of a state dict of which nothing says heads and activation.
    role: what is asked for, "clip" or "image", for messages.
    preprocessing: give the size the preprocessing that lies beside the weights; without, it is not looked at.
  """
  check_exists(path)
  for read in FORMATS:
    if (opened := read(path)) is not None:
      break
  else:
    opened = state_dict(path, model, parts, given, flag, role)
  if missing := [part for part in parts if part not in opened.parts]:
    raise UserError(f"{path}: only the {' and '.join(opened.parts)} tower of a CLIP, but the {missing[0]} tower is "
                    "needed here")
  if preprocessing and opened.preprocessing is not None:
    size = dataclasses.replace(opened.size, **dataclasses.asdict(opened.preprocessing()))
    opened = dataclasses.replace(opened, size=size)
  if model:
    said = configs.described(model)
    for field in (f for f in bare.UNSEEN if f.partition(".")[0] in ("activation", *opened.parts)):
      ours, theirs = (flatten(size)[field] for size in (said, opened.size))
      if ours != theirs:
        raise UserError(f"{path} has {field}={theirs!r}, but {flag}={model} says {ours!r}")
  return opened


def own_tokenizer(weights: str) -> Tokenizer:
  """Returns the tokenizer that lies or is recorded beside the weights, else CLIP's."""
  weights, _ = names.split(weights)
  folder = weights if os.path.isdir(weights) else os.path.dirname(weights)
  path = os.path.join(folder, "config.json")
  if os.path.isdir(os.path.join(folder, "checkpoints")) and os.path.isfile(path):  # a run of limber_jax.train
    try:
      recorded = read_json(path)
      found = Tokenizer(recorded["data.tokenizer.name"], workdirs.finder(folder)(recorded["data.tokenizer.path"]))
    except (OSError, UserError, ValueError, KeyError) as error:
      raise UserError(f"{path} names no tokenizer ({error})") from error
    vocabularies.check_stored(found, path)
    return found
  beside = any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "merges.txt"))
  return Tokenizer("clip", folder if beside else "")


def check_exists(path: str) -> None:
  file, key = names.split(path)
  if key and os.path.isdir(file):
    raise UserError(f"{path}: {file} is a directory; #{key} chooses among the sets of weights in a file")
  if not os.path.exists(file):
    raise UserError(f"{path}: no such file or directory; weights are read from disk, and a model of the Hugging Face "
                    f"hub is brought there by `hf download NAME --local-dir DIRECTORY`")


def ignored_beside(opened: Opened, part: str) -> tuple[str, ...]:
  """Returns the patterns of what need not be read for one part: the others' tensors too."""
  others = (pattern(theirs) for ours, theirs, _ in opened.rows if ours.removeprefix("stats/").split("/")[0] != part)
  return (*opened.ignored, *others)


def check_clip(path: str, part: str, theirs: ClipConfig, ours: dict[str, Any], encoder: bool = False) -> None:
  """Raises if the CLIP at `path` computes something else than `ours` says: of a CLIP's config, or of an encoder's."""
  has = {"activation": theirs.activation, f"{part}.heads": getattr(theirs, part).heads}
  for name, value in has.items():
    if value != ours[name]:
      field = f"image.{name}".replace("image.image", "image.tower") if encoder else name
      raise UserError(f"{path} has {name}={value!r}, but this config's model has {ours[name]!r}; "
                      f"set --config.model.{field}={value}")


def shapes(size: ClipConfig, logit_bias: bool = False) -> dict[str, Any]:
  """Returns ShapeDtypeStructs of all that a model holds: parameters by part, and statistics under "stats"."""
  model = clip.build(size, Compute(dtype="float32", attention="xla"))
  image = jax.eval_shape(lambda: model.init_image(jax.random.key(0)))
  text = jax.eval_shape(lambda: model.init_text(jax.random.key(0)))
  scalar = jax.ShapeDtypeStruct((), np.float32)
  like = {"image": image["params"], "text": text["params"], "logit_scale": scalar}
  if logit_bias:
    like["logit_bias"] = scalar
  return like | ({"stats": {"image": image["batch_stats"]}} if "batch_stats" in image else {})


def limber(path: str) -> Opened | None:
  config = os.path.join(path, "limber_config.json")
  if not os.path.isfile(config):
    return None
  with naming(config):
    size = clip.size_from_dict(read_json(config))
  source = files.tensors(os.path.join(path, "params.safetensors"))
  return Opened(size, source, identity(shapes(size, "logit_bias" in source)))


def _run(path: str) -> Opened | None:
  if not os.path.isdir(os.path.join(path, "checkpoints")):
    return None
  config = os.path.join(path, "config.json")
  with naming(config):
    values = workdirs.check_clip(read_json(config), path)
    size = clip.size_from_dict({k.removeprefix("model."): v for k, v in values.items() if k.startswith("model.")})
  like = shapes(size, values["loss.kind"] == "sigmoid")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
  stats_like = like.pop("stats", {})
  trained, trained_stats = ({k: v for k, v in tree.items() if k in values["trainable"]} for tree in (like, stats_like))
  checkpoints = Checkpoints(path, Checkpoint(best=values["checkpoint.best"]))
  try:
    params, stats = checkpoints.read("", lambda step: checkpoints.restore_params(step, trained, trained_stats))
  finally:
    checkpoints.close()
  for part in like.keys() - trained.keys():  # what was frozen is in no checkpoint
    if not values.get(f"init.{part}"):
      raise UserError(f"{path}: its {part!r} was frozen at random values, which no checkpoint holds")
    weights = workdirs.finder(path)(values[f"init.{part}"])
    params[part], found = load_into(weights, part, size, like[part], stats_like.get(part),
                                    values.get("init.resample_positions", False))
    stats = stats | ({part: found} if found else {})
  tree = params | ({"stats": stats} if stats else {})
  return Opened(size, flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/"), identity(tree))


def open_clip(path: str) -> Opened | None:
  config = os.path.join(path, "open_clip_config.json")
  if not os.path.isfile(config):
    return None
  source = find_tensors(path, OPEN_CLIP_FILES)
  if source is None:
    return None
  if "vision_model.embeddings.class_embedding" in source:
    return None  # a directory for both libraries, whose weights are in transformers' names
  with naming(config):
    size = configs.open_clip_size(read_json(config))
  return Opened(size, source, clip.openai_weights(size.image.kind), spec.OPENAI_IGNORED,
                preprocessing=functools.partial(configs.open_clip_preprocessing, config, size.image.image_size))


def hf(path: str) -> Opened | None:
  config = os.path.join(path, "config.json")
  if not os.path.isfile(config) or not any(os.path.isfile(os.path.join(path, name)) for name in HF_FILES):
    return None
  with naming(config):
    values = read_json(config)
    if (there := configs.HF_PARTS.get(str(values.get("model_type")))) is None:
      return None  # another model, which is named by whoever asked
    size = configs.hf_size(values)
  source = bare.whole_names(find_tensors(path, HF_FILES))
  prefixes = {"image": "vision_model.", "text": "text_model."}
  there = tuple(part for part in there if any(name.startswith(prefixes[part]) for name in source))
  said = functools.partial(configs.hf_preprocessing, path, size.image.image_size, "CLIP") if "image" in there else None
  return Opened(size, source, clip.hf_weights(), spec.HF_IGNORED, there, said)


OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
                    "open_clip_pytorch_model.bin")
HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_tensors(path: str) -> dict[str, files.Tensor]:
  """Returns the tensors of a file by their model's own names, and says what was taken off them."""
  tensors, line = names.weights(path)
  if line:
    say(line)
  return tensors


@functools.cache  # the parts of a model are read one by one, and the line is for all of them
def say(line: str) -> None:
  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


def find_tensors(path: str, names: tuple[str, ...]) -> dict[str, files.Tensor] | None:
  """Returns the tensors of the first of these files that is in the directory, or of the shards it lists."""
  for name in names:
    if os.path.isfile(file := os.path.join(path, name)):
      return _shards(path, file) if name.endswith(".index.json") else read_tensors(file)
  return None


def _shards(path: str, index: str) -> dict[str, files.Tensor]:
  with naming(index):
    where = dict(read_json(index)["weight_map"])
    for file in set(where.values()):
      if os.path.basename(file) != file:
        raise UserError(f"weight_map points outside of the directory: {file!r}")
  shards = {file: files.tensors(os.path.join(path, file)) for file in sorted(set(where.values()))}
  for name, file in where.items():
    if name not in shards[file]:
      raise UserError(f"{index}: {name!r} is not in {file}")
  return names.unwrap({name: shards[file][name] for name, file in where.items()}, index)[0]


def state_dict(path: str, model: str, parts: tuple[str, ...], given: ClipConfig | None, flag: str, role: str) -> Opened:
  if os.path.isdir(path):
    config = os.path.join(path, "config.json")
    if os.path.isfile(config):
      with naming(config):
        values = read_json(config)
      if str(values.get("model_type")) not in configs.HF_PARTS:
        raise identify.foreign(config, identify.of_config(values), role)
    found = [os.path.join(path, name) for name in (*OPEN_CLIP_FILES, *HF_FILES)]
    path = next((file for file in found if os.path.isfile(file) and not file.endswith(".json")), "")
    if not path:
      raise UserError(f"{os.path.dirname(found[0])}: no model there; looked for limber_config.json, "
                      f"open_clip_config.json with open_clip_model.safetensors, and config.json with model.safetensors "
                      "or pytorch_model.bin")
  source, file = bare.whole_names(read_tensors(path)), names.split(path)[0]
  layout = bare.layout(source, file, role)
  there = bare.parts(source, layout)
  with naming(file):
    wanted = tuple(part for part in there if part in parts) or there
    size, who = bare.size(source, file, layout, wanted, model, given, flag)
    if who:
      say(f"{file}: heads and activation ({size.activation}) are taken from {who}")
  said = configs.preprocessing_beside(file, size) if "image" in there else None
  return Opened(size, source, layout.rows, layout.ignored, there, said)


FORMATS: tuple[Callable[[str], Opened | None], ...] = (limber, open_clip, _run, hf)
"""Each returns None if `path` is not of its format; what is of none is a state dict, or no model."""


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
