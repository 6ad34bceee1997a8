"""What commands do about where they are started: another encoding, no such device, little memory, a ~ left behind."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from limber_jax.errors import UserError
from limber_jax.runtime import surroundings

ROOT = Path(__file__).parent.parent


def started(*command, **env):
  env = os.environ | {"PYTHONPATH": str(ROOT)} | env
  return subprocess.run([sys.executable, *command], capture_output=True, env=env)


ECHO = """
import os
from absl import flags
from limber_jax import cli
label = flags.DEFINE_string("label", "", "")
def main(argv):
  with open(argv[0]) as file:
    print(ascii([label.value, argv[0], file.read(), os.environ["PYTHONUTF8"]]))
cli.run(main)
"""


@pytest.mark.process
def test_flags_names_and_files_are_utf8_whatever_the_locale(tmp_path):
  echo, name = tmp_path / "echo.py", tmp_path / "é.txt"
  echo.write_text(ECHO)
  name.write_text("ü")
  said = started(echo, "--label=ñ", name, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
  assert said.stdout.decode().strip() == ascii(["ñ", str(name), "ü", "1"]), said.stderr.decode()


def test_a_home_is_found_behind_an_equals_sign_and_never_in_a_text(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  assert surroundings.at_home([
    "~/x", "--workdir=~/a", "-out=~", "--init=lm=~/gptj", "--init=lm=a=~", "--config.init.lm=~/b", "~/c", "--weights",
    "./~", "--prompt=~/x", "--labels=~,a", "--flag", "a~"]) == [
    "~/x", "--workdir=/home/me/a", "-out=/home/me", "--init=lm=/home/me/gptj", "--init=lm=a=~",
    "--config.init.lm=/home/me/b", "/home/me/c", "--weights", "./~", "--prompt=~/x", "--labels=~,a", "--flag", "a~"]


def test_a_limit_on_address_space_is_reported_at_the_start(monkeypatch):
  for limit in (resource.RLIM_INFINITY, surroundings.NEEDED):
    monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
    surroundings.check_memory()
  monkeypatch.setattr(resource, "getrlimit", lambda _: (1_800_000_000, -1))
  with pytest.raises(UserError, match=r"^the address space of this process is limited to 1\.8 GB .* are needed"):
    surroundings.check_memory()


PLATFORMS = """
import sys
import jax
from jax.extend import backend
from limber_jax.runtime.surroundings import no_device
for name in sys.argv[1:]:
  jax.config.update("jax_platforms", name)
  backend.clear_backends()
  try:
    jax.devices()
    print("")
  except Exception as error:
    print(no_device(error))
assert no_device(ValueError("another")) == ""
"""


@pytest.mark.process
def test_a_platform_that_is_not_there_is_one_line_and_another_error_is_none():
  done = started("-c", PLATFORMS, "foo", "cuda")
  foo, cuda = done.stdout.decode().splitlines()
  assert foo.startswith("JAX_PLATFORMS=foo: JAX cannot start on that here (Unable to initialize backend 'foo'")
  assert "; there is " in foo and foo.endswith("cpu, or unset it to have JAX choose")
  assert not cuda or cuda.startswith("JAX_PLATFORMS=cuda: JAX cannot start on that here ("), done.stderr.decode()


@pytest.mark.process
def test_a_command_ends_with_that_line_and_code_2(tmp_path):
  done = started("-m", "limber_jax.train", f"--config={ROOT}/experiments/quickstart.py", f"--workdir={tmp_path}/run",
                 JAX_PLATFORMS="foo")
  assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1
  assert done.stderr.startswith(b"error: JAX_PLATFORMS=foo: ") and os.listdir(tmp_path) == []
