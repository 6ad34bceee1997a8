"""Image files that a command is given: found in folders, read, or the reason why not."""

import os
import sys
from collections.abc import Callable, Sequence

import numpy as np

from limber_jax import cli, config_json
from limber_jax.data.images import PLAIN, ImageOptions
from limber_jax.data.sources import folder
from limber_jax.errors import UserError
from limber_jax.runtime import inputs
from limber_jax.weights.configs import naming


def attempt(read: Callable[[str], np.ndarray], path: str) -> np.ndarray | str:
  """Returns the image that `read` finds at a path, or the reason why it finds none."""
  try:
    return read(path)
  except UserError as error:
    return str(error).removeprefix(f"{path}: ")
  except OSError as error:
    return error.strerror or str(error)


def find(inputs: Sequence[str], images: ImageOptions = PLAIN) -> list[str]:
  """Returns the files among `inputs` and the images in the folders among them, as `folder.images_below` has them.

  Folders that cannot be read are named on stderr.

  Raises:
    UserError: a folder without images, or nothing at all.
  """
  found, suffixes = [], tuple(dict.fromkeys((*folder.SUFFIXES, *images.suffixes)))
  for path in inputs:
    if not os.path.isdir(path):
      found.append(path)
      continue
    inside, refused = folder.images_below(path, suffixes)
    for name, reason in refused.items():
      print(cli.printable(f"{name}: {reason}"), file=sys.stderr, flush=True)
    if not inside:
      raise UserError(f"{path}: no images in this folder; looked for {', '.join(suffixes)}")
    found += inside
  if not found:
    raise UserError("no images given; name files or folders after the flags")
  return found


def own_images(weights: str) -> ImageOptions:
  """Returns how the run of a workdir reads image files; of other weights the defaults."""
  path = os.path.join(weights, "config.json")
  if not os.path.isdir(os.path.join(weights, "checkpoints")) or not os.path.isfile(path):
    return ImageOptions()
  with naming(path):
    text = inputs.text(path, inputs.CONFIG)
  return ImageOptions.from_config(config_json.from_json(text, path).data)
