package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// users is the number of users, each with a bastion, in the memory and idle
// sections.
const users = 20

// A bench has the two servers under test, and the keys and addresses to reach them.
type bench struct {
	settings
	log     *slog.Logger
	dir     string
	keep    bool
	gateway server
	sshd    server
	sshdGCM server // the same sshd, to a client that offers only the gateway's first cipher
	binary  string // the gateway; the agent is beside it
	peer    string // address of the source and sink, see servePeer
	key     string // file with the private key of every login
	started []*process
}

// A server is one of the two under test.
type server struct {
	name string // its Host in ssh_config
	addr string
	user string
	pid  int
}

// A process is a child of this process.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed after the process has ended and was waited for
}

// start builds the commands, and starts both servers and the peer. The caller
// must close the bench.
func start(ctx context.Context, dir, gateway, env string, set settings, log *slog.Logger) (b *bench, err error) {
	// Agents outlive the gateway that started them. This process is their
	// subreaper, so that it becomes their parent and can kill them by pid
	// (prctl(2)).
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("becoming a subreaper: %w", err)
	}
	if err := raiseFileLimit(); err != nil {
		return nil, err
	}
	b = &bench{settings: set, log: log, dir: dir, keep: dir != ""}
	if b.keep {
		b.dir, err = filepath.Abs(dir)
		err = errors.Join(err, os.MkdirAll(b.dir, 0o755))
	} else {
		b.dir, err = os.MkdirTemp("", "sallyport-bench-")
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	if gateway == "" {
		log.Info("building the gateway and the agent")
		build := exec.CommandContext(ctx, "go", "build", "-o", b.path("bin")+"/", "./cmd/gateway", "./cmd/bastion-agent")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%s: %w\n%s", build, err, out)
		}
		gateway = b.path("bin", "gateway")
	}
	b.binary = gateway
	if err := b.startPeer(); err != nil {
		return nil, err
	}
	me, err := user.Current()
	if err != nil {
		return nil, err
	}
	b.sshd = server{name: "sshd", user: me.Username}
	b.gateway = server{name: "gateway", user: userName(0)}
	b.sshdGCM = server{name: "sshd-gcm", user: me.Username}
	for _, s := range []*server{&b.sshd, &b.gateway} {
		if s.addr, err = freeAddr(); err != nil {
			return nil, err
		}
	}
	if err := b.writeKeys(ctx); err != nil {
		return nil, err
	}
	if err := b.startSSHD(); err != nil {
		return nil, err
	}
	b.sshdGCM.addr, b.sshdGCM.pid = b.sshd.addr, b.sshd.pid
	if err := b.startGateway(gateway, env, me.Username); err != nil {
		return nil, err
	}
	if err := b.writeSSHConfig(); err != nil {
		return nil, err
	}
	for _, s := range []server{b.sshd, b.gateway} {
		if err := awaitSSH(ctx, s.addr); err != nil {
			return nil, fmt.Errorf("%s did not start: %w\n%s", s.name, err, b.logOf(s.name))
		}
		// The first login starts the bastion, so it is not measured.
		if out, err := b.ssh(ctx, s, "true").CombinedOutput(); err != nil {
			return nil, fmt.Errorf("first login to %s: %w\n%s%s", s.name, err, out, b.logOf(s.name))
		}
	}
	return b, nil
}

// close kills all started processes and their descendants, and removes the
// temporary folder.
func (b *bench) close() error {
	for _, p := range b.started {
		p.cmd.Process.Signal(syscall.SIGTERM)
	}
	for _, p := range b.started {
		select {
		case <-p.done:
		case <-time.After(5 * time.Second):
			p.cmd.Process.Kill()
			<-p.done
		}
	}
	// The remaining processes are orphans: bastions, their sessions, sshd's
	// sessions.
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			for { // reap orphans that have become children
				if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
					break
				}
			}
			left := descendants(os.Getpid())
			if len(left) == 0 {
				break
			}
			for _, pid := range left {
				syscall.Kill(pid, sig)
			}
		}
	}
	var err error
	if left := descendants(os.Getpid()); len(left) > 0 {
		err = fmt.Errorf("these processes did not end: %v", left)
	}
	if b.keep {
		return err
	}
	return errors.Join(err, os.RemoveAll(b.dir))
}

