# Usage: paramiko_client.py HOST PORT USER KEY. Prints the output of a command, and its exit status.
import sys
import paramiko

host, port, user, key = sys.argv[1:]
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect(host, int(port), user, key_filename=key, allow_agent=False, look_for_keys=False)
stdin, stdout, stderr = client.exec_command("cat; exit 3")
stdin.write("hello\n")
stdin.channel.shutdown_write()
print(stdout.read().decode().strip() + stderr.read().decode(), "status", stdout.channel.recv_exit_status())
client.close()
