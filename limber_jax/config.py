"""The configuration of an experiment: dataclasses, every default in one place, with its reason.

An experiment is a Python file whose `get_config()` returns a `Config`; any field can be set on the command line
(`--config.optim.lr=1e-4`), typed by its default. What a field may be stands beside its default; see
`limber_jax.ranges`. Fields are settings of one run: facts about a model (its sizes, its mean and std) live beside the
model.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from limber_jax import config_history, ranges, registry
from limber_jax.errors import UserError, did_you_mean
from limber_jax.ranges import COUNT, SEEDS, ranged


class Unnamed(str):
  """A split that nobody named, which is a default: of data to train on. Evaluations never take it for granted."""


@dataclass(init=False)
class Source:
  """Where records {id, image, text} come from: `Source("jsonl", "data/pairs.jsonl", text_key="caption")`.

  Each source is a dataclass that derives from this, in a file of its own in `limber_jax.data.sources`: its name, the
  fields that it reads, what each of them means there. It adds a line in registry.SOURCES, and opens itself: `open`.
  Called as above, this gives the one of that name, as pathlib.Path gives the path of the system.
  """

  paths: ClassVar[tuple[str, ...]] = ("path",)  # those of its fields that hold the path of a file or a directory

  name: str = "digits"  # its own in registry.SOURCES

  # What is read of a source that has no such field.
  path = ""
  split = ""

  def __new__(cls, name: str = "digits", *values: Any, **fields: Any) -> "Source":
    """Returns the source of a name, whose `__init__` Python then calls; raises UserError for one or a field unknown."""
    if cls is not Source:
      return super().__new__(cls)
    own = source_of(name)
    known = [f.name for f in dataclasses.fields(own)]
    for given in fields:
      check_field(own, given)
    if len(values) >= len(known):
      raise UserError(f"data source {name!r} takes {', '.join(known)}, got {len(values) + 1} values")
    return super().__new__(own)

  @property
  def where(self) -> str:
    """Its path, or the name of a source that has none."""
    return self.path or self.name

  def open(self) -> Any:
    """Returns the `data.sources.Source` of these settings; raises UserError if its data are missing or unfit."""
    raise NotImplementedError  # what all sources share is none: each has an `open` of its own

  def splits(self) -> tuple[str, ...]:
    """Returns the values of `split` that are there.

    They are ("",) where the data are not divided and only "" reads them, () where any of "" and "train" does.
    """
    return ()

  def of_name(self, name: str) -> "Source":
    """Returns a source of another name: what both have is as here, and the rest as by default."""
    known = {f.name for f in dataclasses.fields(source_of(name))}
    return Source(**{f: v for f, v in vars(self).items() if f in known} | {"name": name})


def source_of(name: str) -> type[Source]:
  """Returns the dataclass of a source by its name in the registry; raises UserError with the nearest one."""
  return registry.lookup("data source", registry.SOURCES, name)


def check_field(source: type[Source], name: str) -> None:
  """Raises UserError if a source has no field of this name; the message has the nearest one, and all that it has."""
  known = [f.name for f in dataclasses.fields(source)]
  if name not in known:
    now = config_history.SOURCE_FIELDS.get(source.name, {}).get(name, name)
    raise UserError(f"data source {source.name!r} has no field {name!r}{did_you_mean(now, known)}")


@dataclass
class Tokenizer:
  """How text becomes ids."""

  name: str = "clip"        # a name in registry.TOKENIZERS
  path: str = ""            # a local directory or a hub id; "" = the name's own default


@dataclass
class Data:
  """The training data and what happens to a record on its way to the device."""

  source: Source = field(default_factory=Source)
  tokenizer: Tokenizer = field(default_factory=Tokenizer)
  # random: the paper's square crop of the resized image | resized: RandomResizedCrop | center | encoder: its own rule
  crop: str = ranged("random", choices=("random", "resized", "center", "encoder", "squash", "native", "longest"))
  # area kept by crop="resized": open_clip's default
  crop_scale: tuple[float, ...] = ranged((0.9, 1.0), above=0, at_most=1, length=2)
  # JPEG files of many pixels are decoded at a half, quarter or eighth of their sides, never less than twice what is
  # needed: of 12 megapixels for 224 in a quarter of the time. Pixels then differ from PIL's by 0.4 of 255 on average, 7
  # at most (measured on two photographs), so it is off unless asked for; smaller photographs are decoded the same.
  jpeg_fast_decode: bool = False
  # Formats of images that are read beside JPEG, PNG and WebP: gif, bmp, tiff, avif; the first frame of each.
  formats: tuple[str, ...] = ()
  exif: bool = False        # images are turned as their EXIF orientation says, which open_clip and torchvision ignore
  # T, tokens of a caption with its end; CLIP's text tower has a length of its own
  length: int = ranged(64, at_least=1, at_most=10**6)
  features: str = ""        # a directory of limber_jax.encode, read in place of images
  workers: int = ranged(0, at_least=0, at_most=1024)   # Grain processes; 0 reads in threads of the training process
  threads: int = ranged(8, at_least=0, at_most=1024)   # reading threads a process: decoding releases the GIL
  prefetch: int = ranged(2, at_least=0, at_most=1024)  # batches ready ahead of the device
  repeat: bool = False      # whether a batch may hold records twice, where there are fewer than it has
  # The share of the records seen that may be unreadable: others are substituted. 0 ends the run at the first.
  max_bad_fraction: float = ranged(0.01, at_least=0, at_most=1)

  def __post_init__(self):
    self.crop = config_history.CROPS.get(self.crop, self.crop)


@dataclass
class Loss:
  """The contrastive loss."""

  kind: str = ranged("softmax", choices=("softmax", "sigmoid"))  # softmax: CLIP | sigmoid: SigLIP
  chunk_size: int = ranged(0, at_least=0, at_most=COUNT)  # rows of logits held at a time; 0 holds them all
  # GradCache: the batch goes through the towers in so many microbatches, and the loss still sees all of it. On so many
  # devices that some would be left without rows there are fewer.
  num_microbatches: int = ranged(1, at_least=1, at_most=COUNT)


@dataclass
class Captions:
  """The loss over captions after an image's prompt, and what LiMBeR's code did otherwise."""

  # always: each caption ends with an EOS to predict | reference: the longest of every micro-batch have none
  eos: str = ranged("always", choices=("always", "reference"))
  # tokens: every token of the batch counts the same | reference: every micro-batch does
  mean: str = ranged("tokens", choices=("tokens", "reference"))
  micro_batch: int = ranged(16, at_least=1, at_most=COUNT)  # rows of a micro-batch, for "reference": 256 over 16 GPUs
  # eval: frozen or tuned, the encoder runs as at test | train: with batch statistics and dropped paths, as theirs did
  encoder: str = ranged("eval", choices=("eval", "train"))


@dataclass(unsafe_hash=True)  # known before tracing, as a static argument must be; not to be changed once in use
class Decoding:
  """How text is generated. LiMBeR's code ships method="sample" with 0.7, 0, 0.9 and inverted_nucleus."""

  method: str = ranged("greedy", choices=("greedy", "sample", "beam"))
  # sample: what logits are divided by, before they are filtered; method="greedy" is the limit of 0
  temperature: float = ranged(1.0, above=0)
  top_k: int = ranged(0, at_least=0, at_most=COUNT)  # sample: from so many of the likeliest tokens; 0 = all
  top_p: float = ranged(1.0, above=0, at_most=1)  # sample: from the fewest tokens that have this probability together
  inverted_nucleus: bool = False  # sample: keep 1 - top_p instead, and divide by the temperature after filtering
  beams: int = ranged(4, at_least=1, at_most=1000)  # beam: texts kept for each row, each with a cache of its own
  # beam: texts compete by log-probability / length ** length_penalty
  length_penalty: float = ranged(1.0, at_least=-10, at_most=10)
  prompt: str = "A picture of"    # what follows an image at test, and only there; no space at its end
  max_new_tokens: int = ranged(20, at_least=1, at_most=10**6)
  seed: int = ranged(0, at_least=0, at_most=SEEDS)  # sample: a row draws by this and its own number


