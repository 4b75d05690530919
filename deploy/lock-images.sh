#!/bin/sh
# Writes the digest of every image in deploy/images.lock behind its tag. Needs docker with buildx, and the registry.
set -eu
lock="$(dirname "$0")/images.lock"
new="$lock.new"
trap 'rm -f "$new"' EXIT

while IFS= read -r line; do
    case "$line" in
        *_IMAGE=*)
            name="${line%%=*}"
            image="${line#*=}"
            image="${image%@*}"
            # printf: by itself buildx answers a bare field with its table of everything.
            digest="$(docker buildx imagetools inspect --format '{{printf "%s" .Manifest.Digest}}' "$image")"
            case "$digest" in
                sha256:????????????????????????????????????????????????????????????????) ;;
                *) echo "$name: no digest for $image, got '$digest'; $lock is unchanged" >&2; exit 1 ;;
            esac
            echo "$name=$image@$digest"
            ;;
        *) echo "$line" ;;
    esac
done <"$lock" >"$new"
mv "$new" "$lock"
