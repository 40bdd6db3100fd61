# What up, down and status share: where the development Slurm lives, and which processes are its own.
# shellcheck shell=bash
set -euo pipefail
umask 022

# All state; nothing is written elsewhere, but the one line of up's name_on_loopback.
DIR=$(realpath --canonicalize-missing "${GALDIST_DEV_SLURM:-${TMPDIR:-/tmp}/galdist-slurm-$UID}")
HOSTS_MARK="# galdist dev slurm $DIR"  # ends the line of ours in /etc/hosts, where one is needed
NODES=(n1 n2 n3 n4)
DAEMONS=(munged mariadbd slurmdbd slurmctld "${NODES[@]/#/slurmd.}")  # in the order in which they start

export SLURM_CONF=$DIR/slurm.conf  # the daemons inherit it, so it also marks a process as ours
export PATH=$PATH:/usr/sbin:/sbin
unset SLURM_CLUSTERS SLURM_JOB_ID SLURM_JOBID

say() { echo "dev slurm: $*" >&2; }
die() { say "$@"; exit 1; }

# one_at_a_time: wait for another up or down on this folder. Daemons close descriptor 9, or they would hold it.
one_at_a_time() { exec 9>"$DIR/lock"; flock -w 120 9 || die "another up or down holds $DIR/lock for two minutes"; }

# has_env PID GREP-ARGUMENTS: a line VARIABLE=VALUE of its environment matches
has_env() { grep -zq "${@:2}" "/proc/$1/environ"; } 2>/dev/null
# alive PID: runs (a zombie does not; nobody may reap it in a container) and is ours (a pid may be recycled)
alive() {
  local stat
  [ -n "$1" ] && { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  [[ ${stat##*) } != Z* ]] && has_env "$1" -xF "SLURM_CONF=$SLURM_CONF"
}
pid_of() { cat "$DIR/run/$1.pid" 2>/dev/null || true; }
is_up() { alive "$(pid_of "$1")"; }
