// Command bastion-agent is the SSH server inside a bastion. Launchers start it; see
// package agent.
package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/agent"
	"github.com/sallyport-ssh/sallyport/internal/manpage"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/runas"
	"github.com/sallyport-ssh/sallyport/internal/sftp"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/unixsock"
)

func main() {
	runas.Init()
	// The sftp server is a session's.
	if len(os.Args) < 2 || os.Args[1] != "sftp-server" {
		if err := runas.LeaveKeyring(); err != nil {
			fmt.Fprintln(os.Stderr, "bastion-agent: leaving the session keyring:", err)
			os.Exit(1)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// A blocked reader of standard error must not block the process, nor its exit.
	stderr := oplog.NewWriter(os.Stderr)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, stderr)
	if err != nil {
		fmt.Fprintln(stderr, "bastion-agent:", err)
	}
	stderr.Close()
	if err != nil {
		os.Exit(1)
	}
}

type commands struct {
	Serve      serve      `cmd:"" default:"withargs" help:"Serve a bastion until it is idle or reaches --max-life (default)."`
	SFTPServer sftpServer `cmd:"" name:"sftp-server" hidden:"" help:"Serve the sftp protocol on standard input and output."`
	Version    version    `cmd:"" help:"Print the version."`
	Manual     manual     `cmd:"" hidden:"" help:"Print the commands in Markdown, for the manual page."`
}

// run is main for one command line.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	var cmds commands
	var helped bool
	parser, err := kong.New(&cmds,
		kong.Name("bastion-agent"),
		kong.Description("The SSH server inside a Sallyport bastion. Gateways log in to it; users do not."),
		kong.DefaultEnvars("SALLYPORT"),
		kong.Writers(stdout, stderr),
		kong.Exit(func(int) { helped = true }),
	)
	if err != nil {
		return err
	}
	parsed, err := parser.Parse(args)
	if helped { // --help has printed its text; other errors do not matter
		return nil
	}
	if err != nil {
		return err
	}
	parsed.BindTo(ctx, (*context.Context)(nil))
	return parsed.Run(streams{stdin, stdout, stderr})
}

type streams struct {
	in       io.Reader
	out, err io.Writer
}

type serve struct {
	Listen      string        `default:":2022" help:"Address to listen on: HOST:PORT, or unix:PATH for a socket that only this account may connect to."`
	Owner       string        `required:"" help:"The user this bastion belongs to."`
	Account     string        `required:"" help:"Account that sessions run as."`
	Groups      []string      `default:"none" placeholder:"NAME" help:"Groups of this machine in which sessions are, in addition to those of the account; may be repeated."`
	FleetKey    string        `required:"" help:"Public keys of the certificate authority that signs logins, as lines of an authorized_keys file."`
	Principal   string        `required:"" help:"Name of this bastion in login certificates."`
	Idle        time.Duration `default:"15m" help:"Exit this long after the last connection; 0 means never."`
	MaxLife     time.Duration `default:"12h" help:"Exit at this age, even with open connections; 0 means never."`
	StopTimeout time.Duration `default:"0" help:"Time between SIGTERM and SIGKILL, as stopTimeout in the task definition. Sessions may run on for that long less 20 seconds."`
	AcceptEnv   []string      `default:"none" placeholder:"PATTERN" help:"Variables that clients may set, as AcceptEnv in sshd_config(5); may be repeated."`
	MaxSessions int           `default:"10" help:"Maximum number of open sessions per connection."`
	MaxChannels int           `default:"1000" help:"Maximum number of open channels of all kinds per connection."`
	// On Fargate the agent has the environment of the container, elsewhere that of
	// the gateway.
	ContainerEnv          bool   `help:"Give sessions the environment of the agent's container, without the agent's settings and without credentials."`
	TaskRole              bool   `help:"With --container-env: also pass the variables by which sessions get the credentials of the task role."`
	GatewayPorts          string `default:"no" enum:"no,yes,clientspecified" help:"Addresses on which remote forwards may listen, as GatewayPorts in sshd_config(5)."`
	StreamLocalBindUnlink bool   `help:"Remove an existing file before a forwarded socket is made, as in sshd_config(5)."`
	StreamLocalBindMask   string `default:"0177" help:"Umask of forwarded sockets, in octal, as in sshd_config(5)."`
	ReadyFD               int    `name:"ready-fd" default:"-1" help:"Inherited descriptor. The agent writes its address and host key to it, as a line of JSON, when it listens."`
	LockFD                int    `name:"lock-fd" default:"-1" help:"Inherited descriptor of a lock. The agent keeps it open until it exits, and no child inherits it."`
}

