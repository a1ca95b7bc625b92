s/^for i in \$SSH_KEYTYPES/SSH_KEYTYPES=`echo "$SSH_KEYTYPES" | grep -v ^sk-`\n&/
