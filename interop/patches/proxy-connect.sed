# The address of a connection that is not a socket.
/if \[ "\$SSH_CONNECTION" != "UNKNOWN 65535 UNKNOWN 65535" \]; then/,/^	fi/d
# A name with a style.
/^verbose "username with style"/,$d