// Run implements the serve command.
func (s *serve) Run(ctx context.Context, std streams) error {
	keepDescriptors(s.ReadyFD, s.LockFD)
	log := oplog.New(std.err).With("owner", s.Owner)

	fleet, err := sshca.ParseKeys(s.FleetKey)
	if err != nil {
		return fmt.Errorf("--fleet-key: %w", err)
	}
	account, err := agent.LookupAccount(s.Account)
	if err != nil {
		return fmt.Errorf("--account: %w", err)
	}
	if slices.Equal(s.Groups, []string{"none"}) {
		s.Groups = nil
	}
	groups, err := agent.LookupGroups(s.Groups)
	if err != nil {
		return fmt.Errorf("--groups: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// A new key for each bastion.
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	hostKey, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		return err
	}
	if slices.Equal(s.AcceptEnv, []string{"none"}) {
		s.AcceptEnv = nil
	}
	var environment []string
	if s.ContainerEnv {
		environment = agent.ContainerEnvironment(os.Environ(), s.TaskRole)
	}
	mask, err := strconv.ParseUint(s.StreamLocalBindMask, 8, 9)
	if err != nil {
		return fmt.Errorf("--stream-local-bind-mask: %w", err)
	}
	server := &agent.Server{
		HostKey:  hostKey,
		Verifier: sshca.Verifier{Fleet: fleet, Principal: s.Principal},
		Owner:    s.Owner,
		Account:  account,
		LookupLogin: func() (agent.Login, error) {
			login, problems, err := agent.LookupLogin(account, time.Now())
			if len(problems) > 0 {
				log.Warn("lines of limits.conf are ignored", "account", account.Name, "lines", problems[:min(len(problems), 10)])
			}
			login.Account.Groups = append(login.Account.Groups, groups...)
			return login, err
		},
		Idle:        s.Idle,
		MaxLife:     s.MaxLife,
		StopTimeout: s.StopTimeout,
		AcceptEnv:   s.AcceptEnv,
		MaxSessions: s.MaxSessions,
		MaxChannels: s.MaxChannels,

		GatewayPorts:          s.GatewayPorts,
		StreamLocalBindUnlink: s.StreamLocalBindUnlink,
		SocketMode:            0o777 &^ os.FileMode(mask),

		SFTP:        agent.SFTPCommand(self, "sftp-server"),
		Lastlog:     "/var/log/lastlog",
		Environment: environment,
		TZ:          os.Getenv("TZ"),
		Log:         log,
		ClientLog:   slog.New(clientLog.Handler(log.Handler())),
	}

	// Sessions do not inherit the environment, umask and signal handlers that the
	// agent was started with.
	os.Clearenv()
	unix.Umask(0o022)
	// A signal that was ignored when the agent started would be ignored in its
	// children, too. A caught one is reset for them.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP, syscall.SIGPIPE)

	l, err := listen(ctx, s.Listen)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := announce(s.ReadyFD, l.Addr(), hostKey.PublicKey()); err != nil {
		return err
	}
	log.Info("agent listens", "addr", l.Addr().String(), "host_key", ssh.FingerprintSHA256(hostKey.PublicKey()),
		"account", account.Name, "idle", s.Idle.String(), "max_life", s.MaxLife.String())

	if os.Getpid() == 1 {
		children := make(chan os.Signal, 1)
		signal.Notify(children, syscall.SIGCHLD)
		stop, reaped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(reaped)
			if err := agent.ReapOrphans(children, stop); err != nil {
				log.Error("cannot reap orphaned processes", "err", err)
			}
		}()
		defer func() { close(stop); <-reaped }()
	}
	return server.Serve(ctx, l)
}

// listen listens at an address of a Unix socket or a TCP port.
func listen(ctx context.Context, addr string) (net.Listener, error) {
	if strings.HasPrefix(addr, unixsock.Prefix) {
		path, ok := unixsock.Path(addr)
		if !ok {
			return nil, fmt.Errorf("--listen: %q is not unix: and an absolute path", addr)
		}
		return unixsock.Listen(path)
	}
	var lc net.ListenConfig
	return lc.Listen(ctx, "tcp", addr)
}

// clientLog limits the log records that clients can cause: several thousand lines,
// and as many again in an hour.
var clientLog = oplog.Limit{Bytes: 1 << 20, Per: time.Hour}

// keepDescriptors sets close-on-exec on every inherited descriptor, so that none
// reaches a session. A lock that a process of a session held would outlive the
// agent.
func keepDescriptors(named ...int) {
	unix.CloseRange(3, ^uint(0)>>1&0x7fffffff, unix.CLOSE_RANGE_CLOEXEC) // Linux 5.11
	for _, fd := range named {
		if fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
}

// announce writes the agent's address and host key to the descriptor fd, from which
// the local launcher reads them, and closes it. A negative fd means that there is
// none.
func announce(fd int, addr net.Addr, key ssh.PublicKey) error {
	if fd < 0 {
		return nil
	}
	f := os.NewFile(uintptr(fd), "ready-fd")
	if f == nil {
		return errors.New("--ready-fd: no such descriptor")
	}
	defer f.Close()
	err := json.NewEncoder(f).Encode(struct {
		Addr    string `json:"addr"`
		HostKey string `json:"host_key"`
	}{addr.String(), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))})
	if err != nil {
		return fmt.Errorf("--ready-fd %s: %w", strconv.Itoa(fd), err)
	}
	return nil
}

type sftpServer struct{ sftp.Server }

// Run implements the sftp-server command.
func (s *sftpServer) Run(std streams) error {
	return s.Serve(std.in, std.out)
}

type manual struct{}

// Run implements the manual command. packaging/build makes the manual page of its output.
func (manual) Run(k *kong.Context, std streams) error {
	_, err := io.WriteString(std.out, manpage.Commands(k.Model))
	return err
}

// release is the version of a packaged binary. The linker sets it (packaging/build).
var release string

type version struct{}

// Run implements the version command.
func (version) Run(std streams) error {
	v := release
	if info, ok := debug.ReadBuildInfo(); ok && v == "" {
		v = info.Main.Version
	}
	_, err := fmt.Fprintln(std.out, "bastion-agent", cmp.Or(v, "(unknown)"))
	return err
}