@dataclass
class Spike:
  """Which steps are skipped because loss or gradient norm leaps; see training.optimizer. Off, as in the papers."""

  # W, the last finite losses and gradient norms that say what is usual; 0 = off
  window: int = ranged(0, at_least=0, at_most=100_000)
  # k: skipped is what is more than k deviations above the median. Gradient norms have a long tail: those of healthy
  # runs on 16 digits a batch come to 14.
  factor: float = ranged(20.0, above=0)


@dataclass
class Optim:
  """AdamW with linear warm-up and cosine decay to zero: CLIP, Tables 18-20."""

  lr: float = ranged(5e-4, above=0)
  # cosine | linear: after a linear warm-up | deepspeed: a logarithmic warm-up, then linear, as LiMBeR's code had it
  schedule: str = ranged("cosine", choices=("cosine", "linear", "deepspeed"))
  # the peak rate of a part, where it is not `lr`; a part is frozen by leaving it out of `trainable`
  part_lr: dict[str, float] = ranged(factory=dict, above=0)
  warmup_steps: int = ranged(2000, at_least=0, at_most=COUNT)  # less than `steps`
  # on kernels and embeddings, never on gains, biases and the temperature; times the rate 1 at most
  weight_decay: float = ranged(0.2, at_least=0)
  b1: float = ranged(0.9, at_least=0, below=1)
  b2: float = ranged(0.98, at_least=0, below=1)
  eps: float = ranged(1e-6, above=0)
  clip_norm: float = ranged(0.0, at_least=0)  # global gradient norm; 0 does not clip
  # steps in a row with a non-finite loss or gradient, or with spikes, that end the run
  max_skips: int = ranged(10, at_least=1, at_most=COUNT)
  spike: Spike = field(default_factory=Spike)


