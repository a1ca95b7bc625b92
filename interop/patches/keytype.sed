/^for i in \${SSH_KEYTYPES}/s/^/SSH_KEYTYPES=`echo "$SSH_KEYTYPES" | grep -v ^sk-`\n/
