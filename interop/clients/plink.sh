# plink of PuTTY: status, both outputs, half-close, a stream each way, a channel
# of its own.
. "$CLIENTS/lib.sh"
puttygen "$KEY" -o key.ppk
plink=(plink -batch -ssh -hostkey "$FINGERPRINT" -i key.ppk -P "$PORT" "$USER_NAME@$HOST")

equal status "$(status "${plink[@]}" exit 7)" 7
"${plink[@]}" 'echo out; echo err >&2' >out 2>err
equal stdout "$(cat out)" out
equal stderr "$(cat err)" err
equal 'half-close' "$(printf 'b\na\n' | "${plink[@]}" sort | tr '\n' ' ')" 'a b '
random 8000000 >data
"${plink[@]}" cat <data >copy
cmp data copy
# A channel without a session, as with ssh -W.
equal 'channel' "$( (sleep 1) | "${plink[@]}" -nc "127.0.0.1:$PORT" | head -c 8)" SSH-2.0-
