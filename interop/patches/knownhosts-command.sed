/^for keytype in \${SSH_HOSTKEY_TYPES}/s/^/SSH_HOSTKEY_TYPES=`echo "$SSH_HOSTKEY_TYPES" | grep -v ^sk-`\n/
