#!/bin/bash
# Stands in for Python in the jobs of the requeue tests: fake_program.sh -m ctx_distill STAGE ... --run RUN ...
# $FAKE/STAGE is run, once a task, with the number of the attempt and the run folder; no such file: done.
stage=$3
while [ $# -gt 0 ]; do [ "$1" = --run ] && run=$2; shift; done
attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
echo "$attempt" >>"$FAKE/attempts-$stage-${SLURM_ARRAY_TASK_ID:-}$SLURM_PROCID"
[ -e "$FAKE/$stage" ] || exit 0
exec bash "$FAKE/$stage" "$attempt" "$run"
