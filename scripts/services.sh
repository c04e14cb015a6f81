#!/usr/bin/env bash
# Installs what some tests use beside Python packages: Slurm, munge and Chromium, of Debian or Ubuntu. Tests
# that lack one of them are skipped and say so. Always exits with 0, and says what could not be installed, and why.
#
# Usage, as root: bash scripts/services.sh
set -u

say() { printf 'services.sh: %s\n' "$*" >&2; }

missing=()
for pair in slurmctld:slurm-wlm munged:munge chromium:chromium; do
  PATH=$PATH:/usr/sbin type "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair#*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! type apt-get >/dev/null 2>&1; then
  say "${missing[*]} not installed: there is no apt-get here"
elif [ "$(id -u)" != 0 ]; then
  say "${missing[*]} not installed: that takes root"
else
  # Packages are installed without starting their services: the tests start their own.
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  limit() { timeout --kill-after=10 "$@" >/dev/null 2>&1 </dev/null; } # seconds, then a command
  limit 60 apt-get update || say 'apt-get update failed: going on with the lists that are there'
  for package in "${missing[@]}"; do
    limit 180 apt-get install --yes --no-install-recommends "$package" || say "$package could not be installed by apt-get"
  done
fi
exit 0