@dataclass
class Mesh:
  """Devices along each axis; -1 takes what is left. The batch is spread over data × fsdp.

  Over several TPU slices `data` is a multiple of their number: no parameter is split over them.
  """

  data: int = ranged(-1, at_least=-1, at_most=10**6)
  fsdp: int = ranged(1, at_least=-1, at_most=10**6)
  tensor: int = ranged(1, at_least=-1, at_most=10**6)


@dataclass(unsafe_hash=True)  # an attribute of linen modules, which are hashed; not to be changed once built
class Compute:
  """How the arithmetic is done; no field changes what is computed beyond rounding."""

  # of activations; parameters and reductions are float32
  dtype: str = ranged("bfloat16", choices=("float32", "bfloat16", "float16"))
  # none | dots: keep matrix products | full: keep only block inputs
  remat: str = ranged("none", choices=("none", "dots", "full"))
  # auto: cudnn where the device has it | xla | cudnn
  attention: str = ranged("auto", choices=("auto", "xla", "cudnn"))
  unroll: int = ranged(1, at_least=1, at_most=10_000)  # transformer blocks per iteration of the scan


@dataclass
class Checkpoint:
  """When to save, and what to keep. Saving is asynchronous."""

  every: int = ranged(1000, at_least=1, at_most=COUNT)  # steps
  keep: int = ranged(2, at_least=0, at_most=COUNT)      # the newest; 2 at least are kept
  best: str = ""             # a metric of an evaluation, such as "zeroshot/top1": its best step is kept too


@dataclass
class Evaluation:
  """What all evaluations have. Each is a dataclass that derives from this, in a file of its own in `limber_jax.evals`.

  It adds its own settings and a line in registry.EVALS, and opens itself: `open`.
  """

  name: ClassVar[str] = ""               # its own in registry.EVALS
  needs: ClassVar[tuple[str, ...]] = ()  # the keys of task.predict() that it uses
  files: ClassVar[tuple[str, ...]] = ()  # those of its fields that may hold the path of a file

  source: Source = field(default_factory=Source)
  # steps; 0 = only at the end; -1 = only by limber_jax.evaluate, never in training
  every: int = ranged(1000, at_least=-1, at_most=COUNT)
  batch_size: int = ranged(256, at_least=1, at_most=2**20)
  max_bad_fraction: float = ranged(0.01, at_least=0, at_most=1)  # the share of examples that may be unreadable

  def open(self, context: Any) -> Any:
    """Returns the `evals.base.Eval` of an `evals.base.Context`; raises UserError if data are missing or unfit."""
    raise NotImplementedError  # what all evaluations share is none: each has an `open` of its own


def evaluation_of(name: str) -> type[Evaluation]:
  """Returns the dataclass of an evaluation by its name in the registry; raises UserError with the nearest one."""
  return registry.lookup("evaluation", registry.EVALS, name)


# What stands for any of many dataclasses, and gives that of a name: what `name` in a configuration says.
NAMED: dict[type, Callable[[str], type]] = {Evaluation: evaluation_of, Source: source_of}


@dataclass
class Init:
  """Weights to start from, by part; "" starts from random."""

  image: str = ""            # a directory or file that limber_jax.weights can read
  text: str = ""
  prompt: str = ""
  lm: str = ""
  extra_projectors: dict[str, str] = field(default_factory=dict)  # by part: {"image@name": …}
  resample_positions: bool = False  # of a CLIP at another image size or context length, as open_clip does

  def path_of(self, part: str) -> str:
    """Returns where the weights of a part come from, "" for random ones."""
    return self.extra_projectors.get(part, getattr(self, part, "") if part != "extra_projectors" else "")