func (b *bench) path(elem ...string) string {
	return filepath.Join(append([]string{b.dir}, elem...)...)
}

func userName(i int) string { return fmt.Sprintf("bench%d", i) }

// writeKeys generates the keys of the servers, the fleet and the users, and
// writes the authorized keys.
func (b *bench) writeKeys(ctx context.Context) error {
	b.key = b.path("user_key")
	for _, file := range []string{b.key, b.path("sshd_key"), b.path("gateway_key"), b.path("fleet_key")} {
		if _, err := os.Stat(file); err == nil {
			continue // from an earlier run in the same folder
		}
		out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bench", "-f", file).CombinedOutput()
		if err != nil {
			return fmt.Errorf("ssh-keygen: %w\n%s", err, out)
		}
	}
	public, err := os.ReadFile(b.key + ".pub")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(b.path("authorized_keys.d"), 0o755); err != nil {
		return err
	}
	for i := range users {
		if err := os.WriteFile(b.path("authorized_keys.d", userName(i)), public, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) startSSHD() error {
	// An sshd that runs as root requires this folder, which Debian's unit creates.
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	host, port, err := net.SplitHostPort(b.sshd.addr)
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`ListenAddress %s
Port %s
HostKey %s
AuthorizedKeysFile %s.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
UseDNS no
MaxStartups 1000
MaxSessions 1000
`, host, port, b.path("sshd_key"), b.key)
	if err := os.WriteFile(b.path("sshd_config"), []byte(config), 0o644); err != nil {
		return err
	}
	b.sshd.pid, err = b.spawn("sshd", exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", b.path("sshd_config")))
	return err
}

func (b *bench) startGateway(binary, env, account string) error {
	config := fmt.Sprintf(`listen: "%s"
host_keys: [%s]
fleet_key: %s
authorized_keys_dir: %s
state_dir: %s
max_startups: 10000
per_source_max_startups: none
max_connections_per_user: 10000
per_source_penalties: none
starts_per_user: none
profiles:
  default:
    launcher: local
    idle: 15m
    local:
      account: %s
`, b.gateway.addr, b.path("gateway_key"), b.path("fleet_key"), b.path("authorized_keys.d"), b.path("state"), account)
	if err := os.WriteFile(b.path("gateway.yaml"), []byte(config), 0o644); err != nil {
		return err
	}
	cmd := exec.Command(binary, "serve", "--config", b.path("gateway.yaml"))
	if env != "" {
		cmd.Env = append(os.Environ(), env)
	}
	var err error
	b.gateway.pid, err = b.spawn("gateway", cmd)
	return err
}

// spawn starts cmd, with its output in a log (see logOf). The bench kills it in
// close.
func (b *bench) spawn(name string, cmd *exec.Cmd) (pid int, err error) {
	log, err := os.Create(b.path(name + ".log"))
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd.Stderr = log
	if cmd.Stdout == nil {
		cmd.Stdout = log
	}
	// Ctrl-C goes to a whole process group. Only close may end these processes,
	// not Ctrl-C during a measurement.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("starting %s: %w", name, err)
	}
	p := &process{name: name, cmd: cmd, done: make(chan struct{})}
	b.started = append(b.started, p)
	// close waits for this goroutine by p.done.
	go func() {
		cmd.Wait()
		close(p.done)
	}()
	return cmd.Process.Pid, nil
}

// logOf returns the end of the output of a process.
func (b *bench) logOf(name string) string {
	log, _ := os.ReadFile(b.path(name + ".log"))
	return string(log[max(0, len(log)-4096):])
}

// writeSSHConfig writes the stock client's configuration for both servers. It leaves all algorithms at the client's defaults, except for sshdGCM.
func (b *bench) writeSSHConfig() error {
	var config, known strings.Builder
	for _, s := range []server{b.sshd, b.gateway} {
		host, port, err := net.SplitHostPort(s.addr)
		if err != nil {
			return err
		}
		public, err := os.ReadFile(b.path(s.name + "_key.pub"))
		if err != nil {
			return err
		}
		fmt.Fprintf(&config, "Host %s\n\tHostName %s\n\tPort %s\n\tUser %s\n", s.name, host, port, s.user)
		fmt.Fprintf(&known, "[%s]:%s %s", host, port, public)
	}
	host, port, err := net.SplitHostPort(b.sshdGCM.addr)
	if err != nil {
		return err
	}
	fmt.Fprintf(&config, "Host %s\n\tHostName %s\n\tPort %s\n\tUser %s\n\tCiphers aes128-gcm@openssh.com\n", b.sshdGCM.name, host, port, b.sshdGCM.user)
	// Clients from 9.5 on send a keystroke at the next multiple of 20 ms, which
	// would hide every other delay in the keystroke section.
	fmt.Fprintf(&config, `Host *
	IdentityFile %s
	IdentitiesOnly yes
	IdentityAgent none
	UserKnownHostsFile %s
	GlobalKnownHostsFile none
	BatchMode yes
	LogLevel ERROR
	IgnoreUnknown ObscureKeystrokeTiming
	ObscureKeystrokeTiming no
`, b.key, b.path("known_hosts"))
	return errors.Join(
		os.WriteFile(b.path("known_hosts"), []byte(known.String()), 0o644),
		os.WriteFile(b.path("ssh_config"), []byte(config.String()), 0o644))
}

// ssh returns a command that runs the stock client with s as its destination. It
// is killed when ctx ends.
func (b *bench) ssh(ctx context.Context, s server, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ssh", append([]string{"-F", b.path("ssh_config"), s.name}, args...)...)
}

// ciphers returns the cipher that a default client and s negotiate, as "chacha20-poly1305@openssh.com".
func (b *bench) ciphers(ctx context.Context, s server) (string, error) {
	cmd := exec.CommandContext(ctx, "ssh", "-F", b.path("ssh_config"), "-o", "LogLevel=DEBUG1", s.name, "true")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("ssh -v to %s: %w\n%s", s.name, err, out)
	}
	lines := bufio.NewScanner(strings.NewReader(string(out)))
	for lines.Scan() {
		if _, rest, ok := strings.Cut(lines.Text(), "kex: server->client cipher: "); ok {
			cipher, _, _ := strings.Cut(rest, " ")
			return cipher, nil
		}
	}
	return "", fmt.Errorf("ssh -v to %s named no cipher:\n%s", s.name, out)
}

// freeAddr returns a loopback address without a listener. Another process can
// take it before the caller does.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// awaitSSH returns when an SSH server answers at addr.
func awaitSSH(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		err := func() error {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			if err != nil {
				return err
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			line, err := bufio.NewReader(conn).ReadString('\n')
			if err == nil && !strings.HasPrefix(line, "SSH-2.0-") {
				err = fmt.Errorf("%s answers %q", addr, line)
			}
			return err
		}()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// raiseFileLimit raises the limit of open files of this process. Children inherit
// it, because package syscall restores only a limit that Go has raised itself.
func raiseFileLimit() error {
	const want = 65536
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("reading the limit of open files: %w", err)
	}
	if limit.Max < want && os.Geteuid() == 0 {
		raised := syscall.Rlimit{Cur: want, Max: want}
		if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &raised) == nil {
			return nil
		}
	}
	limit.Cur = limit.Max // fitIdle adapts to it
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raising the limit of open files: %w", err)
	}
	return nil
}
