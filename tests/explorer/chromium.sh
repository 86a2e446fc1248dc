#!/usr/bin/env bash
# Debian's Chromium, by apt-get, where it is missing and this is root. 0: it is there; 3: it is not and cannot be had.
set -euo pipefail
if command -v chromium >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "Chromium is not installed, and installing it needs root and apt-get (package chromium)" >&2
  exit 3
fi
echo "installing chromium"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>"$log" || { cat "$log" >&2; exit 3; }
