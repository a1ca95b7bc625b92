# Both loops of the server's rekeys.
/^for s in 16 1k 128k 256k; do$/{
	N
	/server rekeylimit/!b
	:size
	N
	/\ndone$/!b size
	d
}
/^for s in 5 10; do$/{
	N
	/server rekeylimit/!b
	:time
	N
	/\ndone$/!b time
	d
}
# What sshd -T makes of the option.
/^verbose "rekeylimit parsing"/,/^done/d
