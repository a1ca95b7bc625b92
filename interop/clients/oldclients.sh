# Clients of 2018, paramiko 2.4.3 and JSch 0.1.55: by default there is no common key exchange; with `kex_algorithms:
# +ecdh-sha2-nistp256` and an ECDSA host key they run commands and copy files.
. "$CLIENTS/lib.sh"
/usr/bin/python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check paramiko==2.4.3 cryptography==2.9.2
mvn -q -B -Dmaven.repo.local="$MAVEN_REPOSITORY" org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy \
	-Dartifact=com.jcraft:jsch:0.1.55 -DoutputDirectory=.

cat >Old.java <<'EOF'
import com.jcraft.jsch.*;
import java.io.ByteArrayOutputStream;

class Old {
	public static void main(String[] args) throws Exception {
		JSch jsch = new JSch();
		jsch.addIdentity("ecdsa");
		Session session = jsch.getSession("alice", "127.0.0.1", Integer.parseInt(args[0]));
		session.setConfig("StrictHostKeyChecking", "no");
		session.connect(20000);
		ChannelExec exec = (ChannelExec) session.openChannel("exec");
		exec.setCommand("echo hello; exit 3");
		ByteArrayOutputStream out = new ByteArrayOutputStream();
		exec.setOutputStream(out);
		exec.connect();
		while (!exec.isClosed()) Thread.sleep(50);
		ChannelSftp sftp = (ChannelSftp) session.openChannel("sftp");
		sftp.connect();
		sftp.put("Old.java", System.getProperty("user.dir") + "/copied-by-jsch");
		System.out.println(session.getServerVersion() + ": " + out.toString().trim() + " status " + exec.getExitStatus());
		session.disconnect();
	}
}
EOF
javac -cp jsch-0.1.55.jar Old.java
cat >old.py <<'EOF'
import os, sys
import paramiko
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect("127.0.0.1", int(sys.argv[1]), "alice", pkey=paramiko.ECDSAKey.from_private_key_file("ecdsa"), look_for_keys=False, allow_agent=False)
_, out, _ = client.exec_command("echo hello; exit 3")
print(client.get_transport().remote_version + ":", out.read().decode().strip(), "status", out.channel.recv_exit_status())
sftp = client.open_sftp()
sftp.put("old.py", os.path.abspath("copied-by-paramiko"))
client.close()
EOF
jsch() { timeout 60 java -cp jsch-0.1.55.jar:. Old "$1"; }
paramiko() { timeout 60 venv/bin/python -W ignore old.py "$1"; }

ssh-keygen -q -t ecdsa -b 256 -m PEM -N '' -f ecdsa
ssh-keygen -q -t ecdsa -N '' -f host_ecdsa
ssh-keygen -q -t ed25519 -N '' -f host_ed25519
ssh-keygen -q -t ed25519 -N '' -f fleet_key
mkdir -m 700 authorized_keys.d
cp ecdsa.pub authorized_keys.d/alice
port=$(free_port)
gateway() {
	cat >gateway.yaml <<-EOF
		listen: 127.0.0.1:$port
		host_keys: [host_ed25519, host_ecdsa]
		fleet_key: fleet_key
		authorized_keys_dir: authorized_keys.d
		state_dir: state
		drain: 0s
		per_source_penalties: none
		profiles:
		  default: {idle: 5s, local: {account: $(id -un)}}
		${1-}
	EOF
	background "$BIN/gateway" serve --config gateway.yaml 2>gateway.log
	eventually greets 127.0.0.1 "$port"
}

gateway
equal 'JSch by default' "$(status jsch "$port" 2>/dev/null)" 1
equal 'paramiko by default' "$(status paramiko "$port" 2>/dev/null)" 1
grep -q 'no matching key exchange method found' gateway.log
kill "${children[0]}"
wait "${children[0]}" || true

gateway 'kex_algorithms: +ecdh-sha2-nistp256'
equal JSch "$(jsch "$port" | sed 's/^SSH-2.0-OpenSSH_[^:]*//')" ': hello status 3'
equal paramiko "$(paramiko "$port" | sed 's/^SSH-2.0-OpenSSH_[^:]*//')" ': hello status 3'
cmp Old.java copied-by-jsch
cmp old.py copied-by-paramiko
# Other clients are not affected.
equal OpenSSH "$(ssh -F /dev/null -p "$port" -i ecdsa -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=known_hosts -v alice@127.0.0.1 true 2>&1 | grep -c 'kex: algorithm: curve25519-sha256')" 1
