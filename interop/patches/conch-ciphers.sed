s|--identity $OBJ/ssh-rsa|--identity $OBJ/ssh-ed25519|
