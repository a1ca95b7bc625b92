"""A hostile client before login: python3 prelogin.py HOST PORT service|request|rekey|flood

With service and request, it sends a burst in one write after the key exchange: a
message that ends its login, and 600 more. The message is a request for an unknown
service, or a channel message while the gateway decides on an offered key. With rekey,
it repeats the key exchange and prints how often that works. With flood, it sends IGNORE
messages and prints how many KiB are accepted.
"""
import sys

import paramiko
from paramiko.message import Message


def message(number, *strings):
    m = Message()
    m.add_byte(bytes([number]))
    for s in strings:
        m.add_string(s)
    return m


transport = paramiko.Transport((sys.argv[1], int(sys.argv[2])))
transport.get_security_options().kex = ("diffie-hellman-group14-sha256", "curve25519-sha256@libssh.org")
transport.start_client()
if sys.argv[3] in ("rekey", "flood"):
    try:
        transport.auth_none("alice")
    except paramiko.BadAuthenticationType:
        pass
    done = 0
    while done < (20 if sys.argv[3] == "rekey" else 1 << 14):
        try:
            if sys.argv[3] == "rekey":
                transport.renegotiate_keys()
            else:
                transport._send_message(message(2, bytes(1 << 10)))
        except (paramiko.SSHException, EOFError, OSError):
            break
        if not transport.is_active():
            break
        done += 1
    print(done)
    sys.exit()
burst = []
transport.packetizer.write_all = burst.append
if sys.argv[3] == "service":
    transport._send_message(message(5, "ssh-nothing"))
else:
    transport._send_message(message(5, "ssh-userauth"))
    key = paramiko.RSAKey.generate(2048)
    offer = message(50, "alice", "ssh-connection", "publickey")
    offer.add_boolean(False)
    offer.add_string("rsa-sha2-512")
    offer.add_string(key.asbytes())
    transport._send_message(offer)
    transport._send_message(message(80))
for _ in range(600):
    transport._send_message(message(50))
transport.sock.sendall(b"".join(burst))
transport.join(10)  # until the gateway hangs up
