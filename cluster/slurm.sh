#!/usr/bin/env bash
# Slurm: a Ray cluster for one run, in one allocation. From the checkout, which every node sees:
#   sbatch cluster/slurm.sh vgg19-cifar10 --set search.episodes=4000
# Before the time is up the run is told to stop; the same command goes on.
#SBATCH --job-name=rlcompress
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"
export PATH="$PWD/.venv/bin:$PATH" OMP_WAIT_POLICY=PASSIVE

# Several jobs may share a node, so ports follow the job's number. All ask for its token.
umask 077
token="$PWD/.ray-token-$SLURM_JOB_ID"
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
first="$(hostname)"
ip="$(hostname --all-ip-addresses | awk '{print $1}')"
port=$((20000 + SLURM_JOB_ID % 10000))
driver=""

stop() {
    [ -z "$driver" ] || kill -TERM "$driver" 2>/dev/null || true
}
trap stop TERM
trap 'rm -f "$token"; kill $(jobs -p) 2>/dev/null || true' EXIT

head=(ray start --head --block --node-ip-address="$ip" --port="$port" --dashboard-host=127.0.0.1
    --dashboard-port="$((port + 10000))" --disable-usage-stats)
# Beside other nodes its cores and GPU are the driver's: Ray is told of none, and puts nothing there.
[ "$SLURM_JOB_NUM_NODES" -eq 1 ] || head+=(--num-cpus=0 --num-gpus=0)
srun --overlap --nodes=1 --ntasks=1 --nodelist="$first" "${head[@]}" &
until ray status --address "$ip:$port" >/dev/null 2>&1; do
    kill -0 $! # ends here if the head did
    sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --overlap --nodes="$((SLURM_JOB_NUM_NODES - 1))" --ntasks-per-node=1 --exclude="$first" \
        ray start --block --address="$ip:$port" --disable-usage-stats &
fi

RAY_ADDRESS="$ip:$port" python -m rlcompress run "$@" &
driver=$!
# A signal ends `wait`, not the driver.
while :; do
    code=0
    wait "$driver" || code=$?
    kill -0 "$driver" 2>/dev/null || break
done
exit "$code"
