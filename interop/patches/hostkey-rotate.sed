s/^nkeys=0$/SSH_HOSTKEY_TYPES=`for k in $SSH_HOSTKEY_TYPES; do case $k in sk-*) ;; *) echo $k ;; esac; done`\n&/
