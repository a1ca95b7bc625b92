# paramiko: commands, sftp, forwards both ways; and a key is rejected for another user, also after other attempts.
import os, socket, threading
import paramiko

host, port, user = os.environ["HOST"], int(os.environ["PORT"]), os.environ["USER_NAME"]
key = paramiko.Ed25519Key.from_private_key_file(os.environ["KEY"])
stranger = paramiko.RSAKey.generate(2048)

client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect(host, port, user, pkey=key, look_for_keys=False, allow_agent=False)

stdin, stdout, stderr = client.exec_command("cat; echo err >&2; exit 7")
data = os.urandom(3_000_000)
def feed():
    stdin.write(data)
    stdin.channel.shutdown_write()
feeder = threading.Thread(target=feed)
feeder.start()
assert stdout.read() == data
feeder.join()
assert stderr.read() == b"err\n"
assert stdout.channel.recv_exit_status() == 7

sftp = client.open_sftp()
with sftp.open(os.path.abspath("file"), "wb") as f:
    f.write(data)
sftp.get(os.path.abspath("file"), "copy")
assert open("copy", "rb").read() == data
assert sorted(sftp.listdir(os.getcwd())) == ["copy", "file"]
sftp.posix_rename(os.path.abspath("file"), os.path.abspath("moved"))
assert sftp.stat(os.path.abspath("moved")).st_size == len(data)
sftp.close()

transport = client.get_transport()
channel = transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0))
assert channel.recv(4) == b"SSH-"
channel.close()
bound = transport.request_port_forward("127.0.0.1", 0)
assert bound > 0
with socket.create_connection(("127.0.0.1", bound), 10) as outside:
    inside = transport.accept(10)
    inside.sendall(b"from the client")
    inside.shutdown_write()
    got = b""
    while piece := outside.recv(100):
        got += piece
    assert got == b"from the client", got
transport.cancel_port_forward("127.0.0.1", bound)
client.close()


def fresh():
    t = paramiko.Transport((host, port))
    t.start_client(timeout=10)
    return t


def refused(what, attempt):
    try:
        attempt()
    except (paramiko.AuthenticationException, paramiko.SSHException, EOFError):
        return
    raise AssertionError(what + " was let in")


t = fresh()
try:
    t.auth_none(user)
    raise AssertionError("none was let in")
except paramiko.BadAuthenticationType as e:
    assert e.allowed_types == ["publickey"], e.allowed_types
refused("a key of another user, after none for its own", lambda: t.auth_publickey("bob", key))
assert not t.is_authenticated()
t.close()

t = fresh()
refused("a stranger", lambda: t.auth_publickey(user, stranger))
refused("a key of another user, after a refusal", lambda: t.auth_publickey("bob", key))
refused("a key of another user, named with a profile", lambda: t.auth_publickey("bob+default", key))
assert not t.is_authenticated()
t.close()
