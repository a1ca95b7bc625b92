# libssh2, by curl: sftp and scp.
. "$CLIENTS/lib.sh"
ssh-keygen -y -f "$KEY" >key.pub
curl=(curl -sS -m 60 -k --key "$KEY" --pubkey key.pub -u "$USER_NAME:")
random 5000000 >data
"${curl[@]}" "sftp://$HOST:$PORT$PWD/data" -o down
cmp data down
"${curl[@]}" -T data "sftp://$HOST:$PORT$PWD/up"
cmp data up
"${curl[@]}" "scp://$HOST:$PORT$PWD/data" -o scp
cmp data scp
"${curl[@]}" "sftp://$HOST:$PORT$PWD/" >list
grep -q ' data$' list
