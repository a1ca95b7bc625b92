# sftp with batches.
. "$CLIENTS/lib.sh"
random 20000000 >data
mkdir tree
echo x >tree/x
cat >batch <<EOF
mkdir $PWD/there
cd $PWD/there
put -p data
put -R tree
rename data moved
ln -s moved link
chmod 600 moved
ls -l
df
get moved back
reget moved back
rm link
EOF
sftp -q -F "$SSH_CONFIG" -b batch bastion >log
cmp data back
cmp tree/x there/tree/x
grep -q '^sftp> df' log
# The first failing command ends a batch.
printf 'get nonexistent\nput data after\n' >bad
equal 'status of a bad batch' "$(status sftp -q -F "$SSH_CONFIG" -b bad bastion 2>err)" 1
[ ! -e after ]
