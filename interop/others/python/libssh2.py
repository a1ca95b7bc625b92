# Usage: libssh2.py PORT USER KEY... Its standard input has a line "KEX HOSTKEY CIPHER MAC" for each further connection.
import os, select, socket, sys, threading
from ssh2 import session as ssh2
from ssh2.error_codes import LIBSSH2_ERROR_EAGAIN

port, user, keys = int(sys.argv[1]), sys.argv[2], sys.argv[3:]


class Connection:
    def __init__(self, key, prefer=()):
        self.sock = socket.create_connection(("127.0.0.1", port), 60)
        self.session = ssh2.Session()
        for method, names in prefer:
            self.session.method_pref(method, names)
        self.session.handshake(self.sock)
        self.session.userauth_publickey_fromfile(user, key)

    def algorithms(self):
        return [self.session.methods(m) for m in METHODS]

    def wait(self):
        directions = self.session.block_directions()
        sock = [self.sock]
        r = sock if directions & ssh2.LIBSSH2_SESSION_BLOCK_INBOUND else []
        w = sock if directions & ssh2.LIBSSH2_SESSION_BLOCK_OUTBOUND else []
        if select.select(r, w, [], 60) == ([], [], []):
            raise TimeoutError

    # echoed sends data through a channel, and returns its echo and the bytes on
    # stderr.
    def echoed(self, channel, data):
        self.session.set_blocking(False)
        back, err, sent, ended = bytearray(), bytearray(), 0, False
        while True:
            busy = False
            for read, into in (channel.read, back), (channel.read_stderr, err):
                n, some = read(1 << 16)
                if n > 0:
                    into += some
                    busy = True
                elif n < 0 and n != LIBSSH2_ERROR_EAGAIN:
                    raise Exception(f"read: {n}")
            if channel.eof():
                break
            if sent < len(data):
                _, n = channel.write(data[sent : sent + (1 << 17)])
                sent += n
                busy = busy or n > 0
            elif not ended:
                ended = channel.send_eof() == 0
            if not busy:
                self.wait()
        self.session.set_blocking(True)
        assert back == data, f"{len(back)} bytes came back of {len(data)}, or others"
        return bytes(err)

    def command(self, data):
        channel = self.session.open_session()
        channel.execute("cat; echo err >&2; exit 7")
        err = self.echoed(channel, data)
        channel.close()
        channel.wait_closed()
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
        channel = self.session.direct_tcpip("127.0.0.1", server.getsockname()[1])
        self.echoed(channel, data)
        channel.close()
        server.close()

    def close(self):
        self.session.disconnect()
        self.sock.close()


METHODS = (ssh2.LIBSSH2_METHOD_KEX, ssh2.LIBSSH2_METHOD_HOSTKEY, ssh2.LIBSSH2_METHOD_CRYPT_CS, ssh2.LIBSSH2_METHOD_MAC_CS)
OTHER_WAY = {2: ssh2.LIBSSH2_METHOD_CRYPT_SC, 3: ssh2.LIBSSH2_METHOD_MAC_SC}

for key in keys:
    c = Connection(key)
    print(key, *c.algorithms())
    c.command(b"")
    c.close()
c = Connection(keys[0])
c.command(os.urandom(64 << 20))
c.forward(os.urandom(8 << 20))
c.command(b"again")
c.close()
for line in sys.stdin:
    want = line.split()
    prefer = []
    for i, name in enumerate(want):
        prefer.append((METHODS[i], name))
        if i in OTHER_WAY:
            prefer.append((OTHER_WAY[i], name))
    try:
        c = Connection(keys[0], prefer)
        c.command(os.urandom(1 << 20))
        got = c.algorithms()
        # The MAC of an AEAD cipher is named after it.
        assert got == want or (got[:3] == want[:3] and "gcm" in want[2]), got
        c.close()
    except Exception as e:
        raise Exception(line) from e
    print(line, end="")
