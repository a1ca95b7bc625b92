# asyncssh: commands, eight at a time, half-close, a signal, sftp, a remote
# forward of any port.
import asyncio, os
import asyncssh


async def main():
    async with asyncssh.connect(os.environ["HOST"], int(os.environ["PORT"]), username=os.environ["USER_NAME"],
                                client_keys=[os.environ["KEY"]], known_hosts=None, config=None, agent_path=None) as conn:
        result = await conn.run("echo out; echo err >&2; exit 7")
        assert (result.stdout, result.stderr, result.exit_status) == ("out\n", "err\n", 7), result

        async with conn.create_process("sort") as process:
            process.stdin.write("b\na\n")
            process.stdin.write_eof()
            assert await process.stdout.read() == "a\nb\n"
            assert (await process.wait()).exit_status == 0

        async with conn.create_process("exec sleep 60") as process:
            await asyncio.sleep(0.5)
            process.send_signal("TERM")
            done = await process.wait()
            assert done.exit_signal and done.exit_signal[0] == "TERM", done.exit_signal

        data = os.urandom(3_000_000)
        async with conn.create_process("cat", encoding=None) as process:
            process.stdin.write(data)
            process.stdin.write_eof()
            assert await process.stdout.read() == data

        async with conn.start_sftp_client() as sftp:
            with open("data", "wb") as f:
                f.write(data)
            await sftp.put("data", os.path.abspath("up"))
            await sftp.get(os.path.abspath("up"), "down")
            assert open("down", "rb").read() == data
            assert {"data", "up", "down"} <= set(await sftp.listdir(os.getcwd()))

        async def greet(reader, writer):
            writer.write(b"hello")
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        listener = await conn.forward_remote_port("", 0, "127.0.0.1", server.sockets[0].getsockname()[1])
        assert listener.get_port() > 0
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.get_port())
        assert await reader.read() == b"hello"
        writer.close()
        listener.close()
        server.close()

        results = await asyncio.gather(*(conn.run(f"sleep 0.2; echo {i}") for i in range(8)))
        assert [r.stdout for r in results] == [f"{i}\n" for i in range(8)]


asyncio.run(asyncio.wait_for(main(), 60))
