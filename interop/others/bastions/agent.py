"""Another SSH server in the place of bastion-agent, for the launcher "local".

    agent.py SERVER serve --listen unix:PATH --principal ID --fleet-key KEY ...

SERVER is sshd (OpenSSH) or asyncssh. It accepts the certificates that the fleet key
has signed for the principal, as bastion-agent does, for any user name that it knows.
It ends when it has had no connection for ten seconds.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile

import asyncssh

IDLE = 10  # seconds


def parse(argv):
    p = argparse.ArgumentParser()
    for name in ["listen", "owner", "account", "fleet-key", "principal"]:
        p.add_argument("--" + name)
    options, _ = p.parse_known_args(argv)
    options.listen = options.listen.removeprefix("unix:")
    return options


class Sshd:
    """Runs sshd for each connection."""

    def __init__(self, options, folder, key):
        self.config = os.path.join(folder, "sshd_config")
        for name, text in {"ca": options.fleet_key, "principals": options.principal}.items():
            with open(os.path.join(folder, name), "w") as f:
                f.write(text + "\n")
        with open(self.config, "w") as f:
            f.write(f"HostKey {key}\nTrustedUserCAKeys {folder}/ca\nAuthorizedPrincipalsFile {folder}/principals\n")
            f.write("AuthorizedKeysFile none\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\nRekeyLimit 1M\nSubsystem sftp internal-sftp\n")

    async def serve(self, sock):
        server = await asyncio.create_subprocess_exec("/usr/sbin/sshd", "-i", "-e", "-f", self.config, stdin=sock, stdout=sock)
        sock.close()
        await server.wait()


class Asyncssh:
    """Serves each connection in this process."""

    def __init__(self, options, folder, key):
        line = f'cert-authority,principals="{options.principal}" {options.fleet_key}\n'
        self.options = asyncssh.SSHServerConnectionOptions(
            server_host_keys=[key], authorized_client_keys=asyncssh.import_authorized_keys(line),
            server_factory=Forwarding, process_factory=run, encoding=None, rekey_bytes=1 << 20, allow_scp=True, sftp_factory=True)

    async def serve(self, sock):
        connection = await asyncssh.run_server(sock, options=self.options)
        await connection.wait_closed()


class Forwarding(asyncssh.SSHServer):
    def connection_requested(self, dest_host, dest_port, orig_host, orig_port):
        return True

    def server_requested(self, listen_host, listen_port):
        return True


async def run(process):
    """Runs a command of a session."""
    child = await asyncio.create_subprocess_shell(process.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    async def copy(reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def copy_input():
        await copy(process.stdin, child.stdin)
        child.stdin.close()

    typed = asyncio.create_task(copy_input())
    await asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr))
    typed.cancel()
    process.exit(await child.wait())


async def main():
    options = parse(sys.argv[3:])
    with tempfile.TemporaryDirectory() as folder:
        key = os.path.join(folder, "host")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        server = {"sshd": Sshd, "asyncssh": Asyncssh}[sys.argv[1]](options, folder, key)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(options.listen)
        listener.listen()
        listener.setblocking(False)
        with open(key + ".pub") as f, os.fdopen(3, "w") as ready:
            json.dump({"addr": "unix:" + options.listen, "host_key": f.read().strip()}, ready)
            ready.write("\n")
        await accept(listener, server)


async def accept(listener, server):
    connections = set()
    while True:
        try:
            sock, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), IDLE)
        except asyncio.TimeoutError:
            if not connections:
                return
            continue
        connection = asyncio.create_task(server.serve(sock))
        connections.add(connection)
        connection.add_done_callback(connections.discard)


asyncio.run(main())
