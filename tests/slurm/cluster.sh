#!/usr/bin/env bash
# A real SLURM cluster of two nodes on this host, without systemd: munged, slurmctld and two slurmd, for the tests.
#   cluster.sh install         the packages, by apt-get, where it is missing and this is root
#   cluster.sh up FOLDER       start; all state, keys and logs lie in FOLDER. SLURM_CONF=FOLDER/slurm.conf
#   cluster.sh status FOLDER
#   cluster.sh down FOLDER     cancel its jobs, end its own daemons and whatever they started, remove FOLDER
# Several clusters can stand side by side: ports are free ones, job numbers start at a place of their own (Lightning makes
# its port of a job's number), and nothing but processes of this FOLDER is ended.
set -euo pipefail
NODES=2
CPUS=8 # a node, whatever the host has: the tests' ranks may share cores

install() {
  if command -v slurmctld slurmd munged sbatch >/dev/null; then return; fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "SLURM is not installed, and installing it needs root and apt-get (packages slurm-wlm, slurm-client, munge)" >&2
    return 3
  fi
  echo "installing slurm-wlm and munge"
  export DEBIAN_FRONTEND=noninteractive
  # Some host's policy may start services after an install; the tests need none of the system's own.
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm slurm-client munge; } >/dev/null 2>"${TMPDIR:-/tmp}/apt.$$" ||
    { cat "${TMPDIR:-/tmp}/apt.$$" >&2; rm -f "${TMPDIR:-/tmp}/apt.$$"; return 3; }
  rm -f "${TMPDIR:-/tmp}/apt.$$"
}

free_ports() { # free_ports N: numbers outside of Lightning's 15000 to 24999 and of the kernel's own choice
  python3 - "$1" <<'P'
import random, socket, sys
found, held = [], []
while len(found) < int(sys.argv[1]):
    port = random.randrange(25000, 32000)
    one = socket.socket()
    try:
        one.bind(("127.0.0.1", port))
    except OSError:
        continue
    held.append(one)
    if port not in found:
        found.append(port)
print(*found)
P
}

own_processes() { # pids of the daemons, by their files; of the job steps' keepers, which work in FOLDER; of the jobs
  local file pid
  for file in "$1"/pid/*.pid; do
    pid=$(cat "$file" 2>/dev/null) || continue
    if tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$1"; then echo "$pid"; fi
  done
  find /proc -maxdepth 2 -name cwd -lname "$1/log*" 2>/dev/null | cut -d/ -f3 || true
  for file in $(grep -lzsxF "SLURM_CONF=$1/slurm.conf" /proc/[0-9]*/environ); do
    if grep -zqs '^SLURM_JOB_ID=' "$file"; then cut -d/ -f3 <<<"$file"; fi
  done
}

up() {
  local folder=$1 host first ports node i
  host=$(hostname -s)
  mkdir -p "$folder"/{state,log,pid,munge}
  chmod 755 "$folder"
  for i in $(seq $NODES); do
    mkdir -p "$folder/spool/n$i"
    grep -qw "n$i" /etc/hosts || echo "127.0.0.1 n$i" >>/etc/hosts
  done
  head -c 1024 /dev/urandom >"$folder/munge/munge.key"
  chmod 600 "$folder/munge/munge.key"
  read -ra ports <<<"$(free_ports $((NODES + 1)))"
  first=$((RANDOM % 9000 + 100))
  cat >"$folder/slurm.conf" <<C
ClusterName=ctxdistill
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/munge.sock,cred_expire=5
FirstJobId=$first
SlurmctldPort=${ports[0]}
SlurmctldPidFile=$folder/pid/slurmctld.pid
SlurmdPidFile=$folder/pid/slurmd.%n.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3600
SlurmdTimeout=60
SlurmctldTimeout=60
C
  for i in $(seq $NODES); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$i]} CPUs=$CPUS RealMemory=2000 State=UNKNOWN"
  done >>"$folder/slurm.conf"
  echo "PartitionName=debug Nodes=n[1-$NODES] Default=YES MaxTime=60 State=UP" >>"$folder/slurm.conf"
  export SLURM_CONF=$folder/slurm.conf
  munged --force --key-file="$folder/munge/munge.key" --socket="$folder/munge/munge.sock" \
    --pid-file="$folder/pid/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/munge/munge.seed"
  slurmctld -i -f "$folder/slurm.conf"
  for i in $(seq $NODES); do slurmd -f "$folder/slurm.conf" -N "n$i"; done
  for _ in $(seq 120); do
    if [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = $NODES ]; then return; fi
    sleep 0.25
  done
  echo "the nodes did not come up:" >&2
  sinfo -N -l >&2 || true
  tail -n 20 "$folder"/log/*.log >&2
  return 1
}

down() {
  local folder=$1 pids
  export SLURM_CONF=$folder/slurm.conf
  if [ -f "$SLURM_CONF" ] && timeout 5 scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null; then
    for _ in $(seq 20); do
      [ -n "$(timeout 5 squeue -h -t running,completing 2>/dev/null)" ] || break
      sleep 0.25
    done
  fi
  for signal in TERM KILL; do
    mapfile -t pids < <(own_processes "$folder" | sort -u)
    if ((${#pids[@]})); then kill "-$signal" "${pids[@]}" 2>/dev/null || true; fi
    for _ in $(seq 20); do
      [ -n "$(own_processes "$folder")" ] || break
      sleep 0.1
    done
  done
  rm -rf "$folder"
}

command=${1:-}
case $command in
install) install ;;
up | down)
  mkdir -p "${2:?a folder}"
  "$command" "$(cd "$2" && pwd)"
  ;;
status) SLURM_CONF=$2/slurm.conf sinfo -N -l && SLURM_CONF=$2/slurm.conf squeue -l ;;
*)
  sed -n '2,7p' "$0"
  exit 2
  ;;
esac
