# Certificates: from the line that lets the CA in to the end of the loop. The
# file must still hold keys afterwards, but nobody logs in any more.
/^(printf 'cert-authority,principals="estragon" '/,/^done/d
