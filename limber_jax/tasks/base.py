"""What the training loop knows of a task."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from limber_jax.config import Config, Data, Init
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.data.transforms import Transform
from limber_jax.runtime.parallel import Rules


class Task(Protocol):
  """A model, what it is trained for, and what it can be asked for afterwards. All methods are pure."""

  sharding: Rules
  """Rows for `parallel.shardings` that fit every leaf of `init`'s parameters and statistics."""
  vocab: int
  """The number of ids that the model knows."""
  length: int
  """T, the tokens of a text."""

  @staticmethod
  def model_configs() -> tuple[type, ...]:
    """Returns the dataclasses of what config.model may be; `encoders()` and so on as `LimberConfig` has them."""

  @classmethod
  def from_config(cls, config: Config) -> "Task":
    """Returns the task of an experiment; raises UserError if its settings cannot go together."""

  @staticmethod
  def of_weights(config: Config, weights: str, model: str, log: Callable[[str], None]) -> tuple[Any, Init]:
    """Returns (config.model, config.init) by which weights from elsewhere are evaluated in place of what was trained.

    Args:
      config: the experiment.
      weights: where they are.
      model: what they are of, where nothing beside them says it; "" = not said.
      log: gets a line about what is taken over from beside them.

    Raises:
      UserError: there are none such, or `model` says nothing about them.
    """

  def transform(self, tokenizer: Tokenizer, data: Data, train: bool) -> Transform:
    """Returns (record, rng) -> arrays of a batch's row; the rng is None where not `train`."""

  def pixel_settings(self, data: Data) -> dict[str, Any]:
    """Returns, as JSON, how `transform` makes a training batch's pixels, where runs had no such choice at first; or {}.

    What `data` itself says is left out.
    """

  def init(self, rng: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (params {"image": …, "text": …, "logit_scale": []}, stats {"image": …}), by part."""

  def load(self, path: str, part: str, like: dict, stats: dict, resample: bool = False
           ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (params, stats) of one part from disk, laid out as the ShapeDtypeStructs `like` and `stats` say.

    Raises:
      UserError: nothing there, or another model; the message names what does not fit.
    """

  def loss(self, params: dict, stats: dict, batch: dict, rng: jax.Array) -> tuple[jax.Array, tuple[dict, dict]]:
    """Returns (loss [], (metrics {name: []}, stats)) of a global batch of arrays [N, ...]."""

  def project(self, params: dict) -> dict:
    """Returns parameters moved back to where they may be, after an optimizer step: the temperature's bound."""

  def predict(self) -> dict[str, Callable[..., Any]]:
    """Returns what the model can be asked for, by name: pure functions f(params, stats, inputs) that can be jitted."""
