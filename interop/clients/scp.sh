# scp with both of its protocols, folders, and from one host to another.
. "$CLIENTS/lib.sh"
random 20000000 >data
mkdir -p tree/sub
echo x >tree/sub/x
for protocol in -O -s; do
	scp=(scp -q $protocol -F "$SSH_CONFIG")
	"${scp[@]}" data "bastion:$PWD/up$protocol"
	"${scp[@]}" "bastion:$PWD/up$protocol" "down$protocol"
	cmp data "down$protocol"
	"${scp[@]}" -r tree "bastion:$PWD/tree$protocol"
	diff -r tree "tree$protocol"
	"${scp[@]}" -3 "bastion:$PWD/data" "bastion:$PWD/third$protocol"
	cmp data "third$protocol"
	equal 'status for a missing file' "$(status "${scp[@]}" "bastion:$PWD/nonexistent" x 2>err)" 1
done
