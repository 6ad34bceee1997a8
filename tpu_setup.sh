#!/usr/bin/env bash
# Sets up this machine, or every worker of a TPU slice, for limber_jax, and proves that it works. See --help.
set -Eeuo pipefail

usage() {
  cat <<'END'
Usage: ./tpu_setup.sh [flags]

Sets up this machine (a TPU VM, a GPU host or a CPU host: found out, or told) or every worker of a TPU slice:
a virtual environment, the package with the right JAX, a compilation cache, and a health check at the end.
What is already done is not done again. Needs Linux and no root; changes nothing outside the environment and the cache.

  --tpu | --gpu | --cpu    what to set up for; without it: TPU if there is one, else GPU, else CPU
  --venv DIR               the virtual environment (default: .venv beside this script)
  --expect-devices N       devices the health check must find (default: counted; give it for several slices at once)
  --checkpoint-dir DIR     where the health check writes; several workers: a directory that all of them see
  --timeout S              seconds that the health check may take (default: 300)
  --min-disk-gb N          free disk without which nothing is installed (default: 10)
  --min-ram-gb N           free memory without which nothing is done (default: 4)
  --skip-health            install only
  --dry-run                print each command that would run, and change nothing
  --help                   this text

  --all-workers            copy the commit checked out here to every worker of a slice by gcloud, set them all up,
                           then check them all at once; with
  --name NAME              the slice's name
  --zone ZONE, --project P where it is (default: gcloud's own)

Environment: JAX_COMPILATION_CACHE_DIR (default: ~/.cache/limber_jax/xla).
Stdout: the verdict, {"ok": true, …} on one line (with --all-workers one from each worker, then one for all); with
--dry-run the commands. Exit code: 0 healthy, 1 not, 2 a wrong flag.
END
}

log() { echo "tpu_setup: $*" >&2; }

fail() {  # ends with a verdict that gives the reason $1
  trap - ERR
  log "$1"
  local reason=${1//\\/\\\\}
  printf '{"ok": false, "reasons": ["setup: %s"]}\n' "${reason//\"/\\\"}"
  exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND: exit code $?"' ERR

wrong_usage() {
  echo "error: $1" >&2
  exit 2
}

quote() {  # the words $@ as one would type them
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

run() {  # runs a command, or only prints it; its output goes to stderr, because stdout is the verdict's
  if $dry_run; then
    echo "+ $(quote "$@")"
  else
    log "$(quote "$@")"
    "$@" >&2 || fail "exit code $? from $(quote "$@")"
  fi
}

nearest() {  # the flag that shares the longest start and end with $1
  local flag best='' most=0 i j
  for flag in "${known[@]}"; do
    for ((i = 0; i < ${#1} && i < ${#flag}; i++)); do [[ ${1:i:1} == "${flag:i:1}" ]] || break; done
    for ((j = 1; j <= ${#1} - i && j <= ${#flag} - i; j++)); do [[ ${1: -j:1} == "${flag: -j:1}" ]] || break; done
    ((i + j <= most)) || { most=$((i + j)) best=$flag; }
  done
  echo "$best"
}

metadata() {  # an attribute of this machine from Google's metadata server; nothing elsewhere
  curl -fs --max-time 2 -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" || true
}

detect() {  # sets platform, and expect_devices where it can be known
  local accelerator='' gpus=''
  if [[ -z $platform || $platform == tpu ]]; then
    accelerator=${TPU_ACCELERATOR_TYPE:-$(metadata accelerator-type)}  # GKE sets the variable, TPU VMs the attribute
  fi
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || gpus=0
  if [[ -z $platform ]]; then
    if [[ $accelerator =~ ^(v[0-9]|tpu) ]] || compgen -G "$root/dev/accel[0-9]*" >/dev/null; then
      platform=tpu
    elif ((gpus)); then
      platform=gpu
    else
      platform=cpu
    fi
  fi
  [[ -z $expect_devices ]] || return 0
  case $platform:$accelerator in
    cpu:*) expect_devices=${JAX_NUM_CPU_DEVICES:-1} ;;
    gpu:*)
      ((gpus)) || fail "nvidia-smi -L lists no GPU"
      expect_devices=$gpus ;;
    # The number in a type counts cores. Two of them are one device on v4 and v5p; v5e and v6e have one a chip.
    tpu:v4-* | tpu:v5p-*) expect_devices=$((${accelerator##*-} / 2)) ;;
    tpu:v[23]-* | tpu:v5litepod-* | tpu:v6e-*) expect_devices=${accelerator##*-} ;;
  esac
}

check_machine() {
  local ram holders pid what
  ram=$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
  ((ram >= min_ram_gb)) || fail "$ram GB of memory are free, wanted $min_ram_gb (--min-ram-gb)"
  ulimit -n "$(ulimit -Hn)" 2>/dev/null || true  # readers and checkpoints hold many files open
  [[ $(ulimit -n) == unlimited ]] || (($(ulimit -n) >= 4096)) ||
    fail "only $(ulimit -n) files may be open at once, wanted 4096: raise nofile in /etc/security/limits.conf"
  [[ $platform == tpu ]] || return 0
  # Only one process can use a TPU. Those of other users are visible to root alone; then libtpu itself refuses, below.
  holders=$({ find /proc/[0-9]*/fd -maxdepth 1 \( -lname "$root/dev/accel[0-9]*" -o -lname "$root/dev/vfio/[0-9]*" \
    -o -lname "$root/tmp/libtpu_lockfile" \) -printf '%h %l\n' 2>/dev/null || true; } |
    sed -E 's,^/proc/([0-9]+)/fd,\1,' | sort -u)
  [[ -n $holders ]] || return 0
  while read -r pid what; do
    log "PID $pid holds $what: $(tr '\0' ' ' <"/proc/$pid/cmdline")"
  done <<<"$holders"
  fail "the TPU is in use by PID $(cut -d ' ' -f 1 <<<"$holders" | sort -nu | paste -sd ' '); end that first"
}

fits() { "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_venv() {
  local python
  if [[ -x $venv/bin/python ]]; then
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "$venv has $("$venv/bin/python" --version), wanted 3.11 or newer: remove it, or choose another --venv"
    return 0
  fi
  for python in python3.12 python3.11 python3; do
    if fits "$python"; then
      run "$python" -m venv "$venv"
      return 0
    fi
  done
  # Ubuntu 22.04, which most TPU images are, has Python 3.10: uv, a package of the user's own, brings a newer one.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || run python3 -m pip install --user uv
  run uv venv --seed --python 3.12 "$venv"
}

install_package() {
  local target=. stamp free disk=$venv
  case $platform in
    tpu) target='.[tpu]' ;;
    gpu) target='.[cuda13]' ;;
  esac
  stamp="$PWD $target $(sha256sum <pyproject.toml)"
  if [[ $stamp == "$(cat "$venv/limber_setup" 2>/dev/null)" ]]; then
    log "$target is installed in $venv already"
    return 0
  fi
  while [[ ! -d $disk ]]; do disk=$(dirname "$disk"); done
  free=$(df --output=avail -BG "$disk" | tr -dc '0-9\n' | tail -n 1)
  ((free >= min_disk_gb)) || fail "$free GB of disk are free at $disk, wanted $min_disk_gb (--min-disk-gb)"
  make_venv
  run "$venv/bin/python" -m pip install -e "$target"
  $dry_run || echo "$stamp" >"$venv/limber_setup"
}

set_environment() {  # for this script's health check, and for whoever activates the environment later
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/limber_jax/xla}
  [[ -d $JAX_COMPILATION_CACHE_DIR ]] || run mkdir -p "$JAX_COMPILATION_CACHE_DIR"
  grep -qs JAX_COMPILATION_CACHE_DIR "$venv/bin/activate" ||
    run sed -i "\$a export JAX_COMPILATION_CACHE_DIR=\${JAX_COMPILATION_CACHE_DIR:-$JAX_COMPILATION_CACHE_DIR}" \
      "$venv/bin/activate"
}

check_health() {
  local verdict status=0
  # The check ends itself in time; `timeout` is for a runtime so stuck that it cannot.
  local command=(timeout --kill-after=10 $((timeout + 60)) "$venv/bin/python" -m limber_jax.health
    --expect-kind="$platform" --timeout="$timeout")
  [[ -z $expect_devices ]] || command+=(--expect-devices="$expect_devices")
  [[ -z $checkpoint_dir ]] || command+=(--checkpoint-dir="$checkpoint_dir")
  if $dry_run; then
    run "${command[@]}"
    return 0
  fi
  log "$(quote "${command[@]}")"
  verdict=$("${command[@]}") || status=$?
  [[ $verdict == '{"ok"'* ]] || fail "the health check ended with exit code $status and no verdict"
  echo "$verdict"
  exit "$status"
}

setup_slice() {
  local verdicts workers healthy remote where=(--worker=all --quiet)
  [[ -z $zone ]] || where+=(--zone="$zone")
  [[ -z $project ]] || where+=(--project="$project")
  remote="cd limber_jax && ./tpu_setup.sh --tpu $(quote "${pass[@]}")"
  command -v gcloud >/dev/null || fail "gcloud is not on PATH"
  [[ -z $(git status --porcelain) ]] || log "changes that are not committed stay here"
  run mkdir -p build
  run git archive --format=tar.gz --output=build/limber_jax.tar.gz HEAD
  run gcloud compute tpus tpu-vm scp build/limber_jax.tar.gz "$name:limber_jax.tar.gz" "${where[@]}"
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" \
    --command="mkdir -p limber_jax && tar -xzf limber_jax.tar.gz -C limber_jax && $remote --skip-health"
  ! $skip_health || return 0
  # A second round, because a slice starts only when all its workers do, and installing takes them unequally long.
  local check=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command="$remote")
  if $dry_run; then
    run "${check[@]}"
    return 0
  fi
  log "$(quote "${check[@]}")"
  verdicts=$("${check[@]}") || true  # what counts is the verdicts
  echo "$verdicts"
  workers=$(sed -nE 's/^\{"ok".* "processes": ([0-9]+).*/\1/p' <<<"$verdicts" | sort -n | tail -n 1)
  healthy=$(grep -c '^{"ok": true' <<<"$verdicts") || true
  ((healthy == ${workers:-1})) || fail "$healthy of ${workers:-1} workers are healthy"
  echo "{\"ok\": true, \"workers\": $workers}"
}

readonly known=(--all-workers --checkpoint-dir --cpu --dry-run --expect-devices --gpu --help --min-disk-gb --min-ram-gb
  --name --project --skip-health --timeout --tpu --venv --zone)
readonly root=${LIMBER_SETUP_ROOT:-}  # a directory that stands for / where TPUs are looked for: the tests' only
platform='' venv='' expect_devices='' checkpoint_dir='' timeout=300 min_disk_gb=10 min_ram_gb=4
all_workers=false name='' zone='' project='' dry_run=false skip_health=false
pass=()  # the flags that the workers of a slice get too

while (($#)); do
  case $1 in
    --help) usage; exit ;;
    --all-workers) all_workers=true ;;
    --cpu | --gpu | --tpu) platform=${1#--} ;;
    --dry-run) dry_run=true ;;
    --skip-health) skip_health=true ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --venv | --checkpoint-dir | --expect-devices | --timeout | --min-disk-gb | --min-ram-gb | \
      --name | --zone | --project)
      [[ -n ${2:-} ]] || wrong_usage "$1 needs a value"
      case $1 in
        --expect-devices | --timeout | --min-*)
          [[ $2 =~ ^[0-9]+$ ]] || wrong_usage "$1: wanted a whole number, got '$2'" ;;
      esac
      case $1 in
        --name | --zone | --project) ;;
        *) pass+=("$1=$2") ;;
      esac
      variable=${1#--}
      printf -v "${variable//-/_}" %s "$2"
      shift ;;
    --*) wrong_usage "no flag $1; did you mean $(nearest "$1")?" ;;
    *) wrong_usage "no argument '$1' is wanted; see --help" ;;
  esac
  shift
done
if $all_workers; then
  [[ -n $name ]] || wrong_usage "--all-workers needs --name NAME, the slice's"
  [[ -z $platform || $platform == tpu ]] || wrong_usage "--all-workers is for a TPU slice, not for --$platform"
elif [[ -n $name$zone$project ]]; then
  wrong_usage "--name, --zone and --project go with --all-workers"
fi

[[ -z $venv ]] || venv=$(realpath -m -- "$venv")
cd "$(dirname "${BASH_SOURCE[0]}")"
: "${venv:=$PWD/.venv}"
if $all_workers; then
  setup_slice
  exit
fi
detect
log "setting up for $platform, ${expect_devices:-any number of} device(s), in $venv"
check_machine
install_package
set_environment
$skip_health || check_health
