"""Makes vectors.json: key exchanges and packets of OpenSSH and paramiko.

    python3 vectors.py > vectors.json

It needs sshd and ssh-keygen of OpenSSH, and paramiko 5. Paramiko logs in to sshd
once with each cipher and MAC, and the methods of key exchange take turns. The
exchange hash, the keys and the payloads are as paramiko has computed them. That
OpenSSH has computed the same is proven by its signature of the exchange hash and by
its packets, which paramiko has decrypted. OpenSSH 9.2 has no ML-KEM, so paramiko is
both sides of that exchange.
"""

import base64
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading

import paramiko
from paramiko.packet import Packetizer

CIPHERS = ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr"]
MACS = ["hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512"]
KEXES = ["curve25519-sha256@libssh.org", "ecdh-sha2-nistp256", "ecdh-sha2-nistp384", "ecdh-sha2-nistp521", "diffie-hellman-group14-sha256"]
LETTERS = {"A": "iv", "B": "iv", "C": "key", "D": "key", "E": "mac", "F": "mac"}


class Recorder(Packetizer):
    """Keeps the packets that pass, as they are on the wire and decrypted."""

    def __init__(self, sock):
        super().__init__(sock)
        self.packets, self.raw_in = [], b""

    def read_all(self, n, check_rekey=False):
        got = super().read_all(n, check_rekey)
        self.raw_in += got
        return got

    def read_message(self):
        self.raw_in = b""
        number, message = super().read_message()
        self.packets.append({"from": "peer", "seq": message.seqno, "wire": self.raw_in, "payload": bytes([number]) + message.asbytes()})
        return number, message

    def write_all(self, out):
        self.wire = out
        super().write_all(out)

    def send_message(self, data):
        super().send_message(data)
        seq = (self._Packetizer__sequence_number_out - 1) & 0xFFFFFFFF
        self.packets.append({"from": "self", "seq": seq, "wire": self.wire, "payload": data.asbytes()})


class Client(paramiko.Transport):
    """Keeps what Transport forgets after the key exchange."""

    def _set_K_H(self, k, h):
        super()._set_K_H(k, h)
        self.secret, self.engine = k, self.kex_engine


class Server(paramiko.ServerInterface):
    pass


def private(engine):
    """Returns the client's ephemeral private key or keys, without any encoding."""
    if hasattr(engine, "mlkem_key"):
        return engine.mlkem_key.private_bytes_raw() + engine.x25519_key.private_bytes_raw()
    if hasattr(engine, "key"):
        return engine.key.private_bytes_raw()
    number = engine.x if hasattr(engine, "x") else engine.P.private_numbers().private_value
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def encoded(secret):
    """Returns a shared secret as it is hashed: a string of ML-KEM, an mpint of the others."""
    m = paramiko.Message()
    m.add_string(secret) if isinstance(secret, bytes) else m.add_mpint(secret)
    return m.asbytes()


def find(packets, who, number):
    return next(p["payload"] for p in packets if p["from"] == who and p["payload"][0] == number)


def login(sock, kex, cipher, mac):
    """Returns the vector of one connection on sock, in which paramiko is the client."""
    t = Client(sock)
    t.packetizer = Recorder(t.sock)
    t.packetizer.set_log(logging.getLogger("vectors"))
    options = t.get_security_options()
    options.kex, options.ciphers, options.key_types = [kex], [cipher], ["ssh-ed25519"]
    if mac:
        options.digests = [mac]
    t.start_client(timeout=10)
    try:
        t.auth_none("nobody")
    except paramiko.SSHException:
        pass
    t.K, t.kex_engine = t.secret, t.engine
    packets = t.packetizer.packets
    reply = paramiko.Message(find(packets, "peer", 31)[1:])
    host_key, server_value, signature = reply.get_string(), reply.get_string(), reply.get_string()
    info = t._cipher_info[cipher]
    sizes = {"iv": info.get("iv-size", info["block-size"]), "key": info["key-size"], "mac": t._mac_info[mac]["class"]().digest_size if mac else 0}
    vector = {
        "kex": kex, "cipher": cipher, "mac": mac,
        "client_version": t.local_version.encode(), "server_version": t.remote_version.encode(),
        "client_init": find(packets, "self", 20), "server_init": find(packets, "peer", 20),
        "client_value": paramiko.Message(find(packets, "self", 30)[1:]).get_string(), "server_value": server_value,
        "host_key": host_key, "signature": signature, "private": private(t.engine), "secret": encoded(t.K), "hash": t.H,
        "keys": {letter: t._compute_key(letter, sizes[kind]) for letter, kind in LETTERS.items()},
    }
    encrypted = {"self": False, "peer": False}
    vector["packets"] = []
    for p in packets:
        if encrypted[p["from"]] and len(p["wire"]) < 800:
            vector["packets"].append({**p, "from": "client" if p["from"] == "self" else "server"})
        encrypted[p["from"]] |= p["payload"][0] == 21
    t.close()
    return vector


def sshd(folder, kex, cipher, mac):
    """Returns a socket to an sshd."""
    config = os.path.join(folder, "sshd_config")
    with open(config, "w") as f:
        f.write(f"HostKey {folder}/host\nKexAlgorithms {kex}\nCiphers {cipher}\nUsePAM no\nPidFile none\n")
        f.write("MACs %s\nHostKeyAlgorithms ssh-ed25519\nPubkeyAcceptedAlgorithms ssh-ed25519\n" % (mac or MACS[0]))
    ours, its = socket.socketpair()
    subprocess.Popen(["/usr/sbin/sshd", "-i", "-f", config], stdin=its, stdout=its, stderr=subprocess.DEVNULL)
    its.close()
    return ours


def paramiko_server(folder):
    """Returns a socket to a server of paramiko, which runs in a thread."""
    ours, its = socket.socketpair()
    server = paramiko.Transport(its)
    server.add_server_key(paramiko.Ed25519Key(filename=folder + "/host"))
    server.start_server(server=Server(), event=threading.Event())
    return ours


def main():
    os.makedirs("/run/sshd", exist_ok=True)
    vectors = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder + "/host"], check=True)
        pairs = [(c, m) for c in CIPHERS for m in (MACS if c.endswith("-ctr") else [""])]
        for i, (cipher, mac) in enumerate(pairs):
            kex = KEXES[i % len(KEXES)]
            vectors.append(login(sshd(folder, kex, cipher, mac), kex, cipher, mac))
        vectors.append(login(paramiko_server(folder), "mlkem768x25519-sha256", CIPHERS[0], ""))
    json.dump(vectors, sys.stdout, indent="\t", default=lambda b: base64.b64encode(b).decode())
    print()


main()
