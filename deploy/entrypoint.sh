#!/bin/sh
# What a container starts with: `ultrafuser serve`, or the command that is named. Looks at the folders and the user
# first, so that what is wrong with them is said in one line. Knows no settings.
set -eu

fail() {
    echo "entrypoint: $1" >&2
    exit 2
}

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

case "${1:-}" in
    "" | -*) set -- ultrafuser serve "$@" ;;
    serve) set -- ultrafuser "$@" ;;
esac
exec "$@"
