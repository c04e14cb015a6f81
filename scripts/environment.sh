#!/usr/bin/env bash
# Makes .venv in the root of the repository if needed, brings it up to date and activates it. The other scripts source
# this file: it sets `root` and strict mode, and exits on errors. To run it by hand: bash scripts/environment.sh
#
# .venv has peer_jax (editable) and the packages that requirements.txt and the extra "dev" of pyproject.toml ask for, in
# the versions of constraints/python3.x.txt, with which the tests last passed.
#   PEER_JAX_NEWEST=1               installs the newest versions that requirements.txt and pyproject.toml allow instead
#   PEER_JAX_PYTHON=/path/to/python picks the Python; without it, the newest of 3.13, 3.12 and 3.11 that runs is taken
set -euo pipefail

# PYTHONDONTWRITEBYTECODE is unset because JAX and Flax import in 2.5 s with cached bytecode and in 6.5 s without.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp_file=$venv/peer_jax.stamp # "unfinished", "failed", or what `stamp` printed when the installation ended
wanted=         # "version executable" of PEER_JAX_PYTHON
wanted_version= # "version " with the space, so that 3.12.1 is not taken for 3.12.10
newest=${PEER_JAX_NEWEST:-}
[ "$newest" != 0 ] || newest=

say() { printf '%s\n' "$*" >&2; }

fail() { # status, sentence
  say "$2"
  exit "$1"
}

# Prints "version executable" if that Python can run this project. The executable of a venv's Python is the one that the
# venv was made from. Fails for a Python that lacks one of these modules and for a pyenv shim with nothing behind it.
probe() { # python, then "ensurepip" if it must be able to make a venv
  # shellcheck disable=SC2016
  "$1" -I -c '
import sys, sysconfig
import bz2, ctypes, lzma, ssl, zlib
if "ensurepip" in sys.argv:
    import ensurepip
assert sys.implementation.name == "cpython" and (3, 11) <= sys.version_info[:2] <= (3, 13)
assert not sysconfig.get_config_var("Py_GIL_DISABLED")
print("%d.%d.%d" % sys.version_info[:3], sys._base_executable)
' "${2:-}" 2>/dev/null </dev/null
}

candidates() { # 3.x; only interpreters that are already installed
  local name
  for name in "python$1" python3 python; do type -aP "$name" || true; done
  printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python
  printf '%s\n' "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}/cpython-$1".*/bin/python3
  printf '%s\n' "$venv/bin/python"
}

find_python() { # Prints "version executable"
  local version candidate found
  for version in 3.13 3.12 3.11; do
    while IFS= read -r candidate; do
      if ! { [ -x "$candidate" ] && found=$(probe "$candidate" "$1"); }; then continue; fi
      case $found in "$version".*) printf '%s\n' "$found" && return ;; esac
    done < <(candidates "$version")
  done
  return 1
}

constraints() { # Prints the path of the constraints file for .venv, relative to the root; nothing for the newest versions
  [ -n "$newest" ] ||
    "$venv/bin/python" -IS -c 'import sys; print("constraints/python%d.%d.txt" % sys.version_info[:2])' 2>/dev/null
}

stamp() { # Prints what .venv should contain, and where it is, because a venv does not survive being moved
  # shellcheck disable=SC2046
  "$venv/bin/python" -IS -c '
import hashlib, pathlib, sys
root, *constraints = map(pathlib.Path, sys.argv[1:])
contents = b"".join((root / name).read_bytes() for name in ("requirements.txt", "pyproject.toml", *constraints))
print("%d.%d.%d" % sys.version_info[:3], hashlib.sha256(contents).hexdigest(), root)
' "$root" $(constraints) 2>/dev/null
}

is_ready() {
  local recorded
  [ -f "$stamp_file" ] && recorded=$(cat "$stamp_file") && [ "$recorded" = "$(stamp)" ] &&
    case $recorded in "$wanted_version"*) ;; *) false ;; esac
}

why_remake() { # Prints why the .venv that is there cannot be kept; fails if it can
  local found recorded
  recorded=$(cat "$stamp_file" 2>/dev/null || true)
  if ! found=$(probe "$venv/bin/python"); then
    echo 'its Python does not run or is not 3.11, 3.12 or 3.13'
  elif [ "$recorded" = unfinished ]; then
    echo 'its installation was interrupted'
  elif case $recorded in '' | failed | *" $root") false ;; esac then
    echo 'it was made in another folder'
  elif case $found in "$wanted_version"*) false ;; esac then
    echo "it has Python ${found%% *}"
  else
    return 1
  fi
}

