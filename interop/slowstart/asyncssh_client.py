# Usage: asyncssh_client.py HOST PORT USER KEY. Prints the output of a command, and its exit status.
import asyncio, sys
import asyncssh

async def main(host, port, user, key):
    async with asyncssh.connect(host, int(port), username=user, client_keys=[key], known_hosts=None, config=None) as client:
        done = await client.run("cat; exit 3", input="hello\n")
        print(done.stdout.strip() + done.stderr, "status", done.exit_status)

asyncio.run(main(*sys.argv[1:]))
