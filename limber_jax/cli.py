"""How the commands start and end: flags, one line for a user's mistake, exit codes.

Exit codes: 0 done (also when SIGTERM, SIGINT or SIGHUP stopped the run after a checkpoint, or with the rest kept), 1
done with some inputs unreadable or evaluations failed, 2 a user's mistake, or a checkpoint or an output that could not
be written, 4 no progress (runtime.watchdog), 130 interrupted by a second Ctrl-C, 141 the reader of a command that
only prints has seen enough (`| head`), as any program in a pipe ends. A command that keeps nothing dies of a signal.
Whatever becomes of its output, a command that makes files goes on (runtime.streams). A process of several that fails
tells the others, which end with the same code and a line that names it; one that ends because another one is gone
without a word dies of SIGABRT, after one line (runtime.peers).
"""

import contextlib
import dataclasses
import difflib
import errno
import functools
import logging
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from limber_jax import config as config_lib
from limber_jax import config_history, ranges
from limber_jax import help as help_lib
from limber_jax.config import Config, Source
from limber_jax.config_json import flatten
from limber_jax.errors import UserError
from limber_jax.runtime import peers, streams, surroundings


def define_config() -> Any:
  """Defines --config=experiments/x.py (with --config.field=value) and returns its holder; see `get_config`."""
  holder = config_flags.DEFINE_config_file("config", None, "Experiment file, such as experiments/quickstart.py.")
  parser = flags.FLAGS["config"].parser
  read = parser.parse
  # Before other flags set fields that only the sources have which these name.
  parser.parse = lambda path: _choose_sources(read(path), sys.argv)
  return holder


def define_model() -> Any:
  """Defines --model=, what weights that say it not themselves are of, and returns its holder."""
  return flags.DEFINE_string("model", "", "Of weights without a configuration, which show no heads and no activation: "
                             "a size, such as clip_vit_b32, or a config.json of transformers or a configuration of "
                             "open_clip; fields that differ may follow: clip_vit_b32,activation=gelu.")


def get_config(holder: Any) -> Config:
  """Returns the parsed experiment; raises UserError if it is missing or broken, or a field is out of range."""
  if flags.FLAGS["config"].value is None and not flags.FLAGS["config"].present:
    raise UserError(f"--config is missing; {_experiments('')}")
  if not isinstance(holder.value, Config):
    raise UserError(f"--config: get_config() gave a {type(holder.value).__name__}, wanted a limber_jax.config.Config")
  ranges.split_commas(holder.value)
  holder.value.data = dataclasses.replace(holder.value.data)  # which knows what its values were called earlier
  config_lib.check(holder.value)
  return holder.value


def load_experiment(path: str) -> Config:
  """Returns the experiment in a file, as it stands there.

  Raises:
    UserError: it is missing or broken, or a field is out of range; the message names the file, and where it can the
      line.
  """
  config = _read_experiment(path)
  try:
    config_lib.check(config)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  return config


def _read_experiment(path: str) -> Config:
  """Returns the experiment in a file; raises UserError if it is missing or broken."""
  _check_file(path)
  try:
    module = runpy.run_path(path)
    if "get_config" not in module:
      raise UserError("it has no function get_config")
    config = module["get_config"]()
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  except SyntaxError as error:
    raise UserError(f"{error.filename or path}, line {error.lineno}: {type(error).__name__}: {error.msg}") from error
  except (Exception, SystemExit) as error:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    raise UserError(f"{path}{f', line {lines[-1]}' if lines else ''}: {type(error).__name__}: "
                    f"{' '.join(str(error).split())}") from error
  if not isinstance(config, Config):
    raise UserError(f"{path}: get_config() gave a {type(config).__name__}, wanted a limber_jax.config.Config")
  return config


def _check_file(path: str, name: str = "") -> None:
  """Raises UserError if there is no experiment's file at `path`, which stands behind `name`."""
  if not os.path.isfile(path):
    raise UserError(f"{name}no file {path!r}; {_experiments(path)}" if name else
                    f"no experiment file {path!r}; {_experiments(path)}")
  if path.endswith(".json"):
    raise UserError(f"{name}{path} is the record of a run, and an experiment is a file of Python; "
                    f"{_experiments('')}")


