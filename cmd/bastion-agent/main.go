// Command bastion-agent is the SSH server inside a bastion. See package agent.
package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
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
	"github.com/sallyport-ssh/sallyport/internal/become"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
)

func main() {
	become.Main()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bastion-agent:", err)
		os.Exit(1)
	}
}

type commands struct {
	Serve      serve      `cmd:"" default:"withargs" help:"Serve a bastion until it is idle or old (default)."`
	SFTPServer sftpServer `cmd:"" name:"sftp-server" hidden:"" help:"Serve the sftp protocol on standard input and output."`
	Version    version    `cmd:"" help:"Say which version this is."`
}

// run is main without the process around it.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	var cmds commands
	var helped bool
	parser, err := kong.New(&cmds,
		kong.Name("bastion-agent"),
		kong.Description("The SSH server inside a Sallyport bastion. Gateways log in to it; people do not."),
		kong.DefaultEnvars("SALLYPORT"),
		kong.Writers(stdout, stderr),
		kong.Exit(func(int) { helped = true }),
	)
	if err != nil {
		return err
	}
	parsed, err := parser.Parse(args)
	if helped { // --help has printed its text; what else is said does not matter
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
	Listen      string        `default:":2022" help:"Address to listen on."`
	Owner       string        `required:"" help:"The user this bastion belongs to."`
	Account     string        `required:"" help:"Local account that sessions run as."`
	FleetKey    string        `required:"" help:"Public key of the fleet's certificate authority, as in an authorized_keys line."`
	Principal   string        `required:"" help:"Name of this bastion in login certificates."`
	Idle        time.Duration `default:"15m" help:"Exit this long after the last connection; 0 means never."`
	MaxLife     time.Duration `default:"12h" help:"Exit when this old; 0 means never."`
	AcceptEnv   []string      `default:"none" placeholder:"PATTERN" help:"Variables that clients may set, as AcceptEnv of sshd_config(5); may be repeated."`
	MaxSessions int           `default:"10" help:"How many sessions one connection may have open."`
	ReadyFD     int           `name:"ready-fd" default:"-1" help:"Inherited descriptor to write address and host key to, as a line of JSON, once the agent listens."`
	LockFD      int           `name:"lock-fd" default:"-1" help:"Inherited descriptor to hold open while the agent lives, and to give to no child."`
}

// Run implements the serve command.
func (s *serve) Run(ctx context.Context, std streams) error {
	keepDescriptors(s.ReadyFD, s.LockFD)
	log := oplog.New(std.err).With("owner", s.Owner)

	fleet, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s.FleetKey))
	if err != nil {
		return fmt.Errorf("--fleet-key: %w", err)
	}
	account, err := agent.LookupAccount(s.Account)
	if err != nil {
		return fmt.Errorf("--account: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// Fresh at each boot: a bastion lives once.
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
	server := &agent.Server{
		HostKey:     hostKey,
		Verifier:    sshca.Verifier{Fleet: fleet, Principal: s.Principal},
		Owner:       s.Owner,
		Account:     account,
		Idle:        s.Idle,
		MaxLife:     s.MaxLife,
		AcceptEnv:   s.AcceptEnv,
		MaxSessions: s.MaxSessions,
		SFTP:        agent.SFTPCommand(quote(self) + " sftp-server"),
		Lastlog:     "/var/log/lastlog",
		TZ:          os.Getenv("TZ"),
		Log:         log,
	}

	// What the agent was started with is not for its sessions: they get an
	// environment, umask and signal handlers of their own making.
	os.Clearenv()
	unix.Umask(0o022)
	// A signal that was ignored when the agent started would be ignored in
	// its children too. One that is caught is not.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP, syscall.SIGPIPE)

	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", s.Listen)
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
				log.Error("orphans stay zombies", "err", err)
			}
		}()
		defer func() { close(stop); <-reaped }()
	}
	ballast := make([]byte, ballastSize)
	defer runtime.KeepAlive(ballast)
	return server.Serve(ctx, l)
}

// ballastSize is of memory that is never touched, and so costs none, but that the
// garbage collector counts as in use: it collects when the heap has doubled, and
// without it, since package ssh allocates each packet, would do nothing else
// while much is moved.
const ballastSize = 32 << 20

// keepDescriptors makes sure that no inherited descriptor reaches a session.
// A lock that a session's process held would outlive the agent.
func keepDescriptors(named ...int) {
	unix.CloseRange(3, ^uint(0)>>1&0x7fffffff, unix.CLOSE_RANGE_CLOEXEC) // Linux 5.11
	for _, fd := range named {
		if fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
}

// announce writes where the agent listens, and with which host key, to the
// descriptor that whoever started the agent waits on, and closes it.
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

// quote makes s one word of a shell's command line.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

type sftpServer struct{ agent.SFTP }

// Run implements the sftp-server command.
func (s *sftpServer) Run(std streams) error {
	return s.Serve(std.in, nopCloser{std.out})
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

type version struct{}

// Run implements the version command.
func (version) Run(std streams) error {
	v := "(unknown)"
	if info, ok := debug.ReadBuildInfo(); ok {
		v = info.Main.Version
	}
	_, err := fmt.Fprintln(std.out, "bastion-agent", v)
	return err
}
