"""tpu_setup.sh and the health check it ends with: run for real on simulated CPU devices, with fakes for the clouds."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

from limber_jax.runtime import health

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tpu_setup.sh"


def run_health(*flags, devices=8, **env):
  env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env
  return subprocess.Popen([sys.executable, "-m", "limber_jax.health", *flags], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def verdict_of(process):
  out, err = process.communicate(timeout=120)
  assert out.count("\n") == 1, f"stdout is the verdict on one line and nothing else; got {out!r} and {err!r}"
  return process.returncode, json.loads(out)


@pytest.mark.process
@pytest.mark.smoke
def test_eight_devices_are_healthy(tmp_path):
  code, verdict = verdict_of(run_health("--expect-devices=8", "--expect-kind=cpu", f"--checkpoint-dir={tmp_path}"))
  assert (code, verdict["ok"], verdict["reasons"]) == (0, True, [])
  assert (verdict["devices"], verdict["kind"], verdict["process"], verdict["processes"]) == (8, "cpu", 0, 1)
  assert {name: check["ok"] for name, check in verdict["checks"].items()} == dict.fromkeys(
    ("start", "devices", "matmul", "psum", "checkpoint"), True)
  assert verdict["checks"]["psum"]["sum"] == 36
  assert not list(tmp_path.iterdir()), "the test checkpoint is deleted"


@pytest.mark.process
def test_wrong_count_and_kind_fail_and_the_other_checks_still_run():
  code, verdict = verdict_of(run_health("--expect-devices=8", "--expect-kind=tpu", devices=2))
  assert (code, verdict["ok"]) == (1, False)
  assert verdict["reasons"] == ["devices: expected tpu as the kind, got cpu; expected 8 devices, got 2"]
  assert verdict["checks"]["psum"]["ok"] and verdict["checks"]["checkpoint"]["ok"]


@pytest.mark.process
def test_a_directory_that_cannot_be_written_fails_the_checkpoint(tmp_path):
  (tmp_path / "file").touch()
  code, verdict = verdict_of(run_health(f"--checkpoint-dir={tmp_path / 'file'}", devices=1))
  assert code == 1
  assert [r.split(":")[0] for r in verdict["reasons"]] == ["checkpoint"]


@pytest.mark.process
def test_a_check_that_hangs_ends_with_a_verdict():
  code, verdict = verdict_of(run_health("--timeout=0.01"))
  assert (code, verdict["ok"]) == (1, False)
  assert re.fullmatch(r"(start|devices|matmul): no answer in 0.01 s", *verdict["reasons"])  # how far it came is chance


@pytest.mark.process
@pytest.mark.parametrize("shared", [True, False])
def test_two_processes_check_themselves_together(tmp_path, shared):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  flags = ["--expect-devices=4"] + [f"--checkpoint-dir={tmp_path}"] * shared
  both = [run_health(*flags, devices=2, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
          for i in range(2)]
  (code0, first), (code1, second) = map(verdict_of, both)
  assert (code0, code1, first["reasons"], second["reasons"]) == (0, 0, [], [])
  assert first["checks"]["psum"]["sum"] == second["checks"]["psum"]["sum"] == 1 + 2 + 3 + 4
  assert first["checks"]["matmul"]["checksum"] == second["checks"]["matmul"]["checksum"]
  assert ("skipped" in second["checks"]["checkpoint"]) == (not shared)
  assert not list(tmp_path.iterdir())


def test_one_device_that_multiplies_wrongly_is_named(monkeypatch):
  bad = jax.devices()[3]
  right = health._matmul
  monkeypatch.setattr(health, "_matmul", lambda a, b: right(a, b).at[7, 9].add(1) if a.device == bad else right(a, b))
  with pytest.raises(RuntimeError, match=rf"{re.escape(str(bad))} has [0-9a-f]{{8}}$"):
    health.check_matmul()


def test_a_checkpoint_that_comes_back_otherwise_is_found(monkeypatch, tmp_path):
  right = ocp.Checkpointer.restore
  monkeypatch.setattr(ocp.Checkpointer, "restore", lambda *a, **k: right(*a, **k) | {
    "int32": right(*a, **k)["int32"].at[5].add(1)})
  with pytest.raises(RuntimeError, match=r"int32: what was read from .* is not what was written"):
    health.check_checkpoint(str(tmp_path))
  assert not list(tmp_path.iterdir())


class Host:
  """A machine for tpu_setup.sh: a copy of what it reads, a home, and programs that stand before the real ones."""

  def __init__(self, path):
    self.path, self.bin, self.repo, self.venv = path, path / "bin", path / "repo", path / "venv"
    for folder in (self.bin, self.repo, path / "home", path / "root/dev", path / "root/tmp"):
      folder.mkdir(parents=True)
    for name in ("tpu_setup.sh", "pyproject.toml"):
      shutil.copy(ROOT / name, self.repo)
    self.env = {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "HOME": str(path / "home"),
                "LIMBER_SETUP_ROOT": str(path / "root")}
    for name in ("curl", "nvidia-smi", "gcloud"):
      self.program(name, "exit 1")
    self.program("python3.12", "exit 0")

  def program(self, name, body):
    """Writes a program whose calls are recorded in `calls`; its body is a line of shell."""
    file = self.bin / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/bin/sh\necho "{Path(name).name} $*" >>{self.path}/calls\n{body}\n')
    file.chmod(0o755)

  def calls(self, name):
    file = self.path / "calls"
    return [c for c in file.read_text().splitlines() if c.startswith(f"{name} ")] if file.exists() else []

  def setup(self, *flags, **env):
    command = [self.repo / "tpu_setup.sh", f"--venv={self.venv}", "--min-ram-gb=0", "--min-disk-gb=0", *flags]
    return subprocess.run(command, env=self.env | env, text=True, capture_output=True, stdin=subprocess.DEVNULL,
                          timeout=120)

  def files(self):
    return sorted(str(p) for p in self.path.rglob("*") if p.name != "calls")


@pytest.fixture
def host(tmp_path):
  return Host(tmp_path)


def metadata(accelerator):
  return f'case "$*" in */accelerator-type) echo {accelerator};; *) exit 22;; esac'


@pytest.mark.process
@pytest.mark.parametrize(("case", "target", "expected"), [
  ("cpu", ".", "--expect-kind=cpu --timeout=300 --expect-devices=1"),
  ("gpu", "'.[cuda13]'", "--expect-kind=gpu --timeout=300 --expect-devices=2"),
  ("tpu v4-16", "'.[tpu]'", "--expect-kind=tpu --timeout=300 --expect-devices=8"),
  ("tpu v5litepod-16", "'.[tpu]'", "--expect-kind=tpu --timeout=300 --expect-devices=16"),
  ("tpu gke", "'.[tpu]'", "--expect-kind=tpu --timeout=300 --expect-devices=8"),
  ("tpu by its device", "'.[tpu]'", "--expect-kind=tpu --timeout=300"),
])
def test_dry_run_finds_the_platform_prints_each_command_and_changes_nothing(host, case, target, expected):
  env = {}
  if case == "gpu":
    host.program("nvidia-smi", "echo 'GPU 0: one'; echo 'GPU 1: two'")
  elif case == "tpu gke":
    env = {"TPU_ACCELERATOR_TYPE": "v6e-8"}
  elif case == "tpu by its device":
    (host.path / "root/dev/accel0").touch()
  elif case != "cpu":
    host.program("curl", metadata(case.split()[1]))
  before = host.files()
  done = host.setup("--dry-run", **env)
  cache = f"{host.path}/home/.cache/limber_jax/xla"
  assert done.stdout.splitlines() == [
    f"+ python3.12 -m venv {host.venv}",
    f"+ {host.venv}/bin/python -m pip install -e {target}",
    f"+ mkdir -p {cache}",
    f"+ sed -i '$a export JAX_COMPILATION_CACHE_DIR=${{JAX_COMPILATION_CACHE_DIR:-{cache}}}' {host.venv}/bin/activate",
    f"+ timeout --kill-after=10 360 {host.venv}/bin/python -m limber_jax.health {expected}",
  ], done.stderr
  assert (done.returncode, host.files()) == (0, before)


@pytest.mark.process
def test_the_platform_given_counts_more_than_the_one_found(host):
  host.program("curl", metadata("v4-8"))
  assert "pip install -e .\n" in host.setup("--dry-run", "--cpu").stdout
  assert host.setup("--dry-run", "--gpu").stdout == (
    '{"ok": false, "reasons": ["setup: nvidia-smi -L lists no GPU"]}\n')


@pytest.mark.process
def test_an_old_python_is_passed_over_for_a_newer_and_else_replaced_through_uv(host):
  host.program("python3.12", "exit 127")  # as a shim of pyenv for a version that is not chosen
  host.program("python3.11", "exit 0")
  assert host.setup("--dry-run").stdout.startswith(f"+ python3.11 -m venv {host.venv}\n")
  host.program("python3.11", "exit 127")
  host.program("python3", "exit 1")
  host.program("uv", "exit 0")
  assert host.setup("--dry-run").stdout.startswith(f"+ uv venv --seed --python 3.12 {host.venv}\n")


def make_venv(host):
  """A virtual environment of this very interpreter whose pip only records that it was called."""
  host.bin = host.venv / "bin"
  host.program("python", f'case "$*" in "-m pip "*) ;; *) PYTHONPATH={ROOT} exec {sys.executable} "$@";; esac')
  (host.venv / "bin/activate").write_text("# of venv\n")


@pytest.mark.process
def test_a_second_run_installs_nothing_again_and_checks_health_again(host):
  make_venv(host)
  first, second = (host.setup("--cpu", JAX_NUM_CPU_DEVICES="2") for _ in range(2))
  for done in (first, second):
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["ok"], verdict["devices"], verdict["kind"]) == (True, 2, "cpu")
  assert len([c for c in host.calls("python") if "pip install" in c]) == 1
  assert (host.venv / "bin/activate").read_text().count("JAX_COMPILATION_CACHE_DIR:-") == 1
  (host.repo / "pyproject.toml").write_text("# other dependencies")
  host.setup("--cpu", "--skip-health")
  assert len([c for c in host.calls("python") if "pip install" in c]) == 2


@pytest.mark.process
def test_a_failed_health_check_fails_the_setup(host):
  make_venv(host)
  done = host.setup("--cpu", "--expect-devices=3", JAX_NUM_CPU_DEVICES="2")
  assert done.returncode == 1
  assert json.loads(done.stdout)["reasons"] == ["devices: expected 3 devices, got 2"]


@pytest.mark.process
@pytest.mark.parametrize(("breaks", "reason"), [
  ("-m pip", "exit code 3 from"), ("-m limber_jax.health", "the health check ended with exit code 3 and no verdict")])
def test_a_step_that_dies_ends_in_a_verdict_too(host, breaks, reason):
  make_venv(host)
  host.program("python", f'case "$*" in "{breaks}"*) exit 3;; esac')
  done = host.setup("--cpu")
  assert done.returncode == 1
  verdict = json.loads(done.stdout)
  assert verdict["ok"] is False and reason in verdict["reasons"][0]


@pytest.mark.process
@pytest.mark.parametrize("held", ["dev/accel0", "dev/vfio/0", "tmp/libtpu_lockfile"])
def test_a_tpu_in_use_is_refused_with_the_pid_and_left_alone(host, held):
  file = host.path / "root" / held
  file.parent.mkdir(exist_ok=True)
  with file.open("w") as handle, subprocess.Popen(["sleep", "60"], stdout=handle) as holder:
    handle.close()  # from here on the other process alone holds it
    while os.readlink(f"/proc/{holder.pid}/exe").endswith(Path(sys.executable).resolve().name):
      time.sleep(0.01)  # until it is `sleep`
    done = host.setup("--tpu", "--dry-run")
    alive = holder.poll() is None
    holder.terminate()
  assert (done.returncode, alive) == (1, True)
  assert json.loads(done.stdout)["reasons"] == [f"setup: the TPU is in use by PID {holder.pid}; end that first"]
  assert f"PID {holder.pid} holds {file}: sleep 60" in done.stderr


@pytest.mark.process
@pytest.mark.parametrize(("flag", "what"), [("--min-ram-gb", "memory"), ("--min-disk-gb", "disk")])
def test_too_little_memory_or_disk_is_refused(host, flag, what):
  done = host.setup("--cpu", f"{flag}=999999")
  assert done.returncode == 1
  assert re.search(rf"\d+ GB of {what} are free.*, wanted 999999 \({flag}\)", json.loads(done.stdout)["reasons"][0])
  assert not host.venv.exists()


@pytest.mark.process
def test_every_worker_is_set_up_first_and_then_all_are_checked_at_once(host):
  good = '{"ok": true, "reasons": [], "process": 0, "processes": 2}'
  git = ["git", "-C", host.repo, "-c", "user.name=x", "-c", "user.email=x@example.org"]
  for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
    subprocess.run(git + command, check=True)
  flags = ("--all-workers", "--name=pod", "--zone=us-central2-b", "--checkpoint-dir=/mnt/shared")
  host.program("gcloud", f"case \"$*\" in *skip-health*) ;; *ssh*) echo '{good}'; echo '{good}';; esac")

  assert host.setup("--dry-run", *flags).returncode == 0
  assert host.calls("gcloud") == []

  done = host.setup(*flags)
  where = "--worker=all --quiet --zone=us-central2-b"
  passed = f"--venv={host.venv} --min-ram-gb=0 --min-disk-gb=0 --checkpoint-dir=/mnt/shared"
  assert host.calls("gcloud") == [f"gcloud compute tpus tpu-vm {call}" for call in (
    f"scp build/limber_jax.tar.gz pod:limber_jax.tar.gz {where}",
    f"ssh pod {where} --command=mkdir -p limber_jax && tar -xzf limber_jax.tar.gz -C limber_jax && "
    f"cd limber_jax && ./tpu_setup.sh --tpu {passed} --skip-health",
    f"ssh pod {where} --command=cd limber_jax && ./tpu_setup.sh --tpu {passed}")]
  assert (done.returncode, done.stdout.splitlines()) == (0, [good, good, '{"ok": true, "workers": 2}']), done.stderr

  host.program("gcloud", f"case \"$*\" in *skip-health*) ;; *ssh*) echo '{good}';; esac")  # one worker never answers
  done = host.setup(*flags)
  assert done.returncode == 1
  assert json.loads(done.stdout.splitlines()[-1])["reasons"] == ["setup: 1 of 2 workers are healthy"]


@pytest.mark.process
@pytest.mark.parametrize(("flags", "message"), [
  (["--dryrun"], "no flag --dryrun; did you mean --dry-run?"),
  (["--workers"], "no flag --workers; did you mean --all-workers?"),
  (["--tiemout", "3"], "no flag --tiemout; did you mean --timeout?"),
  (["--timeout=soon"], "--timeout: wanted a whole number, got 'soon'"),
  (["--zone"], "--zone needs a value"),
  (["--zone=x"], "--name, --zone and --project go with --all-workers"),
  (["--all-workers"], "--all-workers needs --name NAME, the slice's"),
  (["--all-workers", "--name=x", "--gpu"], "--all-workers is for a TPU slice, not for --gpu"),
  (["pod"], "no argument 'pod' is wanted; see --help"),
])
def test_a_wrong_flag_is_one_line_that_names_the_right_one(host, flags, message):
  done = host.setup(*flags)
  assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


@pytest.mark.process
def test_help_names_every_flag(host):
  done = host.setup("--help")
  known = re.search(r"known=\((.*?)\)", SCRIPT.read_text(), re.DOTALL)[1].split()
  assert done.returncode == 0
  assert [flag for flag in known if flag not in done.stdout] == []


def test_no_root_and_no_script_out_of_the_network():
  code = re.sub(r"(^|\s)#.*", "", SCRIPT.read_text())
  assert not re.search(r"\bsudo\b|\b(curl|wget)\b[^\n]*\|\s*(ba|z)?sh\b|\bkill\b(?!-)", code)


@pytest.mark.process
@pytest.mark.parametrize("script", ["tpu_setup.sh", ".ci/run"])
def test_shellcheck_finds_nothing(script):
  path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the extra `test` brings the program
  done = subprocess.run([shutil.which("shellcheck", path=path), ROOT / script], text=True, capture_output=True)
  assert done.returncode == 0, done.stdout
