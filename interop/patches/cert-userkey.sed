# RSA keys sign with SHA-2 alone here: "rsa" stands for that, and not for SHA-1.
/echo \$1 | sed/s/ssh-rsa/rsa-sha2-/
# A certificate that names nobody is nobody's, whatever line its CA stands on.
/^test_one "empty principals"/s/success/failure/
