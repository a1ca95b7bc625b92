# psftp and pscp of PuTTY.
. "$CLIENTS/lib.sh"
puttygen "$KEY" -o key.ppk
opts=(-batch -hostkey "$FINGERPRINT" -i key.ppk -P "$PORT")
random 5000000 >data
cat >commands <<EOF
mkdir $PWD/there
cd $PWD/there
put data
mv data moved
get moved back
ls
del moved
EOF
psftp "${opts[@]}" -b commands "$USER_NAME@$HOST" >log
cmp data back
grep -q ' moved$' log
[ ! -e there/moved ]
for protocol in -scp -sftp; do
	pscp $protocol -q "${opts[@]}" data "$USER_NAME@$HOST:$PWD/up$protocol"
	pscp $protocol -q "${opts[@]}" "$USER_NAME@$HOST:$PWD/up$protocol" down$protocol
	cmp data down$protocol
done
