#!/usr/bin/env bash
# A certificate for the superlink and a key pair for every client, in a new folder:
#   bash keys.sh FOLDER ADDRESS CLIENTS     ADDRESS: where nodes reach the superlink, without port
# The superlink's own processes reach it as 127.0.0.1.
# server.pem goes to every node and user, client-K to node K alone, client-K.pub is registered.
set -euo pipefail
umask 077
[ ! -e "$1/server.key" ] || { echo "$1 has keys already: choose another folder" >&2; exit 2; }
mkdir -p "$1"
cd "$1"
[[ $2 =~ ^[0-9.]+$ ]] && name="IP:$2" || name="DNS:$2"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 -subj "/CN=$2" \
    -addext "subjectAltName=$name,IP:127.0.0.1,DNS:localhost" -keyout server.key -out server.pem
for ((k = 0; k < $3; k++)); do
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "client-$k" -f "client-$k"
done
