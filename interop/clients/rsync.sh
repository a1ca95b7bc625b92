# rsync both ways: folders, deletions, a large file.
. "$CLIENTS/lib.sh"
rsync=(rsync -a -e "ssh -F $SSH_CONFIG")
mkdir -p from/deep/er
for i in $(seq 300); do echo "file $i" >"from/deep/$i"; done
ln -s deep from/link
random 128000000 >from/large
"${rsync[@]}" from/ "bastion:$PWD/there/"
diff -r from there
rm from/deep/7
echo changed >from/deep/8
"${rsync[@]}" --delete from/ "bastion:$PWD/there/"
diff -r from there
"${rsync[@]}" "bastion:$PWD/there/" back/
diff -r from back
# A missing program is an error.
[ "$(status "${rsync[@]}" --rsync-path=/nonexistent from/ "bastion:$PWD/x/" 2>err)" != 0 ]
grep -q 'nonexistent' err