@dataclass
class Config:
  """One experiment."""

  name: str
  model: Any                 # a size: models.clip.SIZES["clip_vit_b32"]()
  task: str = "contrastive"  # a name in registry.TASKS
  trainable: tuple[str, ...] = ("image", "text", "logit_scale")
  init: Init = field(default_factory=Init)
  loss: Loss = field(default_factory=Loss)
  captions: Captions = field(default_factory=Captions)  # of task "captioning"
  decoding: Decoding = field(default_factory=Decoding)
  data: Data = field(default_factory=Data)
  optim: Optim = field(default_factory=Optim)
  batch_size: int = ranged(32768, at_least=1, at_most=2**24)  # pairs in one optimizer step, over all devices
  steps: int = ranged(390_625, at_least=1, at_most=COUNT)     # 32 epochs of 400 M pairs at 32,768
  seed: int = ranged(0, at_least=0, at_most=SEEDS)
  mesh: Mesh = field(default_factory=Mesh)
  compute: Compute = field(default_factory=Compute)
  checkpoint: Checkpoint = field(default_factory=Checkpoint)
  evals: dict[str, Evaluation] = field(default_factory=dict)
  # workdir -> the experiment file that is trained there first, unless it has been: what `init` reads
  prerequisites: dict[str, str] = field(default_factory=dict)
  log_every: int = ranged(50, at_least=1, at_most=COUNT)  # steps
  # Seconds without a batch or a step, or six times as many without anything else, after which the run prints where its
  # threads are and exits; see limber_jax.runtime.watchdog. 0 waits for ever.
  watchdog: float = ranged(600.0, at_least=1, or_zero=True)

  # FLOP/s of one device at most, for the share that is logged; 0 = as training.flops knows it, or no share
  peak_flops: float = ranged(0.0, at_least=0)

  def __post_init__(self):
    self.evals, self.prerequisites = dict(self.evals), dict(self.prerequisites)


def check(config: Config, start: str = "config.") -> None:
  """Raises UserError for the first field that is of another type or range, or names what is not there.

  Args:
    config: the experiment.
    start: stands before the names of fields, in the message.
  """
  ranges.check(config, start)
  check_model(config)
  _check_sources(config.data, f"{start}data.")
  for name, evaluation in config.evals.items():
    where, cls = f"{start}evals.{name}", type(evaluation)
    _check_sources(evaluation, f"{where}.")
    if evaluation.name != cls.name:
      raise UserError(f"{where}.name={evaluation.name!r}: what an evaluation is stands in the experiment's file; this "
                      f"is {cls.name!r}")
    if cls.name not in registry.EVALS:
      raise UserError(f"{where}: expected an evaluation of the registry, such as "
                      f"limber_jax.evals.zeroshot.ZeroShot(), got {cls.__name__}")


def _check_sources(holder: Data | Evaluation, start: str) -> None:
  """Raises UserError if a source was renamed, which leaves it the fields of the other."""
  for field_, source in vars(holder).items():
    if isinstance(source, Source) and source.name != type(source).name:
      raise UserError(f"{start}{field_}.name={source.name!r}: this is {type(source).name!r}; wanted "
                      f"Source({source.name!r}, …) in its place")


def check_model(config: Config) -> None:
  """Raises UserError if the model is of another task."""
  models = models_of(config.task)
  if not isinstance(config.model, models):
    wanted = " or ".join(f"{m.__module__.removeprefix('limber_jax.')}.{m.__name__}" for m in models)
    raise UserError(f"task {config.task!r} needs a {wanted}, got {type(config.model).__name__}")


def models_of(task: str) -> tuple[type, ...]:
  """Returns the dataclasses that `Config.model` may be; raises UserError if there is no such task."""
  return registry.lookup("task", registry.TASKS, task).model_configs()


def check_best(config: Config) -> None:
  """Raises UserError if checkpoint.best names no metric of an evaluation that training runs."""
  best, running = config.checkpoint.best, [name for name, e in config.evals.items() if e.every >= 0]
  if best and not best.startswith(tuple(f"{name}/" for name in running)):
    raise UserError(f"config.checkpoint.best={best!r}: wanted a metric of an evaluation that training runs, such as "
                    f"{(running or ['zeroshot'])[0]}/top1; those of this experiment: {', '.join(running) or 'none'}")


def missing_best(best: str, metrics: dict[str, float]) -> str:
  """Returns what to say if the evaluation of which checkpoint.best is a metric was run and gave others; else ""."""
  beside = [name for name in metrics if name.partition("/")[0] == best.partition("/")[0]]
  return f"config.checkpoint.best={best!r} was not measured, so no checkpoint is the best; there are " + ", ".join(
    beside) if best and beside and best not in metrics else ""


def choose(name: str, value: str, allowed: tuple[str, ...]) -> str:
  """Returns `value` if it is allowed for the field `name`; raises UserError with the choices if not."""
  if value not in allowed:
    raise UserError(f"config.{name}={value!r}: choose one of {', '.join(allowed)}")
  return value
