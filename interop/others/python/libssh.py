# Usage: libssh.py PORT USER KEY... Its standard input has a line "KEX HOSTKEY CIPHER MAC" for each further connection.
import os, select, socket, sys, threading
from ssh.exceptions import EOF
from ssh.key import import_privkey_file
from ssh.options import HOST
from ssh.session import Session

port, user, keys = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
WRITE_PENDING = 2  # SSH_WRITE_PENDING


class Connection:
    def __init__(self, key, *config):
        with open("libssh_config", "w") as f:
            f.write("\n".join(("Port %d" % port, "User " + user, "StrictHostKeyChecking no", *config, "")))
        sock = socket.create_connection(("127.0.0.1", port))
        self.session = Session()
        self.session.options_set(HOST, "127.0.0.1")
        self.session.options_parse_config("libssh_config")
        self.session.set_socket(sock)
        self.fd = sock.detach()  # libssh closes it
        self.session.connect()
        self.session.userauth_publickey(import_privkey_file(key))

    def algorithms(self):
        s = self.session
        return [n.decode() for n in (s.get_kex_algo(), s.get_cipher_out(), s.get_cipher_in(), s.get_hmac_out(), s.get_hmac_in())]

    def wait(self):
        w = [self.fd] if self.session.get_poll_flags() & WRITE_PENDING else []
        if select.select([self.fd], w, [], 60) == ([], [], []):
            raise TimeoutError

    # echoed sends data through a channel, and returns its echo and the bytes on
    # stderr.
    def echoed(self, channel, data):
        self.session.set_blocking(0)
        back, err, sent = bytearray(), bytearray(), 0
        while True:
            busy = False
            for stderr, into in (False, back), (True, err):
                try:
                    n, some = channel.read_nonblocking(1 << 16, stderr)
                except EOF:
                    continue
                if n > 0:
                    into += some
                    busy = True
            if channel.is_eof():
                break
            if sent < len(data):
                size = min(channel.window_size(), 1 << 15)
                if size > 0:
                    _, n = channel.write(data[sent : sent + size])
                    sent += max(n, 0)
                    busy = busy or n > 0
                if sent == len(data):
                    channel.send_eof()
            if not busy:
                self.wait()
        self.session.set_blocking(1)
        assert back == data, f"{len(back)} bytes came back of {len(data)}, or others"
        return bytes(err)

    def command(self, data):
        channel = self.session.channel_new()
        channel.open_session()
        channel.request_exec("cat; echo err >&2; exit 7" if data else "echo err >&2; exit 7")
        err = self.echoed(channel, data)
        channel.close()
        assert (err, channel.get_exit_status()) == (b"err\n", 7), (err, channel.get_exit_status())

    # forward does the same through a channel to a server of ours.
    def forward(self, data):
        def echo():
            s, _ = server.accept()
            while some := s.recv(1 << 16):
                s.sendall(some)
            s.close()

        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=echo, daemon=True).start()
        channel = self.session.channel_new()
        channel.open_forward("127.0.0.1", server.getsockname()[1], "127.0.0.1", 1)
        self.echoed(channel, data)
        channel.close()
        server.close()

    def close(self):
        self.session.disconnect()


for key in keys:
    c = Connection(key)
    print(key, *c.algorithms())
    c.command(b"")
    c.close()
for config in (), ("RekeyLimit 1M",):
    c = Connection(keys[0], *config)
    c.command(os.urandom(64 << 20))
    c.forward(os.urandom(8 << 20))
    c.command(b"again")
    c.close()
for line in sys.stdin:
    kex, hostkey, cipher, mac = line.split()
    try:
        c = Connection(keys[0], "KexAlgorithms " + kex, "HostKeyAlgorithms " + hostkey, "Ciphers " + cipher, "MACs " + mac)
        c.command(os.urandom(1 << 20))
        got = c.algorithms()
        want = [kex, cipher, cipher, mac, mac]
        assert got == want or (got[:3] == want[:3] and "gcm" in cipher), got
        c.close()
    except Exception as e:
        raise Exception(line) from e
    print(line, end="")
