"""A client that says too much: python3 stranger.py HOST PORT service|request

After the key exchange it sends, in one piece, what ends its login and more
behind it: a service that is not there, or a message that is none of
authentication while the gateway thinks about the key that was offered before.
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
transport.start_client()
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
