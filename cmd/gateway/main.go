// Command gateway is the SSH server in front of everyone's personal bastion.
//
// Run gateway --help for what it can do, and gateway demo to see it work.
// Logs are JSON lines on standard error.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/alecthomas/kong"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/become"
)

func main() {
	become.Main()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal does what it does to any program
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// commandLine is what the gateway can be asked to do.
type commandLine struct {
	Serve   serveCmd   `cmd:"" help:"Run a gateway. SIGTERM or SIGINT has it drain and end, a second one ends it at once."`
	Check   checkCmd   `cmd:"" help:"Say all that is wrong with a configuration, without starting anything."`
	Demo    demoCmd    `cmd:"" help:"Run a gateway for yourself on this machine, without any configuration."`
	Play    playCmd    `cmd:"" help:"Play the recording of a session."`
	Totp    totpCmd    `cmd:"" help:"Have a user asked for a verification code, and print her secret for the app."`
	Version versionCmd `cmd:"" help:"Print the version."`
}

// streams is where a command prints: out is its answer, err is for logs and
// for people who watch.
type streams struct{ out, err io.Writer }

// run is main without the process around it.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) (code int) {
	exited := false
	parser, err := kong.New(&commandLine{},
		kong.Name("gateway"),
		kong.Description("Gives everyone who connects with ssh a bastion of her own."),
		kong.Writers(stdout, stderr),
		kong.Exit(func(c int) { exited, code = true, c }),
		kong.UsageOnError(),
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.Bind(streams{stdout, stderr}),
	)
	if err != nil {
		panic(err) // the struct above is wrong
	}
	parsed, err := parser.Parse(args)
	if exited { // --help
		return code
	}
	if err != nil {
		parser.FatalIfErrorf(err)
		return code
	}
	if err := parsed.Run(); err != nil {
		fmt.Fprintln(stderr, "gateway:", err)
		return 1
	}
	return 0
}

type versionCmd struct{}

// Run prints the version the binary was built from.
func (versionCmd) Run(s streams) error {
	version := "devel"
	if info, ok := debug.ReadBuildInfo(); ok {
		if info.Main.Version != "" && info.Main.Version != "(devel)" {
			version = info.Main.Version
		}
		for _, kv := range info.Settings {
			if kv.Key == "vcs.revision" && version == "devel" {
				version += " " + kv.Value[:min(12, len(kv.Value))]
			}
		}
	}
	_, err := fmt.Fprintf(s.out, "sallyport gateway %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}

func authorizedKey(k ssh.PublicKey) string { return string(ssh.MarshalAuthorizedKey(k)) }