def run(main: Callable[[list[str]], int | None], *, prints: Callable[[], bool] = lambda: False) -> None:
  """Parses flags, calls `main(positional arguments)` and exits; a UserError becomes one line and exit code 2.

  Args:
    main: returns the exit code, or None for 0.
    prints: asked once the flags are there: is what the command prints all that it makes? Then it ends with its stdout;
      else it goes on without.
  """
  surroundings.speak_utf8()
  streams.install()

  def guarded(argv: Sequence[str]) -> int:
    # app.run has just set both to INFO, where JAX, Orbax and Grain announce each backend tried, save and worker.
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
      if prints():
        streams.must_arrive()
      surroundings.check_memory()
      if "" in argv[1:]:
        raise UserError(f"argument {argv.index('', 1)} is empty: wanted a name or a text")
      return main(list(argv[1:])) or 0
    except UserError as error:
      print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
      return _failed(2, str(error))
    except streams.Gone as gone:
      if gone.error.errno == errno.EPIPE:
        return 141
      print(f"error: standard output: {gone.error.strerror}; this command makes nothing but what it prints: give that "
            "a place, such as > FILE", file=sys.stderr, flush=True)
      return 2
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr, flush=True)
      return _failed(130, "interrupted")
    except Exception as error:
      if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        message = f"out of memory ({' '.join(str(error).split())[:200] or type(error).__name__}); take smaller batches"
        print(f"error: {message}", file=sys.stderr, flush=True)
        return _failed(2, message)
      if message := surroundings.no_device(error):
        print(f"error: {printable(message)}", file=sys.stderr, flush=True)
        return _failed(2, message)
      traceback.print_exc()
      return _failed(1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

  app.run(guarded, flags_parser=functools.partial(_parse, module=main.__module__))


def printable(text: str) -> str:
  """Returns text for one line of a terminal: what cannot be shown, such as a byte that is no UTF-8, is escaped."""
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _failed(code: int, line: str) -> int:
  """Returns the exit code; a process of several tells the others why and ends here: JAX would have it wait for them."""
  jax = sys.modules.get("jax")
  if jax is not None and jax.distributed.is_initialized():
    peers.tell(code, line)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def _parse(argv: Sequence[str], module: str = "__main__") -> list[str]:
  """Parses `argv`; on a mistake prints one line that names the nearest right thing and exits with 2.

  Where help is asked for, it is printed, the docstring of `module` first, and the exit code is 0.
  """
  if (page := help_lib.asked(argv)) is not None:
    print(help_lib.configuration(page) if page else help_lib.command(module), flush=True)
    sys.exit(0)
  argv = surroundings.at_home(argv)
  path = _config_path(argv)
  argv = [_current(argument, path) for argument in argv]
  sys.argv[1:] = argv[1:]  # where ml_collections looks for the fields
  logging.getLogger("absl").setLevel(logging.ERROR)  # ml_collections warns of what `get_config` then refuses
  try:
    if path is not None:
      _check_file(path, "--config: ")
    # Of "--config.X=build --config.X.name=NAME" the first would put the default in place of what the second did.
    built = {f"config.{field}=build" for field, _ in _named(argv) if field.startswith(("data.source", "evals."))}
    return flags.FLAGS([argument for argument in argv if argument.lstrip("-") not in built])
  except UserError as error:
    message = str(error)
  except (Exception, SystemExit) as error:
    message = _explain(argv, error)
  print(f"error: {message}", file=sys.stderr, flush=True)
  sys.exit(2)


def _current(argument: str, path: str | None) -> str:
  """Returns an argument in which a field of the configuration, of the experiment at `path`, has its name of now."""
  m = re.fullmatch(r"(--?config\.)([\w.@-]+)(.*)", argument, re.DOTALL)
  if m is None:
    return argument
  name = config_history.renamed(m[2])
  if path is not None and (key := re.match(r"evals\.(\w+)", name)) and key[1] in config_history.EVALUATIONS:
    with contextlib.suppress(UserError):  # of a broken experiment, which the parser has a line for
      name = f"evals.{config_history.named(key[1], _read_experiment(path).evals)}{name[key.end():]}"
  return f"{m[1]}{name}{m[3]}"


def _choose_sources(config: Any, argv: Sequence[str]) -> Any:
  """Returns an experiment with the sources that --config.….name=NAME says, wherever such flags stand.

  Of those that were there they keep the fields that they have too. Raises UserError if there is no source of a name.
  """
  for field, name in _named(argv):
    holder, there = _at(config, field.rpartition(".")[0]), _at(config, field)
    optional = dataclasses.is_dataclass(holder) and ranges.hints_of(type(holder)).get(field.rpartition(".")[2])
    try:
      if isinstance(there, Source) and name != there.name:
        config_path.set_value(field, config, there.of_name(name))
      elif there is None and optional == Source | None:
        config_path.set_value(field, config, Source(name))
    except UserError as error:
      raise UserError(f"--config.{field}.name: {error}") from error
  return config


def _at(config: Any, field: str) -> Any:
  """Returns what an experiment has at "data.source", None where there is nothing."""
  try:
    return config_path.get_value(field, config)
  except (AttributeError, LookupError, OSError, TypeError, ValueError):
    return None


def _named(argv: Sequence[str]) -> list[tuple[str, str]]:
  """Returns (X, NAME) of each --config.X.name=NAME, also of two arguments, in their order."""
  out = []
  for i, argument in enumerate(argv):
    if m := re.fullmatch(r"--?config\.(.+)\.name(?:=(.*))?", argument, re.DOTALL):
      out.append((m[1], m[2] if m[2] is not None else argv[i + 1] if i + 1 < len(argv) else ""))
  return out


def _config_path(argv: Sequence[str]) -> str | None:
  """Returns the file that --config names, in whichever way; None if there is none."""
  for i, argument in enumerate(argv):
    if argument == "--":
      break
    if m := re.match(r"--?config=(.*)", argument):
      return m[1].split(":")[0]
    if re.fullmatch(r"--?config", argument) and i + 1 < len(argv):
      return argv[i + 1].split(":")[0]
  return None


def _experiments(wanted: str) -> str:
  folder = "experiments"
  known = sorted(f"{folder}/{f}" for f in os.listdir(folder) if f.endswith(".py")) if os.path.isdir(folder) else []
  close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
  return (f"did you mean {close[0]!r}? " if close else "") + f"known here: {', '.join(known) or 'none'}"


def _explain(argv: Sequence[str], error: Exception) -> str:
  """Returns the line for an error out of absl or ml_collections; the latter names neither the field nor a neighbour."""
  path = _config_path(argv)
  given = [m[1] for a in argv if (m := re.match(r"--?config\.([\w.]+)", a))]
  if path is not None:
    try:
      config = _choose_sources(_read_experiment(path), argv)
      known = flatten(config)
    except UserError as broken:
      return str(broken)
    for name in given:
      if re.fullmatch(r"evals\.[^.]+\.name", name) and name in known:
        return f"--config.{name}: what an evaluation is stands in the experiment's file; this is {known[name]!r}"
      if name not in known:
        groups = {k.rsplit(".", i)[0] for k in known for i in range(1, k.count(".") + 1)}
        if name in groups:
          return _group(name, [k for k in known if k.startswith(f"{name}.")])
        group = f"{name.rpartition('.')[0]}."
        if isinstance(source := _at(config, group[:-1]), Source):
          try:
            config_lib.check_field(type(source), name.removeprefix(group))
          except UserError as wrong:
            return f"--config.{name}: {wrong}"
        near = [k for k in known if group != "." and k.startswith(group)] or list(known)
        close = difflib.get_close_matches(name, near, n=1, cutoff=0.7)
        guess = f"; did you mean --config.{close[0]}?" if close else f"; there are {_some(near)}"
        return f"--config.{name}: no such field{guess}"
  return " ".join(str(error).split())


def _group(name: str, fields: Sequence[str]) -> str:
  """Returns the line for a value that was given to a group of settings."""
  line = f"--config.{name} is a group of settings; set one of: {_some([f'--config.{field}' for field in fields])}"
  return line + ("; --config.evals.NAME.every=-1 leaves one out of training" if name == "evals" else "")


def _some(names: Sequence[str]) -> str:
  """Returns the first of many names, for a message of one line."""
  return ", ".join(names[:20]) + (f" and {len(names) - 20} more, which --help=config lists" if len(names) > 20 else "")
