#!/usr/bin/env bash
# A whole run file as a chain of jobs, each of which waits until the one before it has done its work.
#
#   slurm/chain.sh FILE [--set KEY=VALUE]... [--site SITE.yaml]
#   TRAIN="-p gpu --nodes=2 --gpus-per-node=4" PREDICT="-p gpu --gpus-per-node=1" slurm/chain.sh FILE
#
# The options are those of `galdist run`, the same for all jobs. INGEST, TRAIN, PREDICT and SPECTRA hold more sbatch
# options for one job. Where one fails, those after it are taken out of the queue; the same command again continues.
# A job that would have no step of the file to do is left out.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case ${1:-} in
  "" | -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit $(($# == 0 ? 2 : 0)) ;;
esac
galdist=${GALDIST_VENV:-$PWD/.venv}/bin/galdist
if [ ! -x "$galdist" ]; then
  echo "chain.sh: there is no $galdist: call it in the folder that holds .venv," \
    "or name the environment: GALDIST_VENV=/path/to/venv slurm/chain.sh ..." >&2
  exit 2
fi
plan=$("$galdist" run "$@" --dry-run) # what is wrong with FILE is said now, not after hours in the queue
has_steps() { awk '{print $2}' <<<"$plan" | grep -qxFf <(grep -oP -- '(?<=--stage )\S+' "$here/$1.sbatch"); }

jobs=()
undo() {
  [ ${#jobs[@]} = 0 ] || { scancel "${jobs[@]}"; echo "chain.sh: canceled what was queued already: ${jobs[*]}" >&2; }
}
trap undo ERR

for launcher in ingest train predict spectra; do
  has_steps "$launcher" || continue
  variable=${launcher^^}
  read -ra options <<<"${!variable:-}"
  if [ ${#jobs[@]} != 0 ]; then
    options=("--dependency=afterok:${jobs[-1]}" --kill-on-invalid-dep=yes "${options[@]}")
  fi
  id=$(sbatch --parsable "${options[@]}" "$here/$launcher.sbatch" "$@")
  jobs+=("${id%%;*}") # on several clusters it is ID;CLUSTER
  echo "$launcher: job ${jobs[-1]}${options[*]:+ (${options[*]})}"
done

all=$(IFS=,; echo "${jobs[*]}")
echo "state:   squeue -j $all"
echo "output:  tail -F galdist-*-{$all}.out"
echo "cancel:  scancel ${jobs[*]}"
