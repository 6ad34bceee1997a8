"""CLIPs without a configuration: what shapes show, and who may say what they cannot show, heads and activation.

Widths, layers and patches can be read off a state dict. How many heads share a width and which activation lies between
two matrices cannot: every number of heads that divides gives embeddings, and all but one wrong ones. So one of these
must say it, and they must agree: --model=, a configuration beside the file, or OpenAI's own marks.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from limber_jax.config_json import flatten
from limber_jax.errors import UserError
from limber_jax.models import clip, spec
from limber_jax.models.clip import ClipConfig
from limber_jax.models.layers import Rows
from limber_jax.weights import configs, identify
from limber_jax.weights.convert import pattern, shape_of

MARKS = {"input_resolution": "image.image_size", "context_length": "text.context", "vocab_size": "text.vocab"}
# What only a configuration tells.
UNSEEN = ("activation", "image.heads", "text.heads", "text.eos")


@dataclass(frozen=True)
class Layout:
  """In whose names the tensors of a CLIP are."""

  library: str               # OpenAI | transformers
  kind: str                  # of the image tower: vit | resnet
  rows: Rows
  ignored: tuple[str, ...]

  def __str__(self) -> str:
    return f"a CLIP with a {'ViT' if self.kind == 'vit' else 'ResNet'} in {self.library}'s names"


# An archive of torch.jit.save holds the attributes of its modules too, and one of them is the causal mask.
_OPENAI_IGNORED = (*spec.OPENAI_IGNORED, r"(visual\.)?transformer\.resblocks\.\d+\.attn_mask")
LAYOUTS = (Layout("OpenAI", "vit", clip.openai_weights("vit"), _OPENAI_IGNORED),
           Layout("OpenAI", "resnet", clip.openai_weights("resnet"), _OPENAI_IGNORED),
           Layout("transformers", "vit", clip.hf_weights(), spec.HF_IGNORED))


def whole_names(source: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the tensors of a CLIPVisionModel or CLIPTextModel by the names they have in a CLIPModel.

  Since transformers 5 such a model, without a projection, leaves its tower's name out.
  """
  for tower, own in (("vision_model", "pre_layrnorm.weight"), ("text_model", "embeddings.token_embedding.weight")):
    if own in source and "embeddings.position_embedding.weight" in source:
      return {f"{tower}.{name}": tensor for name, tensor in source.items()}
  return source


def layout(source: Mapping[str, Any], path: str, role: str = "clip") -> Layout:
  """Returns the layout that most of the tensors have; raises UserError, which says what else it is, where few do."""
  if what := identify.of_tensors(source):
    raise identify.foreign(path, what, role)
  scores = []
  for one in LAYOUTS:
    known = re.compile("|".join([pattern(theirs) for ours, theirs, _ in one.rows if "/" in ours] or ["(?!)"]))
    scores.append(sum(known.fullmatch(name) is not None for name in source))
  best = max(range(len(LAYOUTS)), key=scores.__getitem__)
  if 2 * scores[best] < len(source):
    few = ", ".join(sorted(source)[:3])
    near = f", of which {scores[best]} are of {LAYOUTS[best]}" if scores[best] else ""
    raise identify.foreign(path, f"no model that is known here ({len(source)} tensors{near}: {few}, …)", role)
  return LAYOUTS[best]


def parts(source: Mapping[str, Any], names: Layout) -> tuple[str, ...]:
  """Returns the towers of which there are tensors."""
  found = []
  for part in ("image", "text"):
    theirs = re.compile("|".join(pattern(theirs) for ours, theirs, _ in names.rows if ours.startswith(f"{part}/")))
    found += [part] * any(theirs.fullmatch(name) for name in source)
  return tuple(found)


def shown(source: Mapping[str, Any], names: Layout, parts: tuple[str, ...]) -> dict[str, Any]:
  """Returns what shapes show of the size, as `config_json.flatten` has it: {"embed_dim": 512, "image.width": 768, …}.

  Raises:
    UserError: a tensor that is missing or of no such shape.
  """
  rows = {ours: (theirs, how) for ours, theirs, how in names.rows}

  def shape(ours: str) -> tuple[int, ...]:
    theirs, how = rows[ours]
    name = re.sub(r"\{\+?\d*\}", "0", theirs)
    if name not in source:
      raise UserError(f"this is most like {names}, but has no tensor {name!r}")
    found = shape_of(tuple(source[name].shape), how)
    if not found:
      raise UserError(f"this is most like {names}, but {name!r} has shape {tuple(source[name].shape)}")
    return found

  def count(theirs: str) -> int:
    blocks = re.compile(re.sub(r"\\\{(\\\+\d+)?\\\}", r"(\\d+)", re.escape(theirs)))
    return len({match[1] for name in source if (match := blocks.fullmatch(name))})

  out: dict[str, Any] = {}
  if "image" in parts and names.kind == "vit":
    *_, patch, _, width = shape("image/patch/kernel")
    grid = _root(shape("image/position")[0] - 1)
    out |= {"image.image_size": grid * patch, "image.patch": patch, "image.width": width,
            "image.layers": count(rows["image/blocks/ln_1/scale"][0])}
  elif "image" in parts:
    layers = [count(f"visual.layer{i}.{{}}.conv1.weight") for i in (1, 2, 3, 4)]
    out |= {"image.image_size": 32 * _root(shape("image/pool/position")[0] - 1), "image.layers": layers,
            "image.width": shape("image/layer1_first/conv1/kernel")[-1]}
  if "text" in parts:
    vocab, width = shape("text/embedding")
    out |= {"text.context": shape("text/position")[0], "text.vocab": vocab, "text.width": width,
            "text.layers": count(rows["text/blocks/ln_1/scale"][0])}
  heads = {"image": "image/head/kernel" if names.kind == "vit" else "image/pool/out/kernel", "text": "text/head/kernel"}
  for part in parts:
    if rows[heads[part]][0] in source:  # a CLIPVisionModel has none
      out["embed_dim"] = shape(heads[part])[-1]
  return out | ({"image.kind": names.kind} if "image" in parts else {})


