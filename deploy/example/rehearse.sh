#!/bin/sh
# The enrolment of three hospitals from beginning to end, on one machine: what each would type, in order.
#
#     sh deploy/example/rehearse.sh FOLDER NORTH_IMAGES EAST_IMAGES HARBOUR_IMAGES [--set KEY=VALUE]...
#
# FOLDER gets a state directory per hospital; the images are a folder with a folder per class, a table, or an .npz each.
# More settings of the plan go behind, e.g. --set rounds=2 --set backbone=tiny --set 'classes=["NORMAL","PNEUMONIA"]'.
# From the environment: IMAGE_SIZE (default 64 px), PORT (default 8931, and the next two).
set -eu

[ $# -ge 4 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(dirname "$0") folder=$1 north=$2 east=$3 harbour=$4
shift 4
size=${IMAGE_SIZE:-64} port=${PORT:-8931}
hsl=${HSL_NODE:-hsl-node}
mkdir -p "$folder"

# 1. Every hospital: key, settings and peer card.
"$hsl" --state "$folder/north" init --name north --address "127.0.0.1:$port" --data "$north"
"$hsl" --state "$folder/east" init --name east --address "127.0.0.1:$((port + 1))" --data "$east"
"$hsl" --state "$folder/harbour" init --name harbour --address "127.0.0.1:$((port + 2))" --data "$harbour"

# 2. The cards go to one of them by mail; the fingerprints are compared by telephone. It makes the anchor set (here
#    the digits, a stand-in) and the one file for everybody.
"$hsl" anchor build --digits --image-size "$size" --out "$folder/anchor.safetensors"
"$hsl" federation create --name rehearsal --plan "$here/plan.toml" --set "image_size=$size" "$@" \
    --card "$folder/north/north.card" --card "$folder/east/east.card" --card "$folder/harbour/harbour.card" \
    --anchor "$folder/anchor.safetensors" --out "$folder/federation.toml"

# 3. Every hospital: the two files, and the short hash compared once more.
for site in north east harbour; do
    "$hsl" --state "$folder/$site" federation join "$folder/federation.toml" --anchor "$folder/anchor.safetensors"
done

echo
echo 'Ready. One terminal per hospital:'
for site in north east harbour; do
    echo "  $hsl --state $folder/$site start"
done
echo "and to look on: $hsl --state $folder/north status --watch"
