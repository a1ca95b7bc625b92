# The key's forced command prints which key has logged in, in place of sshd's
# $SSH_USER_AUTH.
/^ExposeAuthInfo yes$/d
/^reset_keys() {/,/^}/{
	s/_command="cat .*" ;;/_command= ;;/
	s/^	for h in e d c b a; do$/&\n\t\t[ "$_whichcmd" != authinfo ] || _command="echo publickey $(cut -d" " -f-2 $OBJ\/user_$h.pub)"/
}
# Between hops that accept one key each.
s/^	cat \\$SSH_USER_AUTH$/	echo publickey `cut -d" " -f-2 $OBJ\/user_a.pub`/
