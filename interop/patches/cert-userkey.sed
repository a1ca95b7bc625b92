# The gateway accepts RSA signatures with SHA-2 only, so "rsa" means these.
/echo \$1 | sed/s/ssh-rsa/rsa-sha2-/
# The gateway rejects a certificate without principals for every trusted CA.
/^test_one "empty principals"/s/success/failure/
