#!/bin/sh
# What a container starts with: `ultrafuser serve`, or the command that is named. Looks at the folders and the user
# first, so that what is wrong with them is said in one line. Knows no settings.
set -eu

fail() {
    echo "entrypoint: $1" >&2
    exit 2
}

# What is written to the volumes stays writable for group 0, whoever the user is.
umask 002

# A platform may give the container any user; whoever asks for that user's name (torch's compiler) finds this one.
export USER="${USER:-ultrafuser}" LOGNAME="${LOGNAME:-ultrafuser}"

for name in HOME HF_HOME ULTRAFUSER_CACHE; do
    eval "folder=\${$name:-}"
    [ -n "$folder" ] || continue
    mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] ||
        fail "$name: user $(id -u), group $(id -g) cannot write to $folder; mount a volume there that they own"
done

if [ -n "${HF_TOKEN_PATH:-}" ] && [ -e "$HF_TOKEN_PATH" ] && [ ! -r "$HF_TOKEN_PATH" ]; then
    fail "HF_TOKEN_PATH: user $(id -u) cannot read $HF_TOKEN_PATH; make the secret readable for that user"
fi

# A quota of CPU time hides no cores: vLLM would start a thread for each core of the machine, and all would wait for
# time. As many as the quota pays for, and bound to none, since the quota names none. Where there is a GPU, vLLM sees to it.
cgroup="${ENTRYPOINT_CGROUP:-/sys/fs/cgroup}"
if [ -r "$cgroup/cpu.max" ]; then
    read -r quota period <"$cgroup/cpu.max"
elif [ -r "$cgroup/cpu/cpu.cfs_quota_us" ]; then
    read -r quota <"$cgroup/cpu/cpu.cfs_quota_us"
    read -r period <"$cgroup/cpu/cpu.cfs_period_us"
fi
case "${quota:-max}" in
    max | -*) ;;
    *)
        cores=$((quota / period))
        [ "$cores" -ge 1 ] || cores=1
        # By itself nproc says OMP_NUM_THREADS where that is set.
        if [ "$cores" -lt "$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" ] && [ ! -e /dev/nvidiactl ]; then
            export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cores}"
            export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
        fi
        ;;
esac

case "${1:-}" in
    "" | -*) set -- ultrafuser serve "$@" ;;
    serve) set -- ultrafuser "$@" ;;
esac
exec "$@"