# The lock belongs to the open file, so it outlives this Python and ends with the shell that opened descriptor 9.
lock() { # python
  "$1" -IS -c '
import fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Waiting for another process that is making .venv ...", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:
    print(f"Not locking .venv ({error}): do not run two of these scripts at once.", file=sys.stderr)
'
}

find_uv() { # Prints the command of the uv in .venv, which pip installs there if need be, or of the uv on PATH
  local pip=("$venv/bin/python" -I -m pip --disable-pip-version-check) candidate
  "$venv/bin/uv" --version >/dev/null 2>&1 || "${pip[@]}" install --quiet uv >/dev/null 2>&1 || true
  for candidate in "$venv/bin/uv" uv; do
    "$candidate" --version >/dev/null 2>&1 && printf '%s\n' "$candidate" && return
  done
  return 1
}

install() { # constraints file or nothing
  local uv versions=(--upgrade)
  [ -z "$1" ] || versions=(--constraint "$1" --build-constraint "$1")
  if uv=$(find_uv); then
    "$uv" pip install --python "$venv/bin/python" "${versions[@]}" --editable '.[dev]' && return
    say 'uv could not install them: trying pip.'
  fi
  # The variables constrain what packages are built with as well, which pip before 25.3 has no option for.
  versions=(--upgrade --upgrade-strategy eager)
  [ -z "$1" ] || versions=()
  PIP_CONSTRAINT=$1 PIP_BUILD_CONSTRAINT=$1 "$venv/bin/python" -I -m pip install "${versions[@]}" --editable '.[dev]'
}

if [ -n "${PEER_JAX_PYTHON:-}" ]; then
  wanted=$(probe "$PEER_JAX_PYTHON") ||
    fail 2 "PEER_JAX_PYTHON=$PEER_JAX_PYTHON does not run or is not a complete CPython 3.11, 3.12 or 3.13: name another, or unset it."
  wanted_version="${wanted%% *} "
fi

if ! is_ready; then
  (
    cd "$root"
    trap 'exit 130' INT
    trap 'exit 143' TERM
    venv_module=ensurepip
    ! uv --version >/dev/null 2>&1 || venv_module= # uv can make a venv without it
    python=${wanted:-$(find_python "$venv_module")} ||
      fail 2 'No Python 3.11, 3.12 or 3.13 with its venv module was found: install one (on Debian or Ubuntu, python3 and python3-venv), or name it in PEER_JAX_PYTHON.'
    python=${python#* }
    [ -z "$venv_module" ] || probe "$python" "$venv_module" >/dev/null ||
      fail 2 "$python has no venv module: install it (on Debian or Ubuntu, python3-venv), or name another Python in PEER_JAX_PYTHON."

    exec 9<requirements.txt
    lock "$python"
    ! is_ready || exit 0 # another process has just made it

    made=
    if [ -e "$venv" ] || [ -L "$venv" ]; then
      if reason=$(why_remake); then
        say "Remaking .venv: $reason."
        rm -rf "$venv"
      fi
    fi
    if [ ! -e "$venv" ]; then
      made=yes
      say "Making .venv with $python"
      mkdir "$venv"
      echo unfinished >"$stamp_file"
      if probe "$python" ensurepip >/dev/null; then
        "$python" -I -m venv "$venv"
      else
        uv venv --quiet --allow-existing --python "$python" "$venv"
      fi
    fi

    pins=$(constraints)
    say "Installing peer_jax and its packages into .venv, ${pins:+in the versions of }${pins:-the newest versions} (4 GB, mostly JAX, libtpu and TensorFlow) ..."
    echo unfinished >"$stamp_file"
    if ! install "$pins"; then
      [ -n "$made" ] || echo failed >"$stamp_file" # what was there before still works
      say 'The installation failed, see above: is there a network connection, and 5 GB of free disk?'
      [ -z "$pins" ] || say "If a version of $pins does not exist for this machine, PEER_JAX_NEWEST=1 installs others."
      exit 1
    fi
    stamp >"$stamp_file"
    say ".venv is ready."
  )
fi

export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
hash -r
