s/^PLAIN_TYPES=`echo "$SSH_KEYTYPES" | /&grep -v ^sk- | /
# Certificates that name no host.
/^test_one "empty principals"/d
s/^\(test_one "cert valid interval".*"-h \)/\1-n $HOSTS /