def size(source: Mapping[str, Any], path: str, names: Layout, parts: tuple[str, ...], model: str,
         given: ClipConfig | None, flag: str) -> tuple[ClipConfig, str]:
  """Returns (size, who says of it what shapes do not show) of a state dict; "" where the user or OpenAI says it.

  Args:
    source: its tensors.
    path: of its file.
    names: its layout.
    parts: that are read of it.
    model: what the user says by --model=, "" if nothing.
    given: the size of the model that it is read for, if there is one; it is believed where nothing else speaks.
    flag: how the user says it, for messages.

  Raises:
    UserError: nobody says what shapes do not show, or two say different things.
  """
  seen = shown(source, names, parts)
  said: list[tuple[str, ClipConfig]] = []
  if model:
    said.append((f"{flag}={model}", configs.described(model)))
    if wrong := _differs(seen, said[0][1]):
      raise UserError(f"has {wrong}={seen[wrong]!r}, but {flag}={model} {flatten(said[0][1]).get(wrong)!r}")
  beside, unfit = _beside(path, seen)
  name = _published(seen) if len(parts) == 2 else ""
  said += beside
  if name and _marked(source, seen):
    said.append(("OpenAI, whose own file this is,", clip.PUBLISHED[name]()))
  for who, other in said[1:]:
    for field in UNSEEN:
      a, b = (flatten(x)[field] for x in (said[0][1], other))
      if a != b and field.partition(".")[0] in ("activation", *parts):
        raise UserError(f"{said[0][0]} says {field}={a!r}, but {who} says {b!r}")
  if said:
    return said[0][1], said[0][0] if said[0] in beside else ""
  if given is not None:
    return given, "the config, for nothing beside the file says them"
  both = f"{flag}={name} (QuickGELU, as OpenAI's), {flag}={name},activation=gelu (as most of open_clip's), or "
  raise UserError(f"a state dict says neither how many heads nor which activation its model has"
                  f"{', '.join(['', *unfit])}; say it by {both if name else f'{flag}='}FILE, a config.json of "
                  f"transformers, an open_clip_config.json or one of open_clip's model_configs"
                  f"{'' if name else f', or by a size with what differs, as {flag}=clip_vit_b32,image.heads=8'}")


def _beside(path: str, seen: dict[str, Any]) -> tuple[list[tuple[str, ClipConfig]], list[str]]:
  """Returns (the configurations beside a file that fit its shapes, why others do not)."""
  fit, unfit = [], []
  for config in (os.path.join(os.path.dirname(path), name) for name in configs.CONFIGS):
    if os.path.isfile(config):
      try:
        size = configs.size_in(config)
      except UserError as error:
        unfit.append(f"({error})")
        continue
      if wrong := _differs(seen, size):
        unfit.append(f"{config} is of another model ({wrong}={flatten(size).get(wrong)!r}, not {seen[wrong]!r})")
      else:
        fit.append((config, size))
  return fit, unfit


def _differs(seen: dict[str, Any], size: ClipConfig) -> str:
  """Returns the first field in which a size is not what shapes show, "" if there is none."""
  values = flatten(size)
  return next((f for f in sorted(seen, key=lambda f: f != "image.kind") if values.get(f) != seen[f]), "")


def _published(seen: dict[str, Any]) -> str:
  return next((name for name, make in clip.PUBLISHED.items() if not _differs(seen, make())), "")


def _marked(source: Mapping[str, Any], seen: dict[str, Any]) -> bool:
  """Returns whether the file has the three numbers that OpenAI's archives hold beside their weights, and no others."""

  def said(mark: str) -> int | None:
    tensor = source.get(mark)
    return int(np.asarray(tensor).reshape(())) if tensor is not None and math.prod(tensor.shape) == 1 else None

  return all(said(mark) == seen[field] for mark, field in MARKS.items())


def _root(positions: int) -> int:
  """Returns the side of a square of so many positions."""
  side = math.isqrt(max(positions, 0))
  if side * side != positions or not side:
    raise UserError(f"{positions} positions of patches and the class token's are no square")
  return side
